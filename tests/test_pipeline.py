"""dvc.yaml against the code, and params.yaml against what it may say."""

import ast
import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.pipeline.dependencies import ARMS, PINS, VALIDATION_ONLY, code_of, manifests
from stages.pipeline.params import load_params
from stages.pipeline.stage import Invalid
from tests.conftest import REPOSITORY, Dvc

PIPELINE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
STAGES = (
    "code source synthesize pretrain finetune match discover evaluate matchings dcm cmap drift contrast report".split()
)
OF_BASE = {f"{stage}_base": stage for stage in ("discover", "evaluate", "dcm")}  # which have no axis of models


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_pipeline_has_the_stages_of_the_design() -> None:
    assert [name for name in PIPELINE if name not in OF_BASE] == STAGES


@pytest.mark.parametrize(("name", "stage"), OF_BASE.items())
def test_the_base_goes_through_the_stages_of_the_models(name: str, stage: str) -> None:
    text = json.dumps(PIPELINE[stage]).replace("${item.model}", "base")
    entry = json.loads(text)
    del entry["matrix"]["model"]
    entry["deps"] = list(dict.fromkeys(entry["deps"]))  # `evaluate` needs the circuits of the base and of the model
    own = PIPELINE[name] | {"desc": entry["desc"]}
    if stage == "discover":  # of the base alone, whose circuit says what it does without
        more = {"deps": ["data/old/means.parquet", "data/old/pruning.parquet"]}
        more |= {"params": [f"evaluate.{key}" for key in ("clauses", "score", "idle_tolerance")]}
        own |= {key: [value for value in own[key] if value not in more[key]] for key in more}
    assert own == entry


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_described_and_cacheable(stage: str) -> None:
    entry = PIPELINE[stage]
    assert entry["desc"]
    assert entry["cmd"].startswith(f"python -m stages {stage}")
    assert "always_changed" not in entry
    for out in entry.get("outs", []) + entry.get("plots", []):
        settings = next(iter(out.values())) if isinstance(out, dict) else {}
        assert not settings.get("persist"), "persist switches the run cache off"
        assert settings.get("cache", True) or stage in ("contrast", "report"), "uncached outs switch the run cache off"


def test_every_stage_depends_on_the_digests_of_what_it_runs() -> None:
    for stage in STAGES[1:]:
        name = "finetune/${item.arm}" if stage == "finetune" else stage
        assert f"data/code/{name}.json" in PIPELINE[stage]["deps"]
        others = [dep for dep in PIPELINE[stage]["deps"] if dep.startswith(("stages/", "requirements"))]
        assert not others, "covered by the digests"


def test_stage_code_depends_on_every_file_that_enters_a_digest() -> None:
    listed = PIPELINE["code"]["deps"]
    files = {path for digests in manifests(STAGES[1:]).values() for path in digests} | set(code_of("code"))
    assert not [path for path in files if not any(path == dep or path.startswith(f"{dep}/") for dep in listed)]
    assert all((REPOSITORY / dep).exists() for dep in listed)


def test_what_a_stage_runs_is_found() -> None:
    assert "stages/pipeline/files.py" in code_of("match"), "an import inside a function counts"
    assert "stages/figures/templates/report.html.jinja" in code_of("report")
    found = manifests(STAGES[1:])
    arms = {path.stem for path in (REPOSITORY / ARMS).glob("*.py")} - {"__init__"}
    assert set(found) == {*STAGES[1:], *(f"finetune/{arm}" for arm in arms)} - {"finetune"}
    for arm in arms:
        assert [path for path in found[f"finetune/{arm}"] if path.startswith(ARMS)] == [f"{ARMS}/{arm}.py"]


def test_what_can_only_refuse_a_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (REPOSITORY / VALIDATION_ONLY / "__init__.py").exists()
    code = {path for digests in manifests(STAGES[1:]).values() for path in digests}
    assert not [path for path in code if path.startswith(VALIDATION_ONLY)]

    (tmp_path / VALIDATION_ONLY).mkdir(parents=True)
    for name in ("reading", "checks"):
        (tmp_path / VALIDATION_ONLY / f"{name}.py").touch()
    (tmp_path / "stages/match.py").write_text(
        "import stages.pipeline.params.checks\nfrom stages.pipeline.params import reading\n"
    )
    monkeypatch.chdir(tmp_path)
    assert code_of("match") == ["stages/match.py", *PINS], "each of its modules, also where one is imported by itself"


LOADED = """
import os, sys, torch, transformers, pandas  # once for all; each stage is then imported in a process of its own
for stage in sys.argv[1:]:
    if os.fork() == 0:
        __import__(f"stages.{stage}")
        print(stage, *(name for name in sys.modules if name.startswith("stages.")), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, stage
"""


def test_every_module_that_is_loaded_is_in_the_digests() -> None:
    """The imports that are followed in the text are at least those that Python makes."""
    command = [sys.executable, "-c", LOADED, *STAGES[1:]]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == STAGES[1:]
    for line in lines:
        stage, *names = line.split()
        files = {f"{name.replace('.', '/')}.py" for name in names}
        assert f"stages/{stage}.py" in files
        assert {file for file in files if (REPOSITORY / file).exists()} <= set(code_of(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_params_read_are_the_declared_ones(stage: str) -> None:
    """Every cell.params("...") of a stage module is declared, and everything declared is read."""
    read: set[str] = set()
    for node in ast.walk(ast.parse((REPOSITORY / "stages" / f"{stage}.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "params":
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                read.add(str(argument.value))
            elif isinstance(argument, ast.JoinedStr):
                read.add(re.sub(r"\{[^}]*\}", "${item.arm}", ast.unparse(argument)[2:-1]))
    of_base = PIPELINE.get(f"{stage}_base", {}).get("params", [])
    declared = {str(path) for path in [*PIPELINE[stage].get("params", []), *of_base]}
    if stage == "discover":  # reads several by one name
        read = {path for path in read if path != "evaluate.${item.arm}"}
        read |= {f"evaluate.{key}" for key in ("clauses", "score", "idle_tolerance")}
    undeclared = {path for path in read if not any(path == d or path.startswith(d + ".") for d in declared)}
    unread = {path for path in declared if not any(path == r or r.startswith(path + ".") for r in read)}
    if stage == "contrast":  # compares the whole file with registered ones
        unread -= set(PARAMS) - {"report"}
    assert not undeclared and not unread


def test_heavy_outputs_are_ignored_by_git_from_the_start() -> None:
    """Otherwise DVC writes nested .gitignore files, whose line order enters directory hashes."""
    for path in ("data/old/x", "models/base/0/x", "reports/cells/evaluate/base/0.json"):
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=REPOSITORY).returncode == 0, path
    for path in ("reports/report.html", "reports/summary.json", "reports/figures/x.png", "dvc.lock"):
        assert subprocess.run(["git", "check-ignore", "-q", path], cwd=REPOSITORY).returncode == 1, path


def test_matrix_cells_do_not_collide(dvc: Dvc) -> None:
    listed = dvc(REPOSITORY, "stage", "list", "--name-only")
    assert listed.returncode == 0, listed.stderr
    names = listed.stdout.split()
    arms, seeds, rates = (len(PARAMS[axis]) for axis in ("arms", "seeds", "learning_rates"))
    # pretrain; discover, evaluate, dcm of the base; these and four more of each arm, and its runs
    per_seed = 1 + 3 + (7 + rates) * arms
    assert len(names) == len(set(names)) == 5 + per_seed * seeds


def _changed(path: str, value: Any) -> dict[str, Any]:
    params = copy.deepcopy(PARAMS)
    *parents, last = path.split(".")
    section = params
    for key in parents:
        section = section[key]
    section[last] = value
    return params


BAD = [
    ("finetune.dr_grpo.bta", 0.1, "finetune.dr_grpo.bta"),
    ("unknown_section", {}, "unknown_section"),
    ("pretrain.model.layers", "six", "pretrain.model.layers"),
    ("seeds", [0, 0], "seeds"),
    ("seeds", [], "seeds"),
    ("arms", ["sft-gold"], "sft-gold"),
    ("arms", ["sft_gold", "ppo"], "ppo"),
    ("models", ["base", "dr_grpo"], "models is not a known parameter"),
    ("new_task", "juggling", "juggling"),
    ("old_task", "juggling", "old_task = 'juggling': must be one of boxes"),
    ("synthesize.boxes", 27, "synthesize.boxes"),
    ("synthesize.boxes", 26, "synthesize.boxes"),
    ("synthesize.boxes", 2, "synthesize.boxes"),
    ("match.level", 1.2, "match.level"),
    ("match.level", 0.1, "match.level"),
    ("match.level", 0.85, "match.levels"),
    ("match.levels", [0.1, 0.95], "match.levels: 0.1"),
    ("match.levels", [], "match.levels"),
    ("match.levels", [0.9, 0.95, 0.9], "match.levels"),
    ("match.kl", [0.0], "match.kl"),
    ("match.norm", [], "match.norm"),
    ("match.learning_rate", 0.77, "match.learning_rate = 0.77: must be one of learning_rates, 0.0003"),
    ("learning_rates", [], "learning_rates is empty: must name at least one"),
    ("learning_rates", [0.001, 1e-3], "learning_rates = [0.001, 0.001]: must not name anything twice"),
    ("learning_rates", [0.001, 1], "learning_rates.1: 1: must be written 1.0, as folders and cells have it"),
    ("learning_rates", ["0.001"], "learning_rates.0 = '0.001': must be valid number"),
    ("learning_rates", [0.0], "learning_rates.0 = 0.0: must be greater than 0"),
    ("learning_rates", [float("inf")], "learning_rates.0 = inf: must be finite number"),
    ("finetune.common.learning_rates", [0.001], "finetune.common.learning_rates is not a known parameter"),
    ("match.like", "ppo", "match.like"),
    ("match.like", "noise", "match.like"),
    ("match.shams", ["ppo"], "match.shams"),
    ("match.shams", [], "must name 'noise'"),
    ("contrast.contrasts", [["dr_grpo", "ppo"]], "ppo"),
    (
        "contrast.contrasts",
        [["rloo", "joint"], ["dr_grpo", "rloo"]],
        "must compare two of the arms, sft_gold, self_sft",
    ),
    ("contrast.base_faithfulness", 1.1, "contrast.base_faithfulness"),
    ("pretrain.settle", -1, "pretrain.settle"),
    ("pretrain.curriculum.settle", PARAMS["pretrain"]["curriculum"]["final"], "no phase may be named 'settle'"),
    ("pretrain.stop_at", 0.0, "pretrain.stop_at"),
    ("pretrain.stop_at", 1.5, "pretrain.stop_at"),
    ("pretrain", PARAMS["pretrain"] | {"stop_at": 0.66, "settle": 400}, "settle = 400: must be 0 with stop_at"),
    ("pretrain.curriculum.final.tasks", {"lacks": {"share": 0.1, "own": 0.4}}, "'adjacent': must be a task of"),
    ("source.kind", "hub", "source: model = None: must be a folder or the id of a model on the hub with kind: hub"),
    ("source.model", "owner/name", "source: model = owner/name: must be"),
    ("source.adapter", "owner/name", "revision and adapter belong to a model with kind: hub"),
    ("teach", {"level": 0.8}, "teach.most_steps is missing"),
    ("dcm.desiderata", [], "dcm.desiderata"),
    ("dcm.desiderata", ["positional", "positional"], "must not name a value twice"),
    ("dcm.of_base", ["positional-loudly"], "'positional-loudly': must be one of positional, object_value"),
    ("cmap.inputs", ["q", "z"], "cmap.inputs.1 = 'z': must be 'q', 'k' or 'v'"),
    ("cmap.inputs", ["v", "v"], "must not name a value twice"),
    ("cmap.inputs", "q", "cmap.inputs"),
    ("new_task", "contains", "pretrain.stop_at = null: must be below match.level = 0.95"),
    ("pretrain.curriculum.final.tasks", {"contains": {"share": 0.1, "own": 0.4}}, "'contains': must be one of"),
    ("contrast.base_faithfulness", -0.1, "contrast.base_faithfulness"),
    ("contrast.primary_measure", "evaluate.circuit.retentoin", "a measure such as 'evaluate.circuit.retention'"),
    ("evaluate.score", "logit", "evaluate.score = 'logit': must be 'accuracy', 'candidate_accuracy', 'logit_diff"),
    (
        "contrast.primary_measure",
        "evaluate.circuit_by_ablation.resampled.retention_ld",
        "evaluate.score = accuracy: must be logit_difference, the score of contrast.primary_measure = evaluate",
    ),
    ("contrast.secondary_measures", ["drift.kl"], "secondary_measures.0: 'drift.kl': no record has it"),
    (
        "contrast.predictors",
        ["drift.old.kl", "evaluate.old"],
        "contrast.predictors.1: 'evaluate.old': no record has it",
    ),
    ("contrast.forgetting", "pretrain.accuracy", "contrast.forgetting"),
    ("contrast.adjust_for", "", "contrast.adjust_for"),
]


@pytest.mark.parametrize(("path", "value", "named"), BAD, ids=[f"{path}={value}" for path, value, _ in BAD])
def test_bad_params_end_in_one_clear_sentence(tmp_path: Path, path: str, value: Any, named: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(_changed(path, value)))
    with pytest.raises(Invalid) as caught:
        load_params(file)
    message = str(caught.value)
    assert named in message and "\n" not in message
    assert len(message) < 300


def test_limits_and_names_in_the_params_are_those_of_the_tasks() -> None:
    """The params know nothing of the task modules, so that refusing a value is quick; here they are compared."""
    from stages.circuits.circuit import Component
    from stages.pipeline import params
    from stages.statistics.inputs import INPUTS
    from stages.tasks.desiderata import LEAST_BOXES
    from stages.tasks.new_tasks import NEW_TASKS
    from stages.tasks.old_tasks import old_tasks
    from stages.tasks.vocabulary import LABELS, OBJECTS

    pretrained_alone = {"sums", "repeats"} | {task.same_as for task in old_tasks().values()}
    assert set(params.LEARNED_LATE) == set(NEW_TASKS) - pretrained_alone
    assert params.MOST_BOXES == len(LABELS) - 1 and 2 * params.MOST_BOXES <= len(OBJECTS)
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        params.Synthesize.model_validate(PARAMS["synthesize"] | {"boxes": LEAST_BOXES - 1})
    params.Synthesize.model_validate(PARAMS["synthesize"] | {"boxes": LEAST_BOXES})
    assert tuple(params.Cmap.model_validate(PARAMS["cmap"] | {"inputs": list(INPUTS)}).inputs) == tuple(Component)
    assert params.Cmap.model_validate(PARAMS["cmap"] | {"inputs": []}).inputs == ()


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    params = copy.deepcopy(PARAMS)
    del params["match"]["level"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(Invalid, match=r"match\.level"):
        load_params(tmp_path / "params.yaml")


def test_a_stage_stops_before_any_work_on_bad_params(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(_changed("match.level", 2.0)))
    (tmp_path / "dvc.yaml").write_text((REPOSITORY / "dvc.yaml").read_text())
    result = subprocess.run(
        [sys.executable, "-m", "stages.synthesize"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "match.level" in result.stderr
    assert not (tmp_path / "data").exists()


def test_an_axis_value_that_is_not_in_the_params_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "stages.match", "ppo", "0"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 2 and "arm = 'ppo'" in result.stderr


def test_pins_agree() -> None:
    pins = dict(line.split("==") for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if "==" in line)
    for line in (REPOSITORY / "requirements-compute.txt").read_text().splitlines():
        if "==" in line:
            name, version = line.split("==")
            assert pins[name] == version


def test_installed_packages_are_the_pinned_ones() -> None:
    from importlib.metadata import version

    for line in (REPOSITORY / "requirements-compute.txt").read_text().splitlines():
        if "==" in line:
            name, pinned = line.split("==")
            assert version(name) == pinned


def test_committed_lock_matches_the_pipeline(dvc: Dvc) -> None:
    """dvc.lock describes the committed report: no stage of the default run may be stale, none left over."""
    locked = set(yaml.safe_load((REPOSITORY / "dvc.lock").read_text())["stages"])
    listed = set(dvc(REPOSITORY, "stage", "list", "--name-only").stdout.split())
    assert locked == listed


def test_committed_report_is_not_stale(tmp_path: Path, dvc: Dvc) -> None:
    """In a clone all data are absent, and nothing else may differ from what the committed run has recorded.

    Stage `code` itself may be older: an edit that no stage runs changes none of its outputs.
    """
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "stages.code"], cwd=clone, check=True)
    status = dvc(clone, "status", "--json")
    assert status.returncode == 0, status.stderr
    stale = {
        f"{stage}: {path} {what}"
        for stage, reasons in json.loads(status.stdout).items()
        if stage != "code"
        for reason in reasons
        for path, what in _leaves(reason)
        if what not in ("deleted", "not in cache")
    }
    assert not stale, "\n".join(sorted(stale)[:10])


def _leaves(reason: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(reason, dict):
        for key, part in reason.items():
            yield from _leaves(part, f"{path} {key}".strip())
    else:
        yield path, str(reason)
