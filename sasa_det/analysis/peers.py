"""Other implementations of local attention as whole layers, to compare with.

Each takes what :class:`LocalSelfAttention2d` takes. Where it can, it is that layer with another
``forward``, so that weights fit both.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sasa_det.layers import LocalSelfAttention2d


class UnfoldAttention(LocalSelfAttention2d):
    """Eq. 3 with k * k copies of keys and values in memory, and zeros around the map.

    Args and Shape: as in :class:`LocalSelfAttention2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        query, key, value = self.projection(x).chunk(3, dim=1)
        query = query.reshape(n, self.num_heads, -1, 1, height, width)
        keys, values = self._windows(key), self._windows(value)
        logits = (query * (keys + self._embeddings())).sum(dim=2)
        weights = logits.softmax(dim=2)  # (N, heads, k * k, H, W)
        return torch.einsum("nhkij,nhdkij->nhdij", weights, values).flatten(1, 2)

    def _windows(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, heads, head_dim, k * k, H, W)."""
        n, _, height, width = x.shape
        k, radius = self.kernel_size, self.kernel_size // 2
        windows = F.pad(x, [radius] * 4).unfold(2, k, 1).unfold(3, k, 1)
        windows = windows.permute(0, 1, 4, 5, 2, 3)
        return windows.reshape(n, self.num_heads, -1, k * k, height, width)

    def _embeddings(self) -> Tensor | float:
        """Of each offset: (heads, head_dim, k * k, 1, 1)."""
        if self.rel_rows is None or self.rel_cols is None:
            return 0.0
        k = self.kernel_size
        rows = self.rel_rows.mT[..., :, None].expand(-1, -1, k, k)
        cols = self.rel_cols.mT[..., None, :].expand(-1, -1, k, k)
        return torch.cat([rows, cols], dim=1).flatten(2)[..., None, None]


class FlexLocalAttention(LocalSelfAttention2d):
    """Eq. 3 by torch's compiled FlexAttention: a block mask, and row and column logits added.

    Args and Shape: as in :class:`LocalSelfAttention2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        if x.device.type == "cpu" and torch.is_grad_enabled():
            raise NotImplementedError("it has no backward on the CPU")
        query, key, value = (
            t.reshape(n, self.num_heads, -1, height * width).mT
            for t in self.projection(x).chunk(3, dim=1)
        )
        if self.rel_rows is None or self.rel_cols is None:
            raise ValueError("it is compared with relative positions only")
        row_query, col_query = query.chunk(2, dim=-1)
        row_logits = row_query @ self.rel_rows.mT  # (N, heads, H * W, k)
        col_logits = col_query @ self.rel_cols.mT
        mask = _neighbourhood_mask(height, width, self.kernel_size, str(x.device))
        # One compilation a shape, and a detector has many.
        with torch._dynamo.config.patch(recompile_limit=1000):
            output = _compiled_flex_attention()(
                query, key, value, row_logits, col_logits, mask, width, self.kernel_size // 2
            )
        return output.mT.reshape(n, -1, height, width)


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_logits: Tensor,
    col_logits: Tensor,
    mask: Any,
    width: int,
    radius: int,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def add_position(score, batch, head, query_index, key_index):
        row = key_index // width - query_index // width + radius
        col = key_index % width - query_index % width + radius
        # Clamped: it is evaluated for the masked keys of a block, too.
        row, col = row.clamp(0, 2 * radius), col.clamp(0, 2 * radius)
        rows = row_logits[batch, head, query_index, row]
        return score + rows + col_logits[batch, head, query_index, col]

    return flex_attention(query, key, value, add_position, mask, scale=1.0)


@lru_cache(maxsize=1)
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # fullgraph: never silently the uncompiled version.
    return torch.compile(_flex_attention, dynamic=False, fullgraph=True)


@lru_cache(maxsize=64)
def _neighbourhood_mask(height: int, width: int, kernel_size: int, device: str) -> Any:
    """FlexAttention's BlockMask of the k x k window, positions row by row.

    ``create_block_mask`` would hold a (H * W) x (H * W) mask in memory on its way.
    """
    from torch.nn.attention.flex_attention import BlockMask

    block, radius, positions = 128, kernel_size // 2, height * width
    num_blocks = -(-positions // block)
    needed = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
    for i in range(num_blocks):
        queries = torch.zeros(num_blocks * block)
        queries[i * block : (i + 1) * block] = 1
        map_ = queries[:positions].view(1, height, width)
        keys = F.max_pool2d(map_, kernel_size, stride=1, padding=radius).flatten()
        needed[i] = F.pad(keys, [0, num_blocks * block - positions]).view(-1, block).amax(1) > 0

    def inside_window(batch, head, query_index, key_index):
        rows = (query_index // width - key_index // width).abs()
        cols = (query_index % width - key_index % width).abs()
        return (rows <= radius) & (cols <= radius)

    counts = needed.sum(dim=1, dtype=torch.int32)
    indices = needed.int().argsort(dim=1, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        counts[None, None].to(device),
        indices[None, None].to(device),
        BLOCK_SIZE=block,
        mask_mod=inside_window,
        seq_lengths=(positions, positions),
    )


class NattenAttention(LocalSelfAttention2d):
    """NATTEN's fused neighbourhood attention between the same projections.

    Args and Shape: as in :class:`LocalSelfAttention2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 7, num_heads: int = 8
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, num_heads, position="none")

    def forward(self, x: Tensor) -> Tensor:
        from natten.functional import na2d

        n, _, height, width = x.shape
        projected = self.projection(x).permute(0, 2, 3, 1)
        query, key, value = projected.reshape(n, height, width, 3, self.num_heads, -1).unbind(3)
        output = na2d(query, key, value, kernel_size=self.kernel_size, scale=1.0)
        return output.flatten(3).permute(0, 3, 1, 2)


class HaloAttention(nn.Module):
    """timm's HaloAttn, on maps padded to whole blocks.

    Args and Shape: as in :class:`LocalSelfAttention2d`.
    """

    BLOCK = 8

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 7, num_heads: int = 8
    ) -> None:
        super().__init__()
        from timm.layers.halo_attn import HaloAttn

        self.attention = HaloAttn(
            in_channels,
            out_channels,
            num_heads=num_heads,
            block_size=self.BLOCK,
            halo_size=kernel_size // 2,
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height % self.BLOCK or width % self.BLOCK:
            x = F.pad(x, [0, -width % self.BLOCK, 0, -height % self.BLOCK])
        return self.attention(x)[..., :height, :width]


class Peer(NamedTuple):
    """Another implementation.

    Attributes:
        make: (in_channels, out_channels, kernel_size, num_heads) to the layer.
        differs (str): what it computes differently, one sentence.
        requires (str): the module that it comes from, which may be absent.
        compiled (bool): it is compiled anew for each shape.
    """

    make: Callable[[int, int, int, int], nn.Module]
    differs: str
    requires: str = "torch"
    compiled: bool = False


PEERS = {
    "eager unfold": Peer(
        UnfoldAttention,
        "It computes Eq. 3 away from the border, but the zeros around the map are keys that take "
        "part in the softmax.",
    ),
    "FlexAttention": Peer(
        FlexLocalAttention,
        "It computes Eq. 3 exactly; it is compiled for each shape, with positions row by row in "
        "blocks of 128.",
        "torch.nn.attention.flex_attention",
        compiled=True,
    ),
    "HaloAttn": Peer(
        HaloAttention,
        "It shares one window between the 8x8 queries of a block (14x14 keys for k = 7), lets "
        "zeros around the map take part, scales the logits, shares its relative positions between "
        "heads, and needs maps padded to multiples of 8.",
        "timm",
    ),
    "NATTEN": Peer(
        NattenAttention,
        "It has no relative positions, and at the border it shifts the window inside instead of "
        "clipping it.",
        "natten",
    ),
}


def available_peers() -> dict[str, str | None]:
    """The names in ``PEERS``; with each, None if it can be had here, else why it can not."""
    reasons: dict[str, str | None] = {}
    for name, peer in PEERS.items():
        installed = importlib.util.find_spec(peer.requires.split(".")[0]) is not None
        reasons[name] = None if installed else f"{peer.requires} is not installed"
    return reasons
