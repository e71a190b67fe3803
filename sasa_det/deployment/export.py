"""Programs of torch.export and ONNX files of a detector."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from sasa_det.ops.decompositions import decompositions

from .networks import ExportedNetwork

INPUT_NAME = "images"
METADATA_KEY = "sasa_det"


def export_program(network: ExportedNetwork, *, keep_operators: bool = False) -> ExportedProgram:
    """The network as a program for any batch, height and width.

    Height and width must be large enough for two positions of the coarsest map: more than 128
    pixels where that is P7.

    Args:
        network (ExportedNetwork): see :func:`network_of`.
        keep_operators (bool): leaves each operator of sasa_det as one node: faster, but whoever
            loads the program imports ``sasa_det.ops`` before. Otherwise torch is enough.
    """
    # Different sizes of more than one position, which the exporter is not to take for constants.
    image = torch.zeros(2, network.channels, 3 * network.max_stride, 4 * network.max_stride)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(network, (image,), dynamic_shapes=(sizes,))
    if keep_operators:
        return program
    program = program.run_decompositions(decompositions())
    _merge_equal_nodes(program)
    return program


def export_onnx(network: ExportedNetwork, path: Path, metadata: dict[str, Any]) -> None:
    """Writes the network as ONNX, in standard operators; for any batch, height and width.

    Args:
        network (ExportedNetwork): see :func:`network_of`.
        path (Path): of the file.
        metadata (dict): kept in the file as JSON, under ``METADATA_KEY``.

    Raises:
        ImportError: if onnx or onnxscript is not installed.
    """
    require("onnx", "onnxscript")
    from .onnx_functions import Functions

    functions = Functions(network.divisor)
    with _quiet():
        program = export_program(network, keep_operators=True)
        program = program.run_decompositions(functions.decompositions())
        _merge_equal_nodes(program)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT_NAME],
            output_names=list(network.output_names),
        )
        assert exported is not None
        exported.model = functions.put_into(exported.model)
    exported.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    exported.save(str(path))


def open_onnx(path: Path, threads: int | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Raises:
        ImportError: if onnxruntime is not installed.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_onnx(session: Any, images: Tensor) -> list[Tensor]:
    return [torch.from_numpy(x) for x in session.run(None, {INPUT_NAME: images.numpy()})]


def require(*modules: str) -> None:
    """Raises ImportError, naming the extra to install, unless all modules can be imported."""
    for module in modules:
        try:
            __import__(module)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"Exporting to ONNX and running it needs {module}, which is not installed: "
                'pip install -e ".[deployment]".'
            ) from error


def _merge_equal_nodes(program: ExportedProgram) -> None:
    """All layers of a level compute the same positions: once is enough."""
    graph = program.graph
    (output,) = graph.find_nodes(op="output")
    returned = set(output.all_input_nodes)  # the program knows these by name
    first: dict[str, torch.fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in returned:
            continue
        known = first.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its advice to its developers concern nobody here."""
    level = logging.getLogger("onnxscript").level
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("onnxscript").setLevel(level)
