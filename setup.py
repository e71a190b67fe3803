"""Packaging; tool settings are in pyproject.toml, the pinned environment in requirements.txt."""

import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "sasa_det/__init__.py").read_text())[1]
# Apple's compiler comes without OpenMP; the kernels then run in one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
KERNELS = Path("sasa_det/ops/native/csrc")

setup(
    name="sasa_det",
    version=VERSION,
    description="Stand-alone self-attention instead of convolution, for detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["sasa_det", "sasa_det.*"]),
    # Not a Python module: plain C that ctypes loads. Optional, because without a compiler the
    # package works too, on its eager path.
    ext_modules=[
        Extension(
            "sasa_det.ops.native._kernels",
            sources=[str(path) for path in sorted(KERNELS.glob("*.c"))],
            depends=[str(path) for path in sorted(KERNELS.glob("*.h"))],
            extra_compile_args=["-std=gnu11", "-O3", "-fvisibility=hidden", *OPENMP],
            extra_link_args=["-lm", *OPENMP],
            optional=True,
        )
    ],
    python_requires=">=3.10",
    # detectron2 itself is not on PyPI under its name: README, "Install".
    install_requires=["torch>=2.8"],
    extras_require={
        "detection": ["torchvision>=0.21", "pycocotools>=2.0.6", "fvcore>=0.1.5,<0.1.6"],
        # detectron2's drawing of predictions needs OpenCV.
        "demo": ["opencv-python-headless>=4.8", "scikit-learn>=1.3", "matplotlib>=3.6"],
        # What tools/benchmark.py compares with and draws with; it does without what is absent.
        "benchmark": ["matplotlib>=3.6", "timm>=1.0"],
        # Another format for weights.
        "safetensors": ["safetensors>=0.4"],
        # What tools/export_model.py writes ONNX files with, and runs them.
        "deployment": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
