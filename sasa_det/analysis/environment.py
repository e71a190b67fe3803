"""What a measurement was taken on."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from sasa_det.ops import available_backends

LIBRARIES = ("torch", "detectron2", "sasa_det", "timm", "natten")


def describe(device: str) -> dict[str, Any]:
    """Device, threads, versions and backends, by what they are called."""
    about: dict[str, Any] = {"device": device}
    if device == "cuda":
        about["GPU"] = torch.cuda.get_device_name()
        about["CUDA"] = torch.version.cuda
        about["cuDNN"] = torch.backends.cudnn.version()
    about["CPU"] = _cpu_name()
    about["cores"] = len(os.sched_getaffinity(0)) if _has_affinity() else os.cpu_count()
    about["threads"] = torch.get_num_threads()
    # Anything else that runs makes every figure worse, and not all by the same factor.
    about["load average at the start"] = round(os.getloadavg()[0], 2)
    about["Python"] = platform.python_version()
    for name in LIBRARIES:
        about[name] = _version(name)
    for name, missing in available_backends().items():
        about[f"backend {name}"] = missing or "available"
    return about


def _version(name: str) -> str:
    try:
        # A checkout need not be installed.
        module = __import__(name)
        return str(getattr(module, "__version__", None) or importlib.metadata.version(name))
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return "not installed"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.machine()


def _has_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")
