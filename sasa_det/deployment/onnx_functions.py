"""The attention operators as ONNX functions: one for each kind of layer, defined in the file.

In the graph each layer is one node; what it computes stands once in the model, in standard
operators, and any runtime puts it in the node's place.
"""

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sasa_det.ops.decompositions import BLOCK_SIZE, decompositions

DOMAIN = "sasa_det"
# Of an example, from which no size is taken over.
_BATCH, _HEIGHT, _WIDTH = 2, 24, 40


class Functions:
    """The functions that a program needs, collected while its operators become nodes.

    Args:
        divisor (int): of the height and the width of the images.
    """

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor
        self.calls: dict[str, tuple[Callable, tuple]] = {}

    def decompositions(self) -> dict[Any, Callable]:
        """For ``run_decompositions``: each operator becomes a node that calls its function."""
        outputs = {
            torch.ops.sasa_det.local_attention.default: self._local_attention,
            torch.ops.sasa_det.stem_attention.default: self._stem_attention,
            torch.ops.sasa_det.stem_attention_pooled.default: self._stem_attention_pooled,
        }
        return outputs

    def add_to(self, model: ir.Model) -> None:
        model.opset_imports[DOMAIN] = 1
        for name, (operator, arguments) in self.calls.items():
            function = _function(name, operator, arguments, self.divisor)
            model.functions[function.identifier()] = function

    def _node(self, operator: Any, arguments: tuple, shape: tuple) -> Tensor:
        """A call of the operator's first output, of which alone inference makes use."""
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        numbers = [x for x in arguments if isinstance(x, int)]
        name = "_".join([operator._opname, str(shape[1]), *map(str, numbers)])
        if len(tensors) + len(numbers) < len(arguments):
            name += "_content"  # no position embeddings
        self.calls[name] = (operator, arguments)
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{name}", tensors, dtype=tensors[0].dtype, shape=shape, version=1
        )

    def _local_attention(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        operator = torch.ops.sasa_det.local_attention.default
        query, num_heads = arguments[0], arguments[5]
        n, _, height, width = query.shape
        output = self._node(operator, arguments, query.shape)
        return output, query.new_empty(n, num_heads, height, width)

    def _stem_attention(self, *arguments: Any) -> Tensor:
        operator = torch.ops.sasa_det.stem_attention.default
        image, query_weight = arguments[:2]
        n, _, height, width = image.shape
        return self._node(operator, arguments, (n, query_weight.shape[0], height, width))

    def _stem_attention_pooled(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        operator = torch.ops.sasa_det.stem_attention_pooled.default
        image, query_weight, *_, mixture = arguments[:5]
        n, _, height, width = image.shape
        block_size, channels = mixture.shape[-1], query_weight.shape[0]
        shape = (n, channels, -(-height // block_size), -(-width // block_size))
        output = self._node(operator, arguments, shape)
        return output, image.new_empty(channels), image.new_empty(channels)


class _Operator(nn.Module):
    """One call of an operator; tensors are inputs, everything else is fixed."""

    def __init__(self, decomposition: Callable, arguments: tuple) -> None:
        super().__init__()
        self.decomposition = decomposition
        self.arguments = [None if isinstance(x, Tensor) else (x,) for x in arguments]

    def forward(self, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        arguments = [next(remaining) if x is None else x[0] for x in self.arguments]
        output = self.decomposition(*arguments)
        return output[0] if isinstance(output, tuple) else output


def _function(name: str, operator: Any, arguments: tuple, divisor: int) -> ir.Function:
    """The decomposition of an operator, for any batch, height and width."""
    module = _Operator(decompositions()[operator], arguments)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    of_map = tensors[0].shape[:1] + tensors[0].shape[2:]
    step = 1
    if "stem" in name:
        step = math.gcd(divisor, arguments[4].shape[-1])
    # More than one block: the exporter takes a number that may be one to be one.
    least = {"batch": 2, "rows": BLOCK_SIZE + 1, "cols": BLOCK_SIZE + 1}
    dims = {name: torch.export.Dim(name, min=size) for name, size in least.items()}
    examples, dynamic_shapes = [], []
    for tensor in tensors:
        if tensor.dim() == 4:
            dynamic_shapes.append({0: dims["batch"], 2: step * dims["rows"], 3: step * dims["cols"]})
            shape = (_BATCH, int(tensor.shape[1]), _HEIGHT, _WIDTH)
        else:
            dynamic_shapes.append(None)
            shape = tuple(map(int, tensor.shape))
        examples.append(torch.zeros(shape, dtype=tensor.dtype))
    program = torch.export.export(module, tuple(examples), dynamic_shapes=(tuple(dynamic_shapes),))
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    graph = exported.model.graph
    # A function has no initializers.
    constants = {}
    for value in list(graph.initializers.values()):
        node = ir.node("Constant", [], {"value": ir.AttrTensor("value", value.const_value)})
        value.replace_all_uses_with(node.outputs[0])
        constants[value.name] = node
    graph.initializers.clear()
    graph.insert_before(graph[0], list(constants.values()))
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
