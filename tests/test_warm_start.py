"""Cells that start as forks of a process with the packages: the same streams, status, directory and results."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="cells start by themselves on this system")
STAGE = """
import os, sys
print(os.getcwd(), os.environ["MARK"], sys.argv[1:], "torch" in sys.modules, sys.stdin.read(), __name__)
print("to stderr", file=sys.stderr)
sys.exit({"three": 3, "text": "a sentence", "none": None}[sys.argv[1]])
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with stages of its own."""
    (tmp_path / "stages").mkdir()
    shutil.copy(REPOSITORY / "stages/__main__.py", tmp_path / "stages")
    shutil.copytree(REPOSITORY / "stages/pipeline", tmp_path / "stages/pipeline")
    (tmp_path / "stages/__init__.py").touch()
    (tmp_path / "stages/speaks.py").write_text(STAGE)
    (tmp_path / "stages/waits.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(100)\n"
    )
    (tmp_path / "stages/fails.py").write_text("raise RuntimeError('of this')\n")
    return tmp_path


def _start(place: Path, command: str, warm: bool) -> subprocess.Popen[str]:
    """The command in a shell, with or without a server beside it."""
    around = [sys.executable, "-m", "stages.pipeline.warm_start"] if warm else []
    return subprocess.Popen(
        [*around, "sh", "-c", command],
        cwd=place,
        env=os.environ | {"MARK": "of the environment"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _python(arguments: str) -> str:
    return f"{sys.executable} -m stages {arguments}"


def test_a_warm_start_behaves_like_a_cold_one(place: Path) -> None:
    """One server for many cells: streams, status, directory, environment, arguments; code as it is now."""
    stages = ("speaks three", "speaks text", "speaks none", "fails", "missing")
    commands = [f"echo given | {_python(stage)}; echo status $?" for stage in stages]
    commands.insert(1, "sed -i s/given/changed/ stages/speaks.py; mkdir -p below/stages")
    found = {}
    for warm in (False, True):
        process = _start(place, "; ".join(commands), warm)
        out, errors = process.communicate()
        assert process.returncode == 0
        found[warm] = out, [line for line in errors.splitlines() if not line.startswith(("Traceback", "  "))]
        print(out, errors)
    assert found[True][0].replace("True", "False") == found[False][0]
    assert found[True][0].count("True") == 3 and found[False][0].count("True") == 0  # has torch before it asks for it
    assert "status 3" in found[True][0] and found[True][0].count("status 1") == 3
    errors = found[True][1]
    assert errors.count("to stderr") == 3 and "a sentence" in errors and "RuntimeError: of this" in errors


def test_the_status_of_the_command_is_that_of_the_whole(place: Path) -> None:
    process = _start(place, "exit 7", warm=True)
    process.communicate()
    assert process.returncode == 7


def test_a_cell_ends_with_who_asked_and_the_server_with_its_command(place: Path) -> None:
    process = _start(place, f"{_python('waits')} & echo $!; wait; echo over", warm=True)
    assert process.stdout is not None
    asker = int(process.stdout.readline())
    cell = _pid_of_the_cell(place)
    server = {int(line) for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}
    assert cell != asker and _runs(cell)
    os.kill(asker, signal.SIGTERM)
    assert "over" in process.communicate()[0]
    for pid in (cell, *server):
        for _ in range(100):
            if not _runs(pid):
                break
            time.sleep(0.05)
        assert not _runs(pid), pid


def test_ctrl_c_ends_the_cell_with_its_status(place: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.pipeline.warm_start", sys.executable, "-m", "stages", "waits"],
        cwd=place,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    _pid_of_the_cell(place)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_without_a_server_behind_the_address_a_cell_starts_by_itself(place: Path) -> None:
    environment = os.environ | {"STAGES_WARM_START": str(place / "nothing"), "MARK": ""}
    command = [sys.executable, "-m", "stages", "speaks", "three"]
    found = subprocess.run(command, cwd=place, env=environment, input="", text=True, capture_output=True)
    assert found.returncode == 3 and "['three'] False" in found.stdout


def _pid_of_the_cell(place: Path) -> int:
    """Waits until the cell says it."""
    while not (place / "pid").is_file() or not (place / "pid").read_text():
        time.sleep(0.05)
    return int((place / "pid").read_text())


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
