"""The word-level tokenizer: one token a word or mark, `<bos>` put in front, nothing at the end."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from stages.tasks.vocabulary import BOS, EOS, PAD, UNK, vocabulary


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer whose token ids are those of `vocabulary()`."""
    ids = vocabulary().ids
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # words, and runs of marks, so "Z," is two tokens
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",  # the last token of every prompt of a padded batch is at the end
        clean_up_tokenization_spaces=False,
    )
