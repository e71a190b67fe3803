"""What a report of a bug needs to say of the machine: ``python -m sasa_det.env``.

Needs torch only; of what else is not installed, it says so.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from sasa_det.ops import available_backends
from sasa_det.ops.native import library

LIBRARIES = ["torch", "torchvision", "detectron2", "fvcore", "pycocotools", "numpy", "PIL"]
LIBRARIES += ["triton", "timm", "natten", "sasa_det"]
# Names, or how they begin, of the environment variables that change what happens.
VARIABLES = ["SASA_DET", "DETECTRON2_DATASETS", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NCCL_"]
VARIABLES += ["GLOO_", "TRITON_", "PYTORCH_", "TORCH_", "MASTER_ADDR", "MASTER_PORT"]
VARIABLES += ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]


def describe(device: str) -> dict[str, Any]:
    """What a measurement was taken on: device, threads, versions and backends."""
    about: dict[str, Any] = {"device": device}
    if device == "cuda":
        about["GPU"] = torch.cuda.get_device_name()
        about["CUDA"] = torch.version.cuda
        about["cuDNN"] = torch.backends.cudnn.version()
    about["CPU"] = cpu_name()
    about["cores"] = num_cores()
    about["threads"] = torch.get_num_threads()
    # Anything else that runs makes every figure worse, and not all by the same factor.
    about["load average at the start"] = round(os.getloadavg()[0], 2)
    about["Python"] = platform.python_version()
    for name in ("torch", "detectron2", "sasa_det", "timm", "natten"):
        about[name] = version(name)
    about.update(_backends())
    return about


def report() -> dict[str, Any]:
    """All that may matter when something goes wrong."""
    about: dict[str, Any] = {"Python": platform.python_version()}
    for name in LIBRARIES:
        about["Pillow" if name == "PIL" else name] = version(name)
    about["detectron2"] += _kind_of_detectron2()
    about["system"] = platform.platform()
    about["CPU"] = cpu_name()
    about["cores"] = num_cores()
    about["threads"] = torch.get_num_threads()
    about["CUDA of torch"] = torch.version.cuda or "none: torch was built for the CPU"
    about["GPUs"] = _gpus() or "none"
    if torch.version.cuda:
        about["cuDNN"] = torch.backends.cudnn.version()
    about.update(_backends())
    if library.unavailable() is None:
        chosen = library.INSTRUCTION_SETS[library.instruction_set()]
        about["backend native"] += f", with {chosen} instructions"
    about["environment"] = _variables() or "none of those that matter"
    return about


def version(name: str) -> str:
    """Of an installed package, by the name that one imports."""
    try:
        # A checkout need not be installed.
        module = __import__(name)
        return str(getattr(module, "__version__", None) or importlib.metadata.version(name))
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return "not installed"


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def num_cores() -> int | None:
    """That this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _kind_of_detectron2() -> str:
    if importlib.util.find_spec("detectron2") is None:
        return ""
    try:
        from sasa_det.compat import has_compiled_operators

        compiled = has_compiled_operators()
    except ImportError as error:
        return f" (does not import: {error})"
    try:
        importlib.metadata.version("detectron2-cdo")
        origin = "detectron2-cdo of PyPI"
    except importlib.metadata.PackageNotFoundError:
        origin = "upstream's"
    return f" ({origin}, {'compiled' if compiled else 'pure Python'})"


def _backends() -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is said here
        backends = available_backends()
    return {f"backend {name}": missing or "available" for name, missing in backends.items()}


def _gpus() -> list[str]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gpus.append(
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB"
        )
    return gpus


def _variables() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith(tuple(VARIABLES)))
    return [f"{name}={os.environ[name]}" for name in names]


def _print(about: dict[str, Any]) -> None:
    width = max(map(len, about)) + 2
    for name, value in about.items():
        text = f"\n{' ' * width}".join(value) if isinstance(value, list) else value
        print(f"{name:<{width}}{text}")


if __name__ == "__main__":
    _print(report())
