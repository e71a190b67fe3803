"""What a wrong argument gets: one sentence that names the value and the remedy."""

from torch import Tensor

from .calls import AttentionCall, ProjectedCall, compute_dtype


def check_attention(call: AttentionCall) -> None:
    """All of a call of ``local_attention``."""
    query = call.query
    check_map("query", query)
    check_tensor("key", call.key, query.shape, like=query)
    check_tensor("value", call.value, query.shape, like=query)
    head_dim = check_heads(query.shape[1], call.num_heads)
    check_kernel_size(call.kernel_size)
    shape = (call.num_heads, call.kernel_size, head_dim // 2)
    check_embeddings(call.rel_rows, call.rel_cols, shape, like=query)


def check_projected_attention(call: ProjectedCall) -> None:
    """What :func:`check_attention` would say of the queries, keys and values."""
    check_projection(call.x, call.weight, call.num_heads)
    queries = call.x[:, :1].expand(-1, call.weight.shape[0] // 3, -1, -1)
    embeddings = (call.rel_rows, call.rel_cols)
    check_attention(
        AttentionCall(queries, queries, queries, *embeddings, call.num_heads, call.kernel_size)
    )
    if call.residual is not None:
        check_tensor("residual", call.residual, queries.shape, like=call.x)
    check_scale_and_shift(call.output_scale, call.output_shift)
    for name in ("output_scale", "output_shift"):
        if getattr(call, name) is not None:
            check_tensor(name, getattr(call, name), queries.shape[1:2], like=call.x)


def check_projection(x: Tensor, weight: Tensor, num_heads: int) -> None:
    """That there are queries, keys and values of so many heads."""
    check_map("x", x)
    if weight.shape[1:] != (x.shape[1], 1, 1) or weight.shape[0] % 3:
        raise ValueError(
            f"weight must have the shape (3 * C, {x.shape[1]}, 1, 1), "
            f"but has {tuple(weight.shape)}."
        )
    check_heads(weight.shape[0] // 3, num_heads)


def check_scale_and_shift(scale: Tensor | None, shift: Tensor | None) -> None:
    if (scale is None) != (shift is None):
        raise ValueError("output_scale and output_shift must be given together, or both be None.")


def check_heads(channels: int, num_heads: int) -> int:
    """Returns head_dim, the channels of a head."""
    if num_heads < 1 or channels % num_heads:
        raise ValueError(
            f"{channels} channels do not divide into num_heads={num_heads}; "
            "choose a number of heads that divides the channels."
        )
    head_dim = channels // num_heads
    if head_dim % 2:
        raise ValueError(
            f"head_dim must be even, half for rows and half for columns, but {channels} channels "
            f"in num_heads={num_heads} make it {head_dim}; choose another number of heads."
        )
    return head_dim


def check_kernel_size(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size must be odd, so that the window has a centre, but is {kernel_size}; "
            f"choose {max(1, kernel_size - 1)} or {max(3, kernel_size + 1)}."
        )


def check_map(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 4 or min(tensor.shape[1:]) < 1:
        raise ValueError(
            f"{name} must be (N, C, H, W) with C, H, W >= 1, "
            f"but has the shape {tuple(tensor.shape)}."
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be of a floating point dtype, but is {tensor.dtype}.")


def check_embeddings(
    rel_rows: Tensor | None, rel_cols: Tensor | None, shape: tuple[int, int, int], *, like: Tensor
) -> None:
    if (rel_rows is None) != (rel_cols is None):
        raise ValueError("rel_rows and rel_cols must be given together, or both be None.")
    if rel_rows is None or rel_cols is None:
        return
    # Both may be in the dtype of computation as well.
    wide = rel_rows.dtype == rel_cols.dtype == compute_dtype(like.dtype)
    for name, x in (("rel_rows", rel_rows), ("rel_cols", rel_cols)):
        check_tensor(name, x, shape, like=like, any_dtype=wide)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], *, like: Tensor, any_dtype: bool = False
) -> None:
    """``like`` is the first argument of the call."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must have the shape {tuple(shape)}, but has {tuple(tensor.shape)}."
        )
    dtype_fits = any_dtype or tensor.dtype == like.dtype
    if not dtype_fits or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} as the first argument is, "
            f"but is {tensor.dtype} on {tensor.device}."
        )
