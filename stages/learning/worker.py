"""What a worker process does: load the base, and run the arm, which writes its checkpoints as it goes."""

import importlib
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers

from stages.learning.adapters import with_adapters
from stages.learning.checkpoints import run_folder
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.probes import Probe
from stages.learning.run import Recorder, Run
from stages.learning.schedule import checkpoint_steps, prompt_order
from stages.learning.settings import CurveRow
from stages.learning.workers import Job
from stages.pipeline.checkpoints import load_model, load_tokenizer
from stages.tasks.examples import read_examples, read_prompts


def run_job(job: Job, report: Callable[[int, CurveRow], None]) -> list[CurveRow]:
    """Run one arm at one learning rate; writes the folder `lr<index>`, returns the rows of its curve."""
    torch.set_num_threads(1)
    _silence()
    model, tokenizer, train = load_model(job.base, device=job.device), load_tokenizer(job.base), read_prompts(job.train)
    model.set_attn_implementation("sdpa")  # the same function as eager attention, faster
    plain = model
    # an arm with a grid of its own does not train, and moves the weights themselves
    if job.training.lora is not None and not hasattr(job.section, "learning_rates"):
        model = with_adapters(model, job.training.lora, job.training.seed + job.seed)
    old, new = read_examples(job.old), read_prompts(job.new)
    old = old.select(torch.arange(min(len(old), job.training.probe_examples)))
    new = new.select(torch.arange(min(len(new), job.training.probe_examples)))
    probe, folder = Probe.of(model, old, new), run_folder(job.folder, job.index)
    recorder = Recorder(model, probe, checkpoint_steps(job.training), report, folder)
    run = Run(
        arm=job.arm,
        seed=job.seed,
        learning_rate=job.learning_rate,
        training=job.training,
        section=job.section,
        model=model,
        tokenizer=tokenizer,
        train=train,
        rehearsal=read_prompts(job.rehearsal),
        order=prompt_order(len(train), job.training, job.seed),
        recorder=recorder,
    )
    # the answer and the token before it; answers of several tokens are padded, and generated token by token
    with nullcontext() if train.several_tokens else last_layer_at_the_end(plain, tokens=2):
        importlib.import_module(f"stages.learning.arms.{job.arm}").train(run)
    return recorder.rows


def _silence() -> None:
    """Leave the terminal to the progress bar and to errors."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
