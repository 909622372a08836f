"""Enhancement: where the new task is the old one, is the mechanism that is there made stronger?"""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Section, Table
from stages.figures.style import label
from stages.statistics.wording import count, number


def section(summary: Mapping[str, Any]) -> Section:
    """The base's circuit in better models, and their heads in the base; only for runs that ask this."""
    models = [
        (
            e["model"] if e["source"] else label(e["model"]),
            e["source"] or count(e["seeds"], "seed"),
            *(
                number(e[key], 2)
                for key in ("model_accuracy", "circuit_accuracy", "faithfulness", "random_accuracy", "own_accuracy")
            ),
        )
        for e in summary["table_enhancement"]
    ]
    heads = [
        (
            label(e["arm"]),
            e["group"],
            str(e["seeds"]),
            *(number(e[key], 2) for key in ("base", "transplanted", "random", "tuned")),
        )
        for e in summary["table_enhancing_heads"]
    ]
    return Section(
        "Is the existing mechanism enhanced?",
        (
            "The new task is the old one, and the bases are half-trained: the question of Prakash et al. "
            "If fine-tuning enhances the mechanism that is there, the base's circuit also does the work of the better "
            "model, and the better model's heads, put into the base, lift it, and more than as many random heads do.",
            *summary["enhancement_findings"],
        ),
        tables=(
            Table(
                "Accuracy of whole models, of the base's circuit in place in them with everything else mean-ablated, "
                "of random circuits of the same shape, and of each model's own circuit. Means over seeds. "
                "The published ones are of one model each, with Llama-7B's circuit in Llama-7B and in models that "
                "were tuned from it.",
                ("Model", "Of", "Whole model", "Base's circuit", "Faithfulness", "Random circuits", "Own circuit"),
                models,
                2,
            ),
            Table(
                "Head outputs of the tuned model in the base, by group of the base's circuit: accuracy of the base "
                "alone, with the heads of the group, with as many random heads (of all heads at the same positions), "
                "and of the tuned model alone. Means over those seeds whose circuit has the group.",
                ("Arm", "Group", "Seeds", "Base", "Base with tuned heads", "Random heads", "Tuned model"),
                heads,
                2,
            ),
        ),
    )
