"""Start the cells of a pipeline from a process that has the large packages imported already.

    python -m stages.pipeline.warm_start dvc repro

Importing torch, transformers and TRL takes a small model's cell as long as a third of its work. Here a server imports
them once, and every `python -m stages <stage> ...` under the command asks it for a fork that runs the cell, with the
directory, environment, arguments and streams of who asked. Nothing of this repository is imported before the fork, so
code is as fresh as in a process of its own, and results are the same bytes. The server ends with the command; without
it, cells start by themselves.
"""

import atexit
import json
import os
import runpy
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ADDRESS = "STAGES_WARM_START"  # environment variable: path of the server's socket
PACKAGES = (
    "torch",
    "safetensors.torch",
    "pyarrow.parquet",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
)
_LENGTH, _STATUS = struct.Struct("!Q"), struct.Struct("!i")


def main(command: list[str]) -> int:
    """Run a command beside a server; returns its exit status. Systems other than Linux run it alone."""
    if not hasattr(os, "pidfd_open"):
        return subprocess.call(command)
    folder = Path(tempfile.mkdtemp(prefix="stages-"))
    address = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # who asks while the packages are being imported waits
    server = os.fork()
    if server == 0:
        try:
            _serve(listener)
        finally:
            os._exit(1)
    listener.close()
    try:
        running = subprocess.Popen(command, env=os.environ | {ADDRESS: address})
        while True:
            try:
                return running.wait()
            except KeyboardInterrupt:  # the command got it, too, and says when it is done
                continue
    finally:
        os.kill(server, signal.SIGTERM)
        os.waitpid(server, 0)
        shutil.rmtree(folder)


def ask(address: str, arguments: list[str]) -> int | None:
    """Have the server run a cell; returns its exit status, or None where no server is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the cell gets it, too, and ends with a status
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return None
    request = {"arguments": arguments, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    text = json.dumps(request).encode()
    socket.send_fds(connection, [_LENGTH.pack(len(text))], [0, 1, 2])
    connection.sendall(text)
    reply = _receive(connection, _STATUS.size)
    if reply is None:
        print("error: the process that runs the cell ended without a status", file=sys.stderr)
        return 1
    return int(_STATUS.unpack(reply)[0])


def _serve(listener: socket.socket) -> None:
    """Import the packages, then fork for everyone who asks, until the parent is gone."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system forgets who ended
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for package in PACKAGES:
        __import__(package)
    listener.settimeout(5)
    while os.getppid() == parent:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            listener.close()
            try:
                _attend(connection)
            finally:
                os._exit(1)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Run the cell of one request in a fork and send its exit status; who asked takes the cell along when it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, _LENGTH.size, 3)
    text = _receive(connection, _LENGTH.unpack(head)[0])
    if text is None:
        os._exit(1)
    cell = os.fork()
    if cell == 0:
        connection.close()
        _run(json.loads(text), streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(cell)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.kill(cell, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(cell, 0)[1])
    # a cell that a signal ended has the status that a shell gives it
    connection.sendall(_STATUS.pack(status if status >= 0 else 128 - status))
    os._exit(0)


def _run(request: dict[str, Any], streams: list[int]) -> None:
    """Become the process that was asked for; does not return."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, own in zip(streams, (0, 1, 2), strict=True):
            os.dup2(stream, own)
            os.close(stream)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        stage, *values = request["arguments"]
        sys.argv = [stage, *values]
        sys.path[0] = request["folder"]
        for name in [name for name in sys.modules if name == "stages" or name.startswith("stages.")]:
            del sys.modules[name]
        runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as at the end of an interpreter: ends daemonic processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _receive(connection: socket.socket, size: int) -> bytes | None:
    """So many bytes, or None if the other end closed before."""
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            return None
        found += part
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
