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
from typing import Any

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


class Command:
    """A command that runs: ``python ARGUMENTS`` in ``folder``; see :func:`run_tool`."""

    def __init__(
        self,
        *arguments: object,
        environment: dict | None = None,
        folder: Path = ROOT,
        largest_file: int = resource.RLIM_INFINITY,
    ) -> None:
        self._files = tempfile.TemporaryDirectory()
        variables = {**os.environ, **(environment or {})}
        words = [str(x) for x in arguments]
        self._process = _server.Process(
            target=_run,
            args=(words, variables, str(folder), Path(self._files.name), largest_file),
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.is_alive()

    def join(self, seconds: float) -> None:
        """Waits no longer than that."""
        self._process.join(seconds)

    def wait(self) -> Run:
        self._process.join()
        with self._files as name:
            out, err, peak = (Path(name) / file for file in ("stdout", "stderr", "peak"))
            return Run(
                self._process.exitcode,
                out.read_text() if out.exists() else "",
                err.read_text() if err.exists() else "",
                int(peak.read_text()) if peak.exists() else 0,
            )


def run_tool(*arguments: object, **options: Any) -> Run:
    """Runs ``python ARGUMENTS`` to the end.

    Args:
        environment (dict): on top of what there is.
        folder (Path): to run in; that of the project, if not given.
        largest_file (int): in bytes, that it can write, as if the disk were full then.
    """
    return Command(*arguments, **options).wait()


def _run(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    files: Path,
    largest_file: int,
) -> None:
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(os.open(files / ("stdout", "stderr")[number - 1], os.O_CREAT | os.O_WRONLY), number)
        stream.reconfigure(line_buffering=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    module = arguments[0] == "-m"
    sys.argv = arguments[1:] if module else arguments
    # The platform's own way to start processes, not that of the server's.
    multiprocessing.set_start_method(None, force=True)
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
