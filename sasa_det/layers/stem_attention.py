"""The attention of the stem, in the place of the 7x7 convolution."""

import torch
from torch import Tensor, nn

from sasa_det.ops import stem_attention, stem_attention_pooled, stem_attention_weights
from sasa_det.ops.checks import check_heads

from .local_attention import init_projection, make_embeddings


class StemSelfAttention2d(nn.Module):
    """Attention inside non-overlapping blocks with spatially mixed values.

    Section 3.3 of arXiv 1906.05909: pixels carry too little content for attention to find edges by,
    so the value projection is a mixture of ``num_mixtures`` ones whose weights depend on the
    position inside the block: p(a, b, m) = softmax_m((row_a + col_b) . nu_m).

    Args:
        in_channels (int): channels of the image.
        out_channels (int): channels of the output, num_heads * head_dim with an even head_dim.
        block_size (int): side of a block.
        num_heads (int): number of heads.
        num_mixtures (int): number of value projections that are mixed; 1 is one plain projection.
        position (str): "relative" or "none", as in :class:`LocalSelfAttention2d`. The few channels
            of an image leave no room for absolute positions.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H, W); blocks that reach over the border are
        clipped there.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        block_size: int = 4,
        num_heads: int = 8,
        num_mixtures: int = 4,
        *,
        position: str = "relative",
    ) -> None:
        super().__init__()
        if position == "absolute":
            raise ValueError(
                f"The {in_channels} channels of an image leave no room for absolute positions; "
                "choose the convolutional stem, or position relative or none."
            )
        head_dim = check_heads(out_channels, num_heads)
        self.block_size = block_size
        self.num_heads = num_heads
        self.query_key_weight = nn.Parameter(torch.empty(2 * out_channels, in_channels))
        self.value_weights = nn.Parameter(torch.empty(num_mixtures, out_channels, in_channels))
        self.rel_rows, self.rel_cols = make_embeddings(
            num_heads, 2 * block_size - 1, head_dim, position
        )
        if num_mixtures > 1:
            self.row_embedding = nn.Parameter(torch.randn(block_size, out_channels))
            self.col_embedding = nn.Parameter(torch.randn(block_size, out_channels))
            # nu of the paper, scaled so that the mixture starts neither uniform nor one-hot.
            self.mixture_embedding = nn.Parameter(
                torch.randn(num_mixtures, out_channels) * out_channels**-0.5
            )
        init_projection(self.query_key_weight, out_channels, head_dim)
        nn.init.normal_(self.value_weights, std=in_channels**-0.5)

    def mixture(self) -> Tensor:
        """p(a, b, m) as (num_mixtures, block_size, block_size), summing to one over the first."""
        if self.value_weights.shape[0] == 1:
            return self.value_weights.new_ones(1, self.block_size, self.block_size)
        position = self.row_embedding[:, None] + self.col_embedding[None, :]
        logits = torch.einsum("abc,mc->mab", position, self.mixture_embedding)
        return logits.softmax(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        query_weight, key_weight = self.query_key_weight.chunk(2)
        return stem_attention(
            x,
            query_weight,
            key_weight,
            self.value_weights,
            self.mixture(),
            self.rel_rows,
            self.rel_cols,
            num_heads=self.num_heads,
        )

    def attention_weights(self, x: Tensor) -> Tensor:
        """What each pixel attends to in its block: (N, num_heads, block_size**2, H, W).

        They sum to one; row by row from the block's top left.
        """
        query_weight, key_weight = self.query_key_weight.chunk(2)
        return stem_attention_weights(
            x,
            query_weight,
            key_weight,
            self.rel_rows,
            self.rel_cols,
            num_heads=self.num_heads,
            block_size=self.block_size,
        )

    def window_corner(self, row: int, col: int) -> tuple[int, int]:
        """As in :class:`LocalSelfAttention2d`: of the block that holds the pixel (row, col)."""
        return row - row % self.block_size, col - col % self.block_size

    def pooled(self, x: Tensor, channel_sign: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`sasa_det.ops.stem_attention_pooled`.

        Args:
            x (Tensor[N, in_channels, H, W]): needs no gradient.
            channel_sign (Tensor[out_channels]): 1, or -1 for channels that are to be negated.
        """
        query_weight, key_weight = self.query_key_weight.chunk(2)
        return stem_attention_pooled(
            x,
            query_weight,
            key_weight,
            self.value_weights * channel_sign.to(self.value_weights.dtype)[:, None],
            self.mixture(),
            self.rel_rows,
            self.rel_cols,
            num_heads=self.num_heads,
        )
