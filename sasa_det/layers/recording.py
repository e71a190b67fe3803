"""Looking at the attention of a model while it runs."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .local_attention import LocalSelfAttention2d
from .stem_attention import StemSelfAttention2d

AttentionLayer = LocalSelfAttention2d | StemSelfAttention2d


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """All attention layers of a model by their names in it, in the order of its modules."""
    return {name: x for name, x in model.named_modules() if isinstance(x, AttentionLayer)}


@contextmanager
def record_attention(
    model: nn.Module,
    layers: Iterable[str] | None = None,
    *,
    keep: Callable[[AttentionLayer, Tensor], Any] | None = None,
    num_images: int | None = None,
) -> Iterator[dict[str, list]]:
    """Collects what the layers of a model attend to, as long as the block runs.

    Outside it the model is as it was. Inside, each layer computes its weights besides its output,
    which takes k * k times the memory of a head's map: record few layers of large images, or
    ``keep`` less of them.

    Args:
        model (nn.Module): any that has attention layers of this package, compiled or not.
        layers (iterable of str): names as in :func:`attention_layers`; None is all.
        keep: called with the layer and its weights; what it returns is recorded in their place.
        num_images (int): records the first ones of each batch; None is all.

    Yields:
        dict[str, list]: for each layer, one item a call in the order of the calls: a head of
        RetinaNet is called once for each level of the FPN. An item is what the layer's
        ``attention_weights`` returns: Tensor[N, num_heads, k * k, H, W] without gradient, on the
        device of the input; for the attention stem k is the side of a block.

    Raises:
        ValueError: for a name that no attention layer has, with the names there are.

    Example::

        >>> with record_attention(model, ["backbone.bottom_up.res5.0.attention"]) as recorded:
        ...     model(inputs)
        >>> (weights,) = recorded["backbone.bottom_up.res5.0.attention"]
    """
    known = attention_layers(model)
    names = list(known) if layers is None else list(dict.fromkeys(layers))
    for name in names:
        check_layer(name, known)
    recorded: dict[str, list] = {name: [] for name in names}

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: AttentionLayer, inputs: tuple[Tensor, ...], named: dict) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            with torch.no_grad():
                weights = layer.attention_weights(x[:num_images])
                recorded[name].append(weights if keep is None else keep(layer, weights))

        return record

    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # a compiled model does not see hooks of later on
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name in names:
            handle = known[name].register_forward_pre_hook(recorder(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield recorded


def check_layer(name: str, known: Iterable[str]) -> None:
    """Raises ValueError if no attention layer has this name, with the names there are."""
    known = list(known)
    if name not in known:
        there_are = f"there are {', '.join(known)}" if known else "the model has none at all"
        raise ValueError(f"No attention layer is called {name!r}; {there_are}.")
