"""What an arm is: one file that is found by being there, with its settings beside its training."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.pipeline.params import Params, load_params
from stages.pipeline.params.fields import Section
from stages.pipeline.params.finetuning import Imported, trained_arms
from stages.pipeline.stage import Invalid
from tests.conftest import REPOSITORY

PARAMS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
OWN_ARM = '''
"""Supervised on the last valid answer of each prompt."""

from typing import TYPE_CHECKING

from stages.pipeline.params.fields import Fraction, Section

if TYPE_CHECKING:
    from stages.learning.run import Run


class Settings(Section):
    share: Fraction


def train(run: "Run") -> None:
    from stages.learning import supervised

    supervised.fit(run, run.train.valid.amax(1))
'''
LOAD = """
from pathlib import Path
from stages.pipeline.overrides import compose, preset_names
from stages.pipeline.params import load_params
for name in preset_names():
    compose(Path("params.yaml"), Path("preset.yaml"), Path(f"stages/presets/{name}.yaml"), [])
    assert "last_valid" not in load_params("preset.yaml").finetune.arms
assert "last_valid" not in load_params("params.yaml").finetune.arms
print(load_params("asked.yaml").finetune.of("last_valid").share)
"""
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "pandas", "safetensors")


def read(path: Path, **sections: Any) -> Params:
    path.write_text(yaml.safe_dump(PARAMS | sections))
    return load_params(path)


def finetune(**arms: Any) -> dict[str, Any]:
    return PARAMS["finetune"] | arms


def changed(arm: str, **settings: Any) -> dict[str, Any]:
    return {"finetune": finetune(**{arm: PARAMS["finetune"][arm] | settings})}


@pytest.mark.parametrize("arm", trained_arms())
def test_every_arm_has_settings_and_training(arm: str) -> None:
    module = importlib.import_module(f"stages.learning.arms.{arm}")
    assert issubclass(module.Settings, Section) and callable(module.train) and module.__doc__
    assert set(module.Settings.model_fields) == set(PARAMS["finetune"][arm])


def test_a_new_arm_is_one_file_and_breaks_no_params_file(tmp_path: Path) -> None:
    """In a copy of the package: one more arm, which only one params file knows."""
    shutil.copytree(REPOSITORY / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stages/learning/arms/last_valid.py").write_text(OWN_ARM)
    asked = PARAMS | {"finetune": finetune(last_valid={"share": 0.5})}
    asked |= {"arms": [*PARAMS["arms"], "last_valid"]}
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(asked))
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    command = [sys.executable, "-c", LOAD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0.5\n"


def test_reading_params_loads_nothing_heavy() -> None:
    code = "import sys; from stages.pipeline.params import load_params; load_params('params.yaml'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {f"stages.learning.arms.{arm}" for arm in trained_arms()} <= loaded
    assert not loaded & set(HEAVY)


def test_an_arm_that_nobody_asks_for_needs_no_section(tmp_path: Path) -> None:
    without = {name: section for name, section in PARAMS["finetune"].items() if name not in ("rloo", "joint")}
    assert "rloo" not in read(tmp_path / "p.yaml", finetune=without).finetune.arms


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"finetune": finetune(ppo={})}, "finetune: there is no arm 'ppo': must be one of .*sft_replay, or a model"),
        ({"finetune": finetune(copy={})}, "finetune: an arm cannot be named 'copy'"),
        (
            {"finetune": finetune(dr_grpo={"samples_per_prompt": 8, "temperature": 1.0})},
            "finetune.dr_grpo.num_iterations is missing",
        ),
        (
            changed("dr_grpo", loss_type="cispo"),
            "finetune.dr_grpo.loss_type = 'cispo': must be 'dr_grpo', 'bnpo' or 'dapo'",
        ),
        (changed("grpo", loss_type="sapo"), "grpo.loss_type = 'sapo': must be 'grpo', 'dr_grpo', 'bnpo' or 'dapo'"),
        (changed("dr_grpo_kl", scale_rewards="group"), "finetune.dr_grpo_kl.scale_rewards = 'group': must be 'none'"),
        (changed("grpo", scale_rewards="none"), "finetune.grpo.scale_rewards = 'none': must be 'group' or 'batch'"),
        (changed("grpo", scale_rewards=True), "finetune.grpo.scale_rewards = True: must be 'group' or 'batch'"),
        (changed("rloo", scale_rewards="group"), "finetune.rloo.scale_rewards is not a known parameter"),
        (changed("reinforce", num_iterations=0), "finetune.reinforce.num_iterations = 0: must be greater than or eq"),
        (changed("random_reward", epsilon=0.0), "finetune.random_reward.epsilon = 0.0: must be greater than 0"),
        ({"finetune": finetune(sft_gold={"beta": 1.0})}, "finetune.sft_gold.beta is not a known parameter"),
        ({"finetune": finetune(theirs={"import": "a/b"})}, "finetune.theirs.adapter is missing"),
        ({"finetune": {"common": PARAMS["finetune"]["common"]}}, "finetune.sft_gold is missing: must be there"),
        ({"arms": [*PARAMS["arms"], "runs"]}, "arms: 'runs' must .* be none of base, source, runs, matched"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:40],
)
def test_a_bad_section_of_an_arm_is_one_sentence(tmp_path: Path, sections: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Invalid, match=sentence) as caught:
        read(tmp_path / "p.yaml", **sections)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_tuned_elsewhere_is_an_arm_of_any_name(tmp_path: Path) -> None:
    section = {"import": "owner/name", "adapter": "owner/adapter", "revision": None}
    params = read(tmp_path / "p.yaml", finetune=finetune(goat_7b=section), arms=[*PARAMS["arms"], "goat_7b"])
    found = params.finetune.of("goat_7b")
    assert isinstance(found, Imported)
    assert (found.model, found.adapter, found.revision) == ("owner/name", "owner/adapter", None)
