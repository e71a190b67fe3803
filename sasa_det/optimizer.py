"""Which parameters decay: what detectors and classifiers are optimised with."""

from typing import Any

from detectron2.solver.build import get_default_optimizer_params
from torch import nn

# By their names within LocalSelfAttention2d and StemSelfAttention2d.
POSITION_EMBEDDINGS = ("rel_rows", "rel_cols", "row_embedding", "col_embedding")


def optimizer_params(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """detectron2's ``get_default_optimizer_params``; position embeddings do not decay.

    Args:
        model (nn.Module): with or without attention.
        options: of detectron2's function, for instance ``base_lr`` and ``weight_decay_norm``.
    """
    overrides = {name: {"weight_decay": 0.0} for name in POSITION_EMBEDDINGS}
    return get_default_optimizer_params(model, overrides=overrides, **options)
