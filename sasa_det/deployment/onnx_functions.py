"""The attention operators as ONNX functions, which are then put in the place of their calls.

A detector has fifty attention layers of a few kinds. Each kind is converted once, as a function,
and so are the positions that all layers of one level of a pyramid share. That is much faster than
to convert a program in which every layer is spelled out, and makes a smaller file.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from torch.export import Dim

from sasa_det.ops.calls import AttentionCall, StemCall
from sasa_det.ops.decompositions import (
    BLOCK_SIZE,
    Positions,
    attend_in_windows,
    decompositions,
    window_positions,
)

DOMAIN = "sasa_det"
_POSITIONS = "window_positions"
# Of an example, from which no size is taken over.
_BATCH, _HEIGHT, _WIDTH = 2, 24, 40


class Functions:
    """The functions that a program needs, collected while its operators become calls of them.

    Args:
        divisor (int): of the height and the width of the images.
    """

    def __init__(self, divisor: int) -> None:
        self._divisor = divisor
        self._build: dict[str, Callable[[], ir.Function]] = {}

    def decompositions(self) -> dict[Any, Callable]:
        """For ``run_decompositions``; as in inference, only the output itself is computed."""
        return {
            torch.ops.sasa_det.local_attention.default: self._local_attention,
            torch.ops.sasa_det.stem_attention.default: self._stem_attention,
            torch.ops.sasa_det.stem_attention_pooled.default: self._stem_attention_pooled,
        }

    def put_into(self, model: ir.Model) -> ir.Model:
        """The model in standard operators alone."""
        model.opset_imports[DOMAIN] = 1
        for build in self._build.values():
            function = build()
            model.functions[function.identifier()] = function
        for clean_up in (
            passes.InlinePass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0),
            passes.DeduplicateInitializersPass(),
            passes.CommonSubexpressionEliminationPass(),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedOpsetsPass(),
            passes.ClearMetadataAndDocStringPass(),  # the lines of code behind each node
        ):
            model = clean_up(model).model
        return model

    def _local_attention(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        call = AttentionCall(*arguments)
        n, channels, height, width = call.query.shape
        kind = "relative" if call.rel_rows is not None else "content"
        name = f"local_attention_{channels}_{call.num_heads}_{call.kernel_size}_{kind}"
        self._build[name] = lambda: _attention_function(name, call)
        self._build[f"{_POSITIONS}_{call.kernel_size}"] = lambda: _positions_function(
            call.kernel_size
        )
        tensors = [x for x in call if isinstance(x, Tensor)]
        output = _node(name, [*tensors, *_positions_node(call)], call.query.shape)
        return output, output.new_empty(n, call.num_heads, height, width)

    def _stem_attention(self, *arguments: Any) -> Tensor:
        call = StemCall(*arguments)
        n, _, height, width = call.image.shape
        shape = (n, call.query_weight.shape[0], height, width)
        return self._stem_node(torch.ops.sasa_det.stem_attention, call, shape)

    def _stem_attention_pooled(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = StemCall(*arguments)
        n, _, height, width = call.image.shape
        block_size, channels = call.mixture.shape[-1], call.query_weight.shape[0]
        rows, cols = ((size + block_size - 1) // block_size for size in (height, width))
        shape = (n, channels, rows, cols)
        output = self._stem_node(torch.ops.sasa_det.stem_attention_pooled, call, shape)
        return output, output.new_empty(channels), output.new_empty(channels)

    def _stem_node(self, operator: Any, call: StemCall, shape: Sequence[Any]) -> Tensor:
        name = str(operator).rsplit(".", 1)[-1]  # a network has one stem
        self._build[name] = lambda: _stem_function(name, operator, call, self._divisor)
        return _node(name, [x for x in call if isinstance(x, Tensor)], shape)


def _node(name: str, inputs: Sequence[Tensor], shape: Sequence[Any]) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, dtype=inputs[0].dtype, shape=shape, version=1
    )


def _positions_node(call: AttentionCall) -> Sequence[Tensor]:
    height, width = call.query.shape[2:]
    device, length = call.query.device, height * width
    rows, cols = ((size + BLOCK_SIZE - 1) // BLOCK_SIZE for size in (height, width))
    halo = BLOCK_SIZE + 2 * (call.kernel_size // 2)
    shapes: dict[str, tuple[Any, ...]] = {
        "row_logits": (length * halo,),
        "col_logits": (length * halo,),
        "slots": (length, 2 * halo),
        "queries": (rows * cols * BLOCK_SIZE**2,),
        "keys": (rows * cols * halo**2,),
        "values": (rows * cols * halo**2,),
        "back": (length,),
    }
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{_POSITIONS}_{call.kernel_size}",
        (torch.arange(height, device=device), torch.arange(width, device=device)),
        dtypes=[torch.float32 if name == "slots" else torch.int64 for name in Positions._fields],
        shapes=[shapes[name] for name in Positions._fields],
        version=1,
    )


def _attention_function(name: str, call: AttentionCall) -> ir.Function:
    def attend(*tensors: Tensor) -> Tensor:
        arguments = _with_tensors(call, tensors)
        return attend_in_windows(arguments, Positions(*_positions_node(arguments)))[0]

    graph = _graph(attend, call)
    # The positions come from outside.
    (node,) = (node for node in graph if node.op_type.startswith(_POSITIONS))
    inputs = [ir.Value(name=f"position_{i}") for i in range(len(node.outputs))]
    for old, new in zip(node.outputs, inputs):
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    graph.inputs.extend(inputs)
    return _function(name, graph)


def _positions_function(kernel_size: int) -> ir.Function:
    name = f"{_POSITIONS}_{kernel_size}"
    sizes = {"y": _HEIGHT, "x": _WIDTH}
    module = _Module(lambda y, x: tuple(window_positions(y, x, kernel_size)))
    examples = tuple(torch.arange(size) for size in sizes.values())
    dims = tuple({0: Dim(axis, min=BLOCK_SIZE + 1)} for axis in sizes)
    program = torch.export.export(module, examples, dynamic_shapes=(dims,))
    return _function(name, _convert(program))


def _stem_function(name: str, operator: Any, call: StemCall, divisor: int) -> ir.Function:
    # Where the blocks divide the image, nothing needs to be masked at its border.
    step = math.gcd(divisor, call.mixture.shape[-1])

    def attend(image: Tensor, *parameters: Tensor) -> Tensor:
        for dim in (2, 3):  # says so, and cuts nothing off
            image = image.narrow(dim, 0, image.shape[dim] // step * step)
        output = decompositions()[operator.default](*_with_tensors(call, [image, *parameters]))
        return output[0] if isinstance(output, tuple) else output

    return _function(name, _graph(attend, call, step))


class _Module(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


def _with_tensors(call: Any, tensors: Sequence[Tensor]) -> Any:
    """The call with its tensors, in their order, replaced."""
    remaining = iter(tensors)
    return type(call)(*(next(remaining) if isinstance(x, Tensor) else x for x in call))


def _graph(function: Callable, call: Any, step: int = 1) -> ir.Graph:
    """A function of the tensors of a call, for any batch and multiples of ``step`` of the sizes."""
    # More than one block: the exporter would take a number that can be one to be one.
    least = {"batch": 2, "rows": BLOCK_SIZE + 1, "cols": BLOCK_SIZE + 1}
    dims = {name: Dim(name, min=size) for name, size in least.items()}
    of_map = {0: dims["batch"], 2: step * dims["rows"], 3: step * dims["cols"]}
    tensors = [x for x in call if isinstance(x, Tensor)]
    examples = [
        torch.zeros(_BATCH, int(x.shape[1]), _HEIGHT, _WIDTH, dtype=x.dtype)
        if x.dim() == 4
        else torch.zeros([int(size) for size in x.shape], dtype=x.dtype)
        for x in tensors
    ]
    dynamic_shapes = (tuple(of_map if x.dim() == 4 else None for x in tensors),)
    program = torch.export.export(_Module(function), tuple(examples), dynamic_shapes=dynamic_shapes)
    return _convert(program)


def _convert(program: torch.export.ExportedProgram) -> ir.Graph:
    converted = torch.onnx.export(program, dynamo=True, verbose=False)
    assert converted is not None
    return converted.model.graph


def _function(name: str, graph: ir.Graph) -> ir.Function:
    # A function has no initializers.
    constants = []
    for value in graph.initializers.values():
        assert value.const_value is not None
        node = ir.node("Constant", [], {"value": ir.AttrTensor("value", value.const_value)})
        value.replace_all_uses_with(node.outputs[0])
        constants.append(node)
    graph.initializers.clear()
    graph.insert_before(graph[0], constants)
    # Names of sizes mean something else in each call.
    for node in graph:
        for output in node.outputs:
            output.shape = None
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
