"""What differs between the detectron2 of PyPI and upstream's, and stand-ins for what it lacks.

``detectron2-cdo`` on PyPI is upstream's v0.5 as pure Python: without its compiled extension, and
with names that newer Pillow and NumPy removed. :func:`fill_gaps` puts a stand-in only where
something is missing; an installation that is whole is left untouched.
"""

import gc
import importlib.util
import re
import sys
from types import ModuleType
from typing import Any


class _NotCompiled(ModuleType):
    """In the place of ``detectron2._C``: importable, and clear about what calling it would need."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system and inspect look for
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"detectron2's compiled operator {name!r} is not part of this installation; "
                "install upstream detectron2 from source to use it."
            )

        return missing

    # detectron2's report on the environment asks for these three.
    @staticmethod
    def get_compiler_version() -> str:
        return "none: detectron2 is installed as pure Python"

    @staticmethod
    def get_cuda_version() -> str:
        return "not available"

    @staticmethod
    def has_cuda() -> bool:
        return False


def has_compiled_operators() -> bool:
    """Whether this detectron2 has its compiled extension (its fast COCO evaluation needs it)."""
    module = sys.modules.get("detectron2._C")
    if module is not None:
        return not isinstance(module, _NotCompiled)
    return importlib.util.find_spec("detectron2._C") is not None


def fill_gaps() -> None:
    """Call before the first import of a module of detectron2."""
    import detectron2

    if not has_compiled_operators():
        stand_in = _NotCompiled("detectron2._C")
        sys.modules["detectron2._C"] = stand_in
        detectron2._C = stand_in
        sys.modules["detectron2.evaluation.fast_eval_api"] = _official_evaluation()
    if not _is_at_least_0_6(detectron2.__version__):
        _restore_removed_names()


def create_local_process_group(num_processes: int) -> None:
    """Tells detectron2 which processes share a machine; all of them must call it.

    Args:
        num_processes (int): on each machine.
    """
    import torch.distributed as dist
    from detectron2.utils import comm

    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_processes)
        return
    for first in range(0, comm.get_world_size(), num_processes):
        ranks = range(first, first + num_processes)
        group = dist.new_group(list(ranks))
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def destroy_process_groups() -> None:
    """Ends torch.distributed, and its threads, in this process; detectron2 keeps groups otherwise.

    A thread of Gloo that lets go of a tensor while the interpreter ends aborts the process.
    """
    import torch.distributed as dist
    from detectron2.utils import comm

    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # models and trainers are held by reference cycles, and hold groups
    dist.destroy_process_group()


def _official_evaluation() -> ModuleType:
    """COCO's evaluation for the compiled one, as later versions of detectron2 fall back to it."""
    from pycocotools.cocoeval import COCOeval

    module = ModuleType("detectron2.evaluation.fast_eval_api")
    module.COCOeval_opt = COCOeval  # type: ignore[attr-defined]
    return module


def _is_at_least_0_6(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= (0, 6)


def _restore_removed_names() -> None:
    import numpy as np
    from PIL import Image

    if not hasattr(Image, "LINEAR"):  # removed in Pillow 10
        Image.LINEAR = Image.BILINEAR  # type: ignore[attr-defined]
    for name, builtin in (("bool", bool), ("int", int), ("float", float)):
        if not hasattr(np, name):  # removed in NumPy 1.24
            setattr(np, name, builtin)
