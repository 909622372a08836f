"""The report: its question and answer, and its sections in order, from summary.json alone.

`document` builds one structure, which `to_html` and `to_markdown` turn into pages that say the same. Each section is a
module in `sections/`. Every number comes out of the summary through `number` (a test checks it).
"""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Document
from stages.figures.rendering import to_html, to_markdown
from stages.figures.sections import (
    ablations,
    checks,
    circuit,
    contrasts,
    enhancement,
    forgetting,
    groups,
    learning,
    limits,
    matchings,
    provenance,
    similarity,
    specification,
    tables,
    tasks,
    transplants,
)
from stages.figures.style import label
from stages.statistics.wording import left_out

__all__ = ["document", "to_html", "to_markdown"]


def document(summary: Mapping[str, Any]) -> Document:
    """Write the report."""
    return Document(
        title="Which way of fine-tuning keeps a model's old circuit?",
        question=(
            "When a language model learns a new task, which way of fine-tuning it, supervised (SFT) or "
            "reinforcement learning (RL), keeps the circuit of its old task?"
        ),
        answer=summary["headline"]["sentence"],
        limits=f"{summary['sample']} {left_out(summary['bases_left_out'])} {summary['power_note']}".strip(),
        how_to_read=(
            "Every seed gives one base model that solves the old task; all arms start from that base and "
            "are compared at the same accuracy in the new task. Warm colours are SFT, blue is RL, purple "
            f"and grey are controls; {label('base')} is black. A dot is a seed; filled means compared, "
            "hollow means left out of the contrasts, because the arm never reached the matching level or "
            "because the base's own circuit does not work. Means in the contrasts and their tables are of what "
            "is compared; the figures after them include every base. Retention is the share of what the base's "
            "circuit did alone in the base that it still does alone in the tuned model (everything else "
            "mean-ablated): 1 is untouched."
        ),
        sections=(
            contrasts.section(summary),
            checks.section(summary),
            tasks.section(summary),
            *([enhancement.section(summary)] if summary["table_enhancement"] else []),
            specification.section(summary),
            matchings.section(summary),
            circuit.section(summary),
            *([ablations.section(summary)] if summary["table_scores"] or summary["table_ablations"] else []),
            similarity.section(summary),
            forgetting.section(summary),
            transplants.section(summary),
            groups.section(summary),
            learning.section(summary),
            tables.section(summary),
            limits.section(summary),
            provenance.section(summary),
        ),
    )
