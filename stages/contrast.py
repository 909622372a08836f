"""Stage `contrast`: compare the arms, paired over seeds.

reads  reports/cells/** (records and curves), exactly the cells that seeds and arms name; data/old_task.json;
       reports/registered, the experiments that were registered
writes reports/statistics.json   measures by arm, contrasts, reach rates, adjustment for distance, similarity of
                                 circuits, the same at every matching, under every other choice (`specification`),
                                 hypervolumes of the trade-off; whether all of it was registered
       reports/cells.csv         every scalar of every record, long form
"""

from collections.abc import Sequence
from pathlib import Path

from stages.pipeline.files import read_json, write_csv, write_json
from stages.pipeline.stage import PARAMS_FILE, Cell, Invalid, run
from stages.statistics.adjustment import Adjustment, adjust
from stages.statistics.cells import long_form, read_cells
from stages.statistics.contrasts import Plan, compare, left_out_bases
from stages.statistics.frames import training_curves
from stages.statistics.hypervolume import compare_hypervolumes
from stages.statistics.matchings import compare_matchings
from stages.statistics.registration import read_params, standing
from stages.statistics.similarity import compare_circuits
from stages.statistics.specification import specifications
from stages.statistics.steps import table_of_steps

CELLS = Path("reports/cells")


def _of_arms(pairs: Sequence[Sequence[str]], arms: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The pairs of arms that both take part, so that fewer arms need no other change of the params."""
    return tuple((arm, reference) for arm, reference in pairs if {arm, reference} <= set(arms))


def main(cell: Cell) -> None:
    section = cell.params("contrast")
    cells = read_cells(CELLS, cell.params("seeds"), cell.params("arms"))
    frame = long_form(cells)
    undefined = frame["value"].isna()
    full_names = frame["stage"] + "." + frame["measure"]
    known, empty = set(full_names), tuple(set(full_names[undefined] + "."))
    asked = (section.adjust_for, section.forgetting, *section.predictors)
    for measure in (section.primary_measure, *section.secondary_measures, *asked):
        if measure not in known and not measure.startswith(empty):
            raise Invalid(f"contrast measure '{measure}': no record has it; reports/cells.csv lists stage and measure")
    plan = Plan(
        primary=section.primary_measure,
        secondary=tuple(section.secondary_measures),
        base_faithfulness=section.base_faithfulness,
        contrasts=_of_arms(section.contrasts, cells.arms),
        described=_of_arms(section.described, cells.arms),
        controls=_of_arms(section.controls, cells.arms),
        confidence=section.confidence,
        alpha=section.alpha,
        power=section.power,
        equivalence_margin=section.equivalence_margin,
        resamples=section.resamples,
        seed=section.seed,
    )
    write_csv("reports/cells.csv", frame)
    adjustment = Adjustment(
        outcome=plan.primary,
        distance=section.adjust_for,
        families=section.families,
        contrasts=plan.contrasts + plan.described + plan.controls,
        forgetting=section.forgetting,
        predictors=section.predictors,
        confidence=plan.confidence,
    )
    left_out = left_out_bases(cells, plan)
    curves = training_curves(CELLS, cells, cell.params("learning_rates"))
    adjusted = adjust(cells, adjustment, left_out)
    tasks = {"old_task": read_json("data/old_task.json"), "new_task": cell.params("new_task")}
    statistics = tasks | compare(cells, plan) | {"adjustment": adjusted}
    statistics["similarity"] = compare_circuits(cells, plan, CELLS)
    statistics["matchings"] = compare_matchings(cells, plan)
    statistics["specification"] = specifications(cells, plan)
    statistics["steps"] = table_of_steps(CELLS, cells, cell.params("finetune.common.clip"))
    statistics["registration"] = standing(read_params(PARAMS_FILE))
    statistics["hypervolume"] = compare_hypervolumes(curves, plan, [s for s in cells.seeds if s not in left_out])
    write_json("reports/statistics.json", statistics)


if __name__ == "__main__":
    run("contrast", (), main)
