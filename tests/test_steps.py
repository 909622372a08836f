"""What single gradient steps were like, by hand from made-up records."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages.statistics.cells import read_cells
from stages.statistics.steps import table_of_steps
from tests.synthetic_records import Experiment


def test_steps_are_parted_at_the_pick(tmp_path: Path) -> None:
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "grpo", "noise"))
    experiment.write(tmp_path)
    root = tmp_path / "reports/cells"
    found = {entry["arm"]: entry for entry in table_of_steps(root, read_cells(root, (0, 1), experiment.arms), 1.0)}
    assert set(found) == {"sft_gold", "grpo"}
    logs = [pd.read_csv(root / f"steps/grpo/{seed}/0.0003.csv") for seed in (0, 1)]
    means = [log["gradient_norm"][:45].mean() for log in logs]
    assert found["grpo"]["to_pick"]["gradient_norm"] == pytest.approx(np.mean(means))
    clipped = [(log["gradient_norm"][45:] > 1).mean() for log in logs]
    assert found["grpo"]["behind"]["clipped"] == pytest.approx(np.mean(clipped))
    assert found["grpo"]["to_pick"]["reward"] == 0.5 and found["sft_gold"]["to_pick"]["reward"] is None
    assert found["sft_gold"]["behind"]["entropy"] > 1


def test_records_from_before_there_were_such(tmp_path: Path) -> None:
    experiment = Experiment(seeds=(0,), arms=("sft_gold", "grpo"))
    experiment.write(tmp_path)
    root = tmp_path / "reports/cells"
    for file in root.glob("steps/*/*/*.csv"):
        file.unlink()
    assert table_of_steps(root, read_cells(root, (0,), experiment.arms), 1.0) == []
