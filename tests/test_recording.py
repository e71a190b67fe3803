"""``record_attention``: sees what layers attend to, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from sasa_det.layers import (
    LocalSelfAttention2d,
    StemSelfAttention2d,
    attention_layers,
    record_attention,
)
from sasa_det.ops.reference import local_attention_reference, stem_attention_reference


class Classifier(nn.Module):
    """A stem, and a layer that runs on two levels."""

    def __init__(self):
        super().__init__()
        self.stem = StemSelfAttention2d(3, 8, num_heads=2)
        self.shared = LocalSelfAttention2d(8, 8, kernel_size=5, num_heads=2)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem(x), 4)
        return self.shared(x), self.shared(x[:, :, ::2, ::2])


@pytest.fixture
def model():
    return Classifier().eval()


def hooks(model):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_each_call_is_recorded_and_the_model_is_as_it_was(model):
    images = torch.randn(3, 3, 32, 48)
    before, hooks_before = model(images), hooks(model)
    with record_attention(model) as recorded:
        within = model(images)
    after = model(images)
    shapes = {name: [tuple(w.shape) for w in calls] for name, calls in recorded.items()}
    assert shapes == {
        "stem": [(3, 2, 16, 32, 48)],
        "shared": [(3, 2, 25, 8, 12), (3, 2, 25, 4, 6)],  # in the order of the calls
    }
    assert hooks(model) == hooks_before
    for x, y, z in zip(before, within, after):
        torch.testing.assert_close((x, x), (y, z), rtol=0, atol=0)


def test_an_exception_within_leaves_no_hook_behind(model):
    before = hooks(model)
    with pytest.raises(ValueError, match="query_weight"), record_attention(model):
        model(torch.randn(1, 5, 8, 8))
    assert hooks(model) == before


def test_what_is_kept_and_of_how_many_images_can_be_chosen(model):
    def entropy(layer, weights):
        assert layer is model.shared
        return torch.special.entr(weights).sum(dim=2).mean(dim=(1, 2, 3))

    images = torch.randn(3, 3, 32, 48)
    with record_attention(model, ["shared"], keep=entropy, num_images=2) as recorded:
        model(images)
    assert list(recorded) == ["shared"]
    assert [x.shape for x in recorded["shared"]] == [(2,), (2,)]


def test_an_unknown_layer_is_named_with_those_there_are(model):
    with (
        pytest.raises(ValueError, match=r"called 'res5'; there are stem, shared\."),
        record_attention(model, ["shared", "res5"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="called 'stem'; the model has none at all"),
        record_attention(nn.Conv2d(3, 8, 1), ["stem"]),
    ):
        pass
    assert attention_layers(nn.Conv2d(3, 8, 1)) == {}


def test_gradients_do_not_reach_what_is_recorded_and_are_the_same(model):
    images = torch.randn(1, 3, 16, 16)
    sum(x.sum() for x in model(images)).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with record_attention(model) as recorded:
        sum(x.sum() for x in model(images)).backward()
    assert not any(w.requires_grad for calls in recorded.values() for w in calls)
    for parameter, grad in zip(model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=0)


def test_a_compiled_model_is_seen_too(model):
    images = torch.randn(1, 3, 16, 16)
    compiled = torch.compile(model, backend="eager")
    wanted = compiled(images)
    with record_attention(compiled, ["_orig_mod.shared"]) as recorded:
        compiled(images)
    assert len(recorded["_orig_mod.shared"]) == 2
    torch.testing.assert_close(compiled(images), wanted)


def test_the_weights_of_the_stem_are_those_of_its_output():
    """Values that are one at a single pixel show what each position attends to there."""
    heads, block, size = 2, 4, (5, 6)  # blocks are clipped at both borders
    layer = StemSelfAttention2d(3, 8, block, heads).double()
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    weights = layer.attention_weights(image)
    assert weights.shape == (1, heads, block * block, *size)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[:, :, 0]))
    query, key = layer.query_key_weight.chunk(2)
    height, width = size
    for row in range(height):
        for col in range(width):
            # A fourth channel of the image that neither queries nor keys see.
            spot = torch.zeros(1, 1, *size, dtype=torch.float64)
            spot[..., row, col] = 1
            with_spot = torch.cat([image, spot], dim=1)
            blind = [torch.nn.functional.pad(w, (0, 1)) for w in (query, key)]
            value = torch.zeros(1, 8, 4, dtype=torch.float64)
            value[..., 3] = 1
            mixture = torch.ones(1, block, block, dtype=torch.float64)
            output = stem_attention_reference(
                with_spot, *blind, value, mixture, layer.rel_rows, layer.rel_cols, num_heads=heads
            )
            top, left = layer.window_corner(row, col)
            index = (row - top) * block + col - left
            inside = torch.zeros(size, dtype=torch.float64)
            inside[top : top + block, left : left + block] = 1
            actual = weights[0, :, index] * inside  # of the positions in its block
            torch.testing.assert_close(actual, output[0].unflatten(0, (heads, -1))[:, 0])


def test_the_stems_weights_are_float32_in_half_precision():
    layer = StemSelfAttention2d(3, 8, num_heads=2).bfloat16()
    assert layer.attention_weights(torch.randn(1, 3, 8, 8).bfloat16()).dtype == torch.float32


def test_the_first_weight_is_of_the_windows_corner():
    layer = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2)
    x = torch.randn(1, 8, 6, 7)
    weights = layer.attention_weights(x)
    query, key, _ = layer.projection(x).chunk(3, dim=1)
    top, left = layer.window_corner(2, 4)
    assert (top, left) == (1, 3)
    spot = torch.zeros_like(x)
    spot[:, :, top, left] = 1
    output = local_attention_reference(
        query, key, spot, layer.rel_rows, layer.rel_cols, num_heads=2, kernel_size=3
    )
    seen = output.float()[0].unflatten(0, (2, -1))[:, 0, 2, 4]
    torch.testing.assert_close(weights[0, :, 0, 2, 4], seen)


def test_a_layer_may_be_called_by_keyword():
    layer, x = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2), torch.randn(1, 8, 6, 7)
    with record_attention(layer) as recorded:
        layer(x=x)
    torch.testing.assert_close(recorded[""][0], layer.attention_weights(x))
