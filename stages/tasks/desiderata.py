"""Desiderata: what the patched base should answer if the patched heads carry a certain value (paper, 4.2).

Base and source are prompts of the old task. If a group of heads carries
- `positional`: where the queried clause is, the base answers its own object at the source's queried clause;
- `object_value`: the object itself, the base answers the source's object;
- `box_label_value`: the label of the queried box, the base answers its own object under the source's queried
  label;
- `next_clause`: none of these; the target is the base's object one clause after the one of `positional`, as a
  negative control (the paper's "incorrect segment").

AlignedPairs are drawn so that these hypotheses cannot be confused: the source names no object of the base, its
queried clause is another one (uniform over the others), and its queried label is absent from the base or, in
`box_label_value`, the label of a third clause. So a base that is not changed scores 0 (`floors`).

The base prompt always has the standard wording. A name with a wording behind it, `positional-no_comma`, has
sources of that wording: what is carried should not depend on how the source happened to be said. The paper's
additional desiderata are `next_clause` and `positional` in the wordings; its "is not in" is left out, because no
base is trained on it. Objects and labels that a wording adds are those of no clause.
"""

import numpy as np
import torch
from jaxtyping import Int

from stages.pipeline.stage import Invalid
from stages.tasks.contexts import (
    Contexts,
    Split,
    draw_absent_label,
    draw_clauses,
    draw_contexts,
    draw_other_clauses,
)
from stages.tasks.entity_tracking import old_prompts, positions
from stages.tasks.examples import DesiderataPairs
from stages.tasks.old.boxes import Boxes
from stages.tasks.templates import STANDARD
from stages.tasks.vocabulary import Vocabulary

LEAST_BOXES = 3  # base clause, source clause and the clause of the source's label


def draw_pairs(
    rng: np.random.Generator, vocabulary: Vocabulary, desideratum: str, split: Split, n: int, boxes: int
) -> DesiderataPairs:
    """Draw base and source prompts of one split.

    Args:
        rng: source of randomness.
        vocabulary: token ids of words.
        desideratum: a hypothesis, or `<hypothesis>-<wording of the source>`.
        split: the split that base and source contexts belong to.
        n: number of pairs.
        boxes: number of clauses, at least LEAST_BOXES.

    Raises:
        Invalid: fewer boxes, or there is no such desideratum.
    """
    hypothesis, said = Boxes.parts(desideratum)
    wording = said or STANDARD
    if boxes < LEAST_BOXES:
        raise Invalid(f"synthesize.boxes = {boxes}: must be at least {LEAST_BOXES}, so that desiderata differ")
    rows = np.arange(n)
    pool = vocabulary.pool
    base = draw_contexts(rng, split, n, boxes, pool=pool)
    base_clause = draw_clauses(rng, n, boxes)
    # the clause after the source's must not be the base's own, or the control's target would be the clean answer
    taken = (base_clause, (base_clause - 1) % boxes) if hypothesis == "next_clause" else (base_clause,)
    source_clause = draw_other_clauses(rng, boxes, *taken)
    label_clause = draw_other_clauses(rng, boxes, base_clause, source_clause)
    if hypothesis == "box_label_value":
        query_label = base.labels[rows, label_clause]
    else:
        query_label = draw_absent_label(rng, base, pool=pool)

    def ask_for_label(source: Contexts) -> Contexts:
        """Give the queried clause its label; a clause that had it takes the one that becomes free."""
        labels = source.labels.copy()
        freed = labels[rows, source_clause][:, None]
        labels = np.where(labels == query_label[:, None], freed, labels)
        labels[rows, source_clause] = query_label
        return Contexts(source.objects, labels)

    source = draw_contexts(rng, split, n, boxes, without_objects=base.objects, fixed=ask_for_label, pool=pool)
    base_objects = vocabulary.objects[base.objects]
    target = {
        "positional": base_objects[rows, source_clause],
        "object_value": vocabulary.objects[source.objects][rows, source_clause],
        "box_label_value": base_objects[rows, label_clause],
        "next_clause": base_objects[rows, (source_clause + 1) % boxes],
    }[hypothesis]
    return DesiderataPairs(
        old_prompts(vocabulary, base, base_clause),
        old_prompts(vocabulary, source, source_clause, wording, draw_absent_label(rng, source, pool=pool)),
        torch.from_numpy(target),
        torch.from_numpy(base_objects[rows, base_clause]),
        positions(vocabulary, boxes, base_clause),
        positions(vocabulary, boxes, source_clause, wording),
    )


def floors(pairs: DesiderataPairs, vocabulary: Vocabulary, boxes: int) -> dict[str, float]:
    """What the desideratum scores without any information.

    Args:
        pairs: the pairs.
        vocabulary: what they are said in.
        boxes: number of clauses.

    Returns:
        `clean_answer`: share of pairs whose target is the clean answer, which an unchanged base scores.
        `random_base_object`: score of naming a random object of the base context.
        `random_context_object`: score of naming a random object of base and source together.
        `random_object`: score of naming a random object of the vocabulary.
    """
    in_base = _contains(pairs.base_ids, pairs.target)
    in_source = _contains(pairs.source_ids, pairs.target)
    return {
        "clean_answer": float((pairs.target == pairs.clean_answer).double().mean()),
        "random_base_object": float(in_base.double().mean()) / boxes,
        "random_context_object": float((in_base | in_source).double().mean()) / (2 * boxes),
        "random_object": 1 / int(vocabulary.pool.objects.sum()),
    }


def _contains(ids: Int[torch.Tensor, "n t"], token: Int[torch.Tensor, "n"]) -> torch.Tensor:
    return (ids == token[:, None]).any(dim=1)
