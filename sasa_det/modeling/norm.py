"""The norm in front of an attention layer of the FPN and of the head."""

from detectron2.layers import get_norm
from torch import nn


def attention_norm(norm: str, channels: int) -> nn.Module:
    """detectron2's norm of this name; GN where the name is empty.

    Attention without a norm in front of it does not learn here (see ``PreNormSelfAttention2d``).

    Raises:
        ValueError: for channels that group norm's 32 groups do not divide.
    """
    norm = norm or "GN"
    if norm == "GN" and channels % 32:
        raise ValueError(
            f"Group norm needs a multiple of 32 channels, but MODEL.FPN.OUT_CHANNELS is {channels}."
        )
    return get_norm(norm, channels)
