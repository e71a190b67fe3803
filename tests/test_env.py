"""``python -m sasa_det.env``: what a report of a bug needs, on whatever is installed."""

import os
import re
import subprocess
import sys

import torch
from conftest import ROOT

from sasa_det.compat import has_compiled_operators
from sasa_det.ops import available_backends

WITHOUT = """
import runpy, sys
for name in ("detectron2", "fvcore", "torchvision", "numpy", "PIL", "pycocotools", "yaml"):
    sys.modules[name] = None  # as if it were not installed
runpy.run_module("sasa_det.env", run_name="__main__")
"""


def run(*arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "ignore", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_names_versions_backends_and_variables():
    lines = run("-m", "sasa_det.env", SASA_DET_BACKEND="eager").splitlines()
    about = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert about["torch"] == torch.__version__
    kind = "compiled" if has_compiled_operators() else "pure Python"
    assert about["detectron2"].endswith(f"{kind})")
    for name, missing in available_backends().items():
        assert about[f"backend {name}"].startswith(missing or "available")
    assert "SASA_DET_BACKEND=eager" in "\n".join(lines)


def test_it_needs_torch_only():
    output = run("-c", WITHOUT)
    lines = [line.split(maxsplit=1) for line in output.splitlines()]
    for name in ("detectron2", "fvcore", "torchvision", "numpy", "Pillow", "pycocotools"):
        assert [name, "not installed"] in lines
    assert torch.__version__ in output
