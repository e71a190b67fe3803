"""The Triton kernels are compiled for a GPU; it need not be there."""

import pytest
import torch

from sasa_det.ops.calls import AttentionCall, GroupNormCall, StemCall
from sasa_det.ops.folded_stem import fold
from sasa_det.ops.triton import attention, group_norm, stem, tiles
from sasa_det.ops.triton.launch import interpreted


def compile_for_hopper(launch):
    """What the compiler makes of a launch for sm_90; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types[torch.int32] = "*i32"
    constants, attributes = {}, {}

    def type_of(x, path, specialize=True):
        """As ``triton.jit`` specialises what a kernel is called with."""
        if isinstance(x, tuple):
            return tuple(type_of(item, (*path, i)) for i, item in enumerate(x))
        if isinstance(x, float):
            return "fp32"
        if x is None or (specialize and isinstance(x, int) and x == 1):
            constants[path] = x
            return "constexpr"
        if isinstance(x, torch.Tensor) or (specialize and x % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return types[x.dtype] if isinstance(x, torch.Tensor) else "i32"

    signature = {}
    for i, param in enumerate(launch.kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[i,] = launch.constants[param.name]
        else:
            x = launch.arguments[param.name]
            signature[param.name] = type_of(x, (i,), not param.do_not_specialize)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)


def attention_launches(dtype, head_dim, kernel_size, relative=True, levels=None):
    heads, height, width = 4, 20, 30
    channels = heads * head_dim
    fused = torch.empty(2, 3 * channels, height, width, dtype=dtype, device="meta")
    maps = fused.to(memory_format=torch.channels_last).chunk(3, dim=1)
    embedding = None
    if relative:
        embedding = torch.empty(heads, kernel_size, head_dim // 2, dtype=dtype, device="meta")
    call = AttentionCall(*maps, embedding, embedding, heads, kernel_size, levels)
    grad = torch.empty_like(call.query)
    logsumexp = torch.empty(2, heads, height, width, device="meta")
    partial_sums = attention.new_partial_sums(call)
    launches = [
        attention.forward_launch(call, grad, logsumexp),
        attention.forward_launch(call, grad, logsumexp, grad, grad),
        attention.forward_launch(call, None, logsumexp, grad, grad),
        *attention.query_gradient_launches(
            call, grad, grad, logsumexp, grad, logsumexp, partial_sums
        ),
        attention.key_value_gradient_launch(call, grad, logsumexp, logsumexp, grad, grad),
    ]
    if relative:
        sums = (partial_sums, embedding, embedding)
        launches.append(attention.embedding_gradient_launch(call, *sums))
    return launches


def stem_launches(dtype, in_channels=3):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, channels, embeddings = 8, 64, empty(8, 7, 4)
    call = StemCall(
        empty(2, in_channels, 64, 96),
        empty(channels, in_channels),
        empty(channels, in_channels),
        empty(4, channels, in_channels),
        empty(4, 4, 4),
        embeddings,
        embeddings,
        heads,
    )
    weights, maximum = fold(call), empty(2, channels, 16, 24)
    positions, sums = stem.new_positions(call), empty(channels, dtype=torch.float32)
    gradient_sums = stem.new_gradient_sums(call)
    return [
        stem.forward_launch(call, weights, stem.new_output_sums(call), maximum),
        stem.forward_launch(call, weights, positions=positions),
        stem.backward_launch(call, weights, positions, (maximum, sums, sums), gradient_sums),
    ]


COMPILED = [
    (torch.bfloat16, 32, 7, True, None),
    (torch.float16, 32, 7, True, ((15, 30), (10, 15))),
    (torch.float32, 32, 7, True, None),
    (torch.bfloat16, 64, 11, True, None),
    (torch.bfloat16, 8, 7, True, ((15, 30), (10, 15))),
    (torch.float16, 4, 5, False, None),
    (torch.float32, 8, 3, True, None),
    (torch.float16, 2, 3, True, None),
    (torch.bfloat16, 6, 1, False, None),
    (torch.bfloat16, 16, 17, True, ((15, 30), (10, 15))),
]


def test_products_of_float32_are_as_precise_as_those_of_torch():
    assert tiles.float32_precision() == "tf32x3"
    torch.set_float32_matmul_precision("high")
    try:
        assert tiles.float32_precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


# The interpreter accepts what the compiler does not.
@pytest.mark.skipif(interpreted(), reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize(("dtype", "head_dim", "kernel_size", "relative", "levels"), COMPILED)
def test_compiles_for_a_gpu(dtype, head_dim, kernel_size, relative, levels):
    pytest.importorskip("triton")
    for launch in attention_launches(dtype, head_dim, kernel_size, relative, levels):
        kernel = compile_for_hopper(launch)
        has_products = "PRECISION" in launch.kernel.arg_names
        assert ("mma" in kernel.asm["ptx"]) == has_products
        assert kernel.metadata.shared < 48 * 1024  # what every GPU has


@pytest.mark.skipif(interpreted(), reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize(("dtype", "in_channels"), [(torch.bfloat16, 3), (torch.float32, 1)])
def test_pooled_stem_compiles_for_a_gpu(dtype, in_channels):
    pytest.importorskip("triton")
    for launch in stem_launches(dtype, in_channels):
        assert compile_for_hopper(launch).metadata.shared < 48 * 1024


def group_norm_launches(dtype, channels, groups, levels):
    x = torch.empty(2, channels, 80, 80, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    weight = torch.empty(channels, device="meta")
    call = GroupNormCall(x, weight, weight, None, groups, 1e-5, levels)
    chunks = group_norm.new_statistics(call, group_norm.num_chunks(call))
    of_maps = group_norm.new_statistics(call, 2)
    known = call._replace(statistics=of_maps)
    return [
        group_norm.statistics_launch(call, chunks),
        group_norm.forward_launch(call, chunks, x, of_maps),
        group_norm.forward_launch(known, of_maps, x, of_maps),
        group_norm.gradient_sums_launch(known, x, chunks, chunks),
        group_norm.input_gradient_launch(known, x, chunks, None, x),
        group_norm.input_gradient_launch(known, x, chunks, x, x),
    ]


@pytest.mark.skipif(interpreted(), reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "levels"),
    [
        (torch.bfloat16, 256, 32, None),
        (torch.float32, 256, 32, None),
        (torch.bfloat16, 96, 32, ((70, 80), (20, 40))),
    ],
)
def test_group_norm_compiles_for_a_gpu(dtype, channels, groups, levels):
    pytest.importorskip("triton")
    for launch in group_norm_launches(dtype, channels, groups, levels):
        kernel = compile_for_hopper(launch)
        assert kernel.metadata.shared < 48 * 1024
        if channels == 256:  # the channels of a group are next to each other
            assert "ld.global.v4" in kernel.asm["ptx"]
