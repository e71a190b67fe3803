"""The C kernels read and write nothing outside their buffers, and compute nothing undefined."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
KERNELS = ROOT / "sasa_det" / "ops" / "native" / "csrc"
OUT_OF_BOUNDS = """
import torch
from sasa_det.ops.native import attention
from sasa_det.ops.calls import AttentionCall

maps = [torch.randn(1, 2, 6, 7) for _ in range(3)]
embeddings = [torch.randn(1, 1, 1) for _ in range(2)]  # of one offset, where there are three
attention.forward(AttentionCall(*maps, *embeddings, 1, 3))
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The environment of a package whose kernels check themselves."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    libraries = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("this gcc comes without its sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "sasa_det", folder / "sasa_det")
    name = f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [compiler, "-std=gnu11", "-O1", "-g", "-fopenmp", "-shared", "-fPIC"]
    command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command += [*map(str, sorted(KERNELS.glob("*.c"))), "-lm"]
    command += ["-o", str(folder / "sasa_det" / "ops" / "native" / name)]
    subprocess.run(command, check=True)
    return {
        **os.environ,
        **{"PYTHONPATH": str(folder), "LD_PRELOAD": " ".join(libraries)},
        "ASAN_OPTIONS": "detect_leaks=0",  # of the interpreter's own
    }


def run(sanitized, *arguments):
    folder = sanitized["PYTHONPATH"]  # nowhere else, for Python prefers a package lying there
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=sanitized, capture_output=True, text=True
    )


def test_drawn_calls_stay_within_their_buffers(sanitized):
    names = ("test_fuzz.py", "test_backends.py", "test_residual_projection.py")
    tests = [str(ROOT / "tests" / name) for name in names]
    options = ["-q", "-p", "no:cacheprovider", "-k", "native or fused or residual_projection"]
    done = run(sanitized, "-m", "pytest", *tests, *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def test_a_read_behind_a_buffer_would_be_noticed(sanitized):
    done = run(sanitized, "-c", OUT_OF_BOUNDS)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
