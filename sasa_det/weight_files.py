"""Weights from files of strangers: arrays and tensors are taken out, nothing is executed."""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor

from sasa_det.whole_files import save_whole, whole_file

# torch's own, so that one variable stands for all that unpickles. "1" lets everything through.
TRUST_VARIABLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
SAFETENSORS = ".safetensors"
# As in a .pth file of detectron2: the names are to be matched by their ends.
_HEURISTICS = "matching_heuristics"


class RefusedWeightsError(ValueError):
    """A file of weights holds something else, or is damaged; the message is for the user."""


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, but nothing that a file says is executed; reads .safetensors too.

    Raises:
        RefusedWeightsError: on loading, for a file that would execute something, is damaged or
            holds something else.
    """

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(SAFETENSORS):
            return read_weights(filename)
        # detectron2 loads .pkl with pickle, which executes; what passes here is harmless there.
        if not _is_trusting():
            read_weights(filename)
        with _arrays_allowed():
            content = super()._load_file(filename)
        model_of(content, filename)
        return content


def read_weights(path: str, suffix: str = "") -> dict[str, Any]:
    """What is in a local .pkl, .safetensors or torch file; tensors of torch's are mapped from disk.

    Args:
        path (str): of the file.
        suffix (str): what kind of file it is, by default as its name says.

    Raises:
        RefusedWeightsError: if it holds more than plain containers, arrays and tensors, with the
            way to load it all the same; if it cannot be read; or if it holds no names.
        OSError: if the file cannot be opened.
    """
    content = _read(path, suffix or Path(path).suffix)
    if not isinstance(content, dict):
        raise RefusedWeightsError(
            f"The file {path!r} holds a {type(content).__name__}, where tensors by their names "
            "belong; give a checkpoint."
        )
    return content


def model_of(content: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The state of the model in a checkpoint of detectron2's, or a state dict by itself.

    Raises:
        RefusedWeightsError: if there is none; it names the path.
    """
    model = content.get("model", content)
    if isinstance(model, Mapping):
        tensors = {
            name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            for name, x in model.items()
        }
        if tensors and all(isinstance(x, Tensor) for x in tensors.values()):
            return tensors
    raise RefusedWeightsError(
        f"The checkpoint {path!r} holds no state of a detectron2 model; ResNets of other makers go "
        "through tools/convert_resnet.py."
    )


def _read(path: str, suffix: str) -> Any:
    try:
        if suffix == SAFETENSORS:
            return _read_safetensors(path)
        if suffix == ".pkl":
            return _read_pickle(path)
        with _arrays_allowed():
            # weights_only stays at its default, True, because only then torch reads the variable.
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except _CodeError as error:
        raise RefusedWeightsError(_refusal(path, f"it asks for {error}")) from error
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        found = re.search(r"\bGLOBAL (\S+)", str(error))
        reason = f"it asks for {found[1]}" if found else "it is damaged or holds more than tensors"
        raise RefusedWeightsError(_refusal(path, reason)) from error
    except OSError:
        raise
    # What damaged pickles raise has no end.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RefusedWeightsError(f"The checkpoint {path!r} cannot be read: {reason}") from error


def write_weights(
    tensors: Mapping[str, Tensor], path: str, *, matching_heuristics: bool = False
) -> None:
    """Writes weights for ``MODEL.WEIGHTS``, whole or not at all.

    Args:
        tensors (dict[str, Tensor]): a part of the state of the model, under its names.
        path (str): ends in .pth or .safetensors; what lies there is replaced.
        matching_heuristics (bool): that the names are not quite those of the model.

    Raises:
        OSError: if it cannot be written.
        ValueError: for another ending, and for .safetensors without the package.
    """
    target = Path(path)
    check_suffix(path)
    # Copies, because .safetensors wants each tensor by itself and in torch's first layout.
    model = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    heuristics = {_HEURISTICS: True} if matching_heuristics else {}
    if target.suffix != SAFETENSORS:
        save_whole({"model": model, **heuristics}, target)
        return
    with whole_file(target) as beside:
        metadata = dict.fromkeys(heuristics, "True")
        beside.write_bytes(_safetensors().torch.save(model, metadata))


def check_suffix(path: str) -> None:
    """Raises ValueError for a name that ``write_weights`` does not write."""
    if not path.endswith((".pth", SAFETENSORS)):
        raise ValueError(
            f"Weights are written to a .pth or {SAFETENSORS} file, as detectron2 and this package "
            f"read them, but the name is {path!r}."
        )
    if path.endswith(SAFETENSORS):
        _safetensors()


def _is_trusting() -> bool:
    return os.environ.get(TRUST_VARIABLE, "0").lower() in ("1", "y", "yes", "true")


def _read_pickle(path: str) -> Any:
    unpickler = pickle.Unpickler if _is_trusting() else _ArrayUnpickler
    with open(path, "rb") as file:
        return unpickler(file, encoding="latin1").load()


def _refusal(path: str, reason: str) -> str:
    return (
        f"The file {path!r} is refused: {reason}, but only arrays and tensors are loaded; "
        f"set {TRUST_VARIABLE}=1 in the environment to load it and run whatever it asks for."
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ValueError("it needs the package safetensors; pip install safetensors") from error
    return safetensors


def _read_safetensors(path: str) -> dict[str, Any]:
    with _safetensors().safe_open(path, framework="pt") as file:
        model = {name: file.get_tensor(name) for name in list(file.keys())}
        heuristics = _HEURISTICS in (file.metadata() or {})
    return {"model": model, **({_HEURISTICS: True} if heuristics else {})}


def _arrays_allowed() -> Any:
    """A context in which torch loads numpy's arrays too, as detectron2's checkpointer does."""
    types = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFD"}
    parts = [
        (_ArrayUnpickler.ARRAY_PARTS[name], f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ]
    return torch.serialization.safe_globals([np.ndarray, np.dtype, *types, *parts])


class _CodeError(Exception):
    """A pickle names something that is not an array."""


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles plain containers and numpy arrays, and refuses everything else."""

    # numpy moves these from module to module; the names stay.
    ARRAY_PARTS: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.zeros(0).__reduce__()[0],
        "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
        "scalar": np.float32(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ARRAY_PARTS:
            return self.ARRAY_PARTS[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):  # how older protocols write bytes
            return lambda text, codec: text.encode("latin1")
        raise _CodeError(f"{module}.{name}")
