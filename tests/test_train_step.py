"""A step in parts, and in mixed precision: what is equal to the plain step, and what is refused."""

import copy
import io
import re

import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
import detectron2.modeling.meta_arch.retinanet as detectron2_retinanet
from conftest import CONFIGS
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from sasa_det.config import check_processes, load_config
from sasa_det.divergence import DivergedError, are_finite, give_errors_as_losses
from sasa_det.train_step import StepTrainer

DEMO = str(CONFIGS / "demo.yaml")
# No norm looks at other images of a batch.
GROUP_NORMS = ["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
GROUP_NORMS += ["MODEL.RESNETS.WIDTH_PER_GROUP", "32"]


def make_model(*overrides):
    torch.manual_seed(0)
    return build_model(load_config(DEMO, overrides))


def make_batches(steps, size=4):
    generator = torch.Generator().manual_seed(0)

    def picture(number):
        boxes = torch.rand(1 + number, 2, generator=generator) * 30
        objects = Instances((64, 64))
        objects.gt_boxes = Boxes(torch.cat([boxes, boxes + 20], dim=1))
        objects.gt_classes = torch.arange(1 + number)
        image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        return {"image": image, "instances": objects}

    return [[picture(number) for number in range(size)] for _ in range(steps)]


def train(model, kind=StepTrainer, steps=4, **options):
    """The sum of the losses of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = make_batches(steps)
    trainer = kind(model, batches, optimizer, **options)
    losses = []
    with EventStorage() as trainer.storage:
        for trainer.iter in range(len(batches)):
            trainer.run_step()
            losses.append(trainer.storage.latest()["total_loss"][0])
    return losses


@pytest.fixture(scope="module")
def whole():
    model = make_model(*GROUP_NORMS)
    return train(model), model


def test_it_is_detectron2s_step_bit_for_bit(whole):
    losses, model = whole
    theirs = make_model(*GROUP_NORMS)
    # detectron2's own loss, too.
    theirs.losses = detectron2_retinanet.RetinaNet.losses.__get__(theirs)
    with torch.jit.optimized_execution(False):
        assert train(theirs, SimpleTrainer) == losses
    assert theirs.loss_normalizer == model.loss_normalizer != 100
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.fixture(scope="module")
def whole_in_double():
    model = make_model(*GROUP_NORMS).double()
    return train(model, steps=2), model


@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_batch_in_parts_is_the_whole_batch(num_parts, whole_in_double):
    losses, model = whole_in_double
    in_parts = make_model(*GROUP_NORMS).double()
    # detectron2 computes the focal loss in float32 whatever it is given.
    assert train(in_parts, steps=2, num_parts=num_parts) == pytest.approx(losses, rel=5e-7)
    assert in_parts.loss_normalizer == pytest.approx(model.loss_normalizer, rel=1e-12)
    for name, tensor in model.state_dict().items():
        actual = in_parts.state_dict()[name]
        torch.testing.assert_close(actual, tensor, rtol=1e-9, atol=1e-10, msg=name)


def test_bfloat16_trains_on_the_cpu_with_losses_near_those_of_float32(whole):
    model = make_model(*GROUP_NORMS)
    seen = set()
    model.backbone.register_forward_hook(lambda *call: seen.add(call[-1]["p3"].dtype))
    losses = train(model, precision=torch.bfloat16, num_parts=2)
    assert seen == {torch.bfloat16}
    assert losses == pytest.approx(whole[0], rel=0.02)
    assert losses != pytest.approx(whole[0], rel=1e-6)
    assert {x.dtype for x in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("overrides", "processes", "sentence"),
    [
        (["SOLVER.AMP.ENABLED", "True"], 1, "SOLVER.AMP.PRECISION float16 needs a GPU; set it to"),
        ([], 3, "SOLVER.IMS_PER_BATCH is 4, which cannot be shared out to 3 processes in 1 parts"),
        (["SOLVER.ACCUMULATION_STEPS", "4"], 2, "choose a multiple of 8"),
    ],
)
def test_a_batch_or_precision_that_cannot_be_is_refused(overrides, processes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_processes(load_config(DEMO, overrides), processes)


def test_what_the_next_step_needs_is_in_the_state(whole):
    model = make_model(*GROUP_NORMS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = StepTrainer(model, [], optimizer)
    model.loss_normalizer = 55.5
    state = trainer.state_dict()
    model.loss_normalizer = 100
    trainer.load_state_dict(state)
    assert model.loss_normalizer == 55.5


def state_of(model, trainer):
    moments = trainer.state_dict()["optimizer"]["state"]
    tensors = [*model.state_dict().values(), *(x for y in moments.values() for x in y.values())]
    return [x.clone() for x in tensors], model.loss_normalizer


def make_trainer_with_a_bad_batch(bad, **options):
    """After a good step; the gradient of one layer, or else one of the images, is not finite."""
    model = make_model()
    batches = make_batches(3)
    for step, batch in enumerate(batches):
        for number, picture in enumerate(batch):
            picture["file_name"] = f"{step}{number}.png"
    if bad == "image":
        batches[1][1]["image"] = batches[1][1]["image"] * float("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = StepTrainer(model, batches, optimizer, **options)
    if bad == "gradient":
        weight = model.backbone.fpn_lateral3.weight
        weight.register_hook(lambda x: x * float("inf") if trainer.iter == 1 else x)
    with EventStorage() as trainer.storage:
        trainer.iter = 0
        trainer.run_step()
    return model, trainer


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("bad", ["image", "gradient"])
def test_nothing_is_learned_from_a_batch_that_is_not_finite(bad, num_parts):
    model, trainer = make_trainer_with_a_bad_batch(bad, num_parts=num_parts, max_skipped=1)
    tensors, average = state_of(model, trainer)
    with EventStorage() as trainer.storage:
        for trainer.iter in (1, 2):
            trainer.run_step()
            if trainer.iter == 1:
                now, average_now = state_of(model, trainer)
                assert average_now == average
                assert all(map(torch.equal, now, tensors))
    assert trainer.num_skipped == 1
    now, _ = state_of(model, trainer)
    assert not all(map(torch.equal, now, tensors))
    assert all(x.isfinite().all() for x in now)


@pytest.mark.parametrize("bad", ["image", "gradient"])
def test_one_such_batch_too_many_stops_with_step_losses_and_files(bad):
    model, trainer = make_trainer_with_a_bad_batch(bad)
    tensors, average = state_of(model, trainer)
    trainer.iter = 1
    with EventStorage() as trainer.storage, pytest.raises(DivergedError) as error:
        trainer.run_step()
    shown = "nan" if bad == "image" else r"\d\.\d+"
    assert re.fullmatch(
        rf"The loss or its gradient is not finite in step 1 \(loss_cls {shown}, loss_box_reg "
        r".*\), whose batch is 10\.png, 11\.png, 12\.png, 13\.png",
        str(error.value),
    )
    assert error.value.facts["files"] == ["10.png", "11.png", "12.png", "13.png"]
    now, average_now = state_of(model, trainer)
    assert average_now == average
    assert all(map(torch.equal, now, tensors))


def test_a_scale_that_is_too_great_is_the_scalers_business():
    """With its scale at 1, infinite gradients are no overflow of scaled losses any more."""
    model, trainer = make_trainer_with_a_bad_batch("gradient")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = {name: x.clone() for name, x in model.named_parameters()}
    trainer.iter = 1
    with EventStorage() as trainer.storage:
        trainer.run_step()
        assert trainer.grad_scaler.get_scale() == 1.0
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
        assert trainer.num_skipped == 0
        trainer.iter = 1
        with pytest.raises(DivergedError):
            trainer.run_step()


def test_a_loss_that_is_not_finite_is_none_of_the_scalers_business():
    _, trainer = make_trainer_with_a_bad_batch("image")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.iter = 1
    with EventStorage() as trainer.storage, pytest.raises(DivergedError):
        trainer.run_step()


def test_what_is_great_is_finite():
    great = torch.full((4,), 1e30)  # its square is not
    assert are_finite([great, torch.zeros(3)])
    assert not are_finite([great, torch.tensor([1.0, float("inf")])])
    assert not are_finite([torch.tensor([float("nan")]), great])


def test_losses_without_gradients_leave_the_average_of_the_training_alone():
    model, (batch, *_) = make_model(*GROUP_NORMS), make_batches(1)
    model.num_parts = 2
    with EventStorage():
        wanted = model(batch)
        foreground = model._foreground.clone()
        model.loss_normalizer = 50
        with torch.no_grad():
            losses = model(batch)
    assert model.loss_normalizer == 50
    assert torch.equal(model._foreground, foreground)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, 2 * wanted[name].detach() / model.num_parts)


def test_a_trained_model_may_be_pickled_and_copied():
    model, (batch, *_) = make_model(*GROUP_NORMS), make_batches(1)
    give_errors_as_losses(model)
    content = io.BytesIO()
    torch.save(model, content)
    content.seek(0)
    copies = [torch.load(content, weights_only=False), copy.deepcopy(model)]
    with EventStorage():
        wanted = model(batch)
        for other in copies:
            assert other.forward.args == (other,)
            assert other(batch).keys() == wanted.keys()
