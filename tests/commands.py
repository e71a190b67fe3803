"""Runs the project's tools as a shell would, without each of them importing torch anew.

A server process imports what is slow and has nothing of ours or detectron2's in it, both of which
read the environment when they are imported. Every command is a fork of it.
"""

import multiprocessing
import multiprocessing.forkserver
import os
import resource
import runpy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

_SLOW_IMPORTS = ["torch", "torch._dynamo", "torch.distributed", "torch.utils.tensorboard"]
_SLOW_IMPORTS += ["torchvision", "matplotlib.pyplot", "pycocotools.cocoeval", "scipy", "sklearn"]
_SLOW_IMPORTS += ["fvcore.nn", "fvcore.common.checkpoint", "hydra", "omegaconf", "cloudpickle"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_SLOW_IMPORTS)


def start_server() -> None:
    """Before anybody else: a process has one such server, and what measures memory wants one."""
    multiprocessing.forkserver.ensure_running()


@dataclass
class Run:
    """What is left of a command that has ended; ``peak_memory`` in bytes, its children aside."""

    returncode: int
    stdout: str
    stderr: str
    peak_memory: int


def run_tool(*arguments: object, environment: dict | None = None, folder: Path = ROOT) -> Run:
    """Runs ``python ARGUMENTS`` in ``folder``, with ``environment`` on top of what there is."""
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        variables = {**os.environ, **(environment or {})}
        process = _server.Process(
            target=_run, args=([str(x) for x in arguments], variables, str(folder), files)
        )
        process.start()
        process.join()
        peak = files / "peak"
        return Run(
            process.exitcode,
            (files / "stdout").read_text(),
            (files / "stderr").read_text(),
            int(peak.read_text()) if peak.exists() else 0,
        )


def _run(arguments: list[str], environment: dict[str, str], folder: str, files: Path) -> None:
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(os.open(files / ("stdout", "stderr")[number - 1], os.O_CREAT | os.O_WRONLY), number)
        stream.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    # As the interpreter does it: a script's own folder, or the working directory for a module.
    sys.path[0] = folder if module else str(Path(arguments[0]).resolve().parent)
    try:
        if module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (files / "peak").write_text(str(peak))
