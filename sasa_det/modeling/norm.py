"""The norm in front of an attention layer of the FPN and of the head."""

from detectron2.layers import get_norm
from torch import nn


def attention_norm(norm: str, channels: int) -> nn.Module:
    """detectron2's norm of this name; GN where the name is empty.

    Attention without a norm in front of it does not learn here (see ``PreNormSelfAttention2d``).

    Raises:
        ValueError: for a batch norm, whose statistics the levels of an FPN would have to share.
    """
    if norm.endswith("BN"):
        raise ValueError(
            f"The norm of an attention FPN or head cannot be {norm!r}, because all FPN levels "
            'share it; set MODEL.RETINANET.NORM and MODEL.FPN.NORM to "GN" or to "".'
        )
    return get_norm(norm or "GN", channels)
