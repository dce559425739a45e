"""The training loop: learns, repeats, resumes, weighs labels as stated, and says what is wrong."""

import dataclasses
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from dsco_hf.evaluators import (
    PROTOCOLS,
    Execution,
    ImageSet,
    TrainingDivergedError,
    accuracy,
    build_evaluator,
    get_protocol,
    predict_logits,
    train_evaluator,
)
from dsco_hf.evaluators.augmentation import CutMix, HorizontalFlip, RandomShift
from dsco_hf.evaluators.batches import counts_of, hard_label_loss, learned_label_loss, soft_label_loss
from dsco_hf.evaluators.training import epoch_batches, fast_layout, make_optimizer


NAMES = ["dark", "left", "right"]
QUICK = get_protocol("quick", steps=12, learning_rate=0.01)
# For comparing weights: AdamW would blow up the rounding errors of gradients that are zero in exact arithmetic.
EXACT = get_protocol("quick", steps=6, learning_rate=0.05, optimizer="sgd", momentum=0.0)


def builder(architecture="convnet-2", **options):
    options = {"width": 4, **options} if architecture.startswith("convnet") else options
    names = options.pop("class_names", NAMES)
    return partial(build_evaluator, architecture, class_names=names, image_size=8, num_channels=1, **options)


def toy(count=30, seed=0):
    """Dark images, and images with a bright left or right half."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.rand(count, 1, 8, 8, generator=generator) * 0.6 - 1
    pixels[labels == 1, :, :, :4] += 1
    pixels[labels == 2, :, :, 4:] += 1
    return pixels, labels


def train(model=None, data=None, **options):
    soft_labels, images = options.pop("soft_labels", None), data or toy()
    options = {"protocol": QUICK, "seed": 3, "test": ImageSet(*toy(15, seed=9)), **options}
    return train_evaluator(model or builder(), ImageSet(*images, soft_labels=soft_labels), **options)


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("width", "layout"), [(4, torch.contiguous_format), (16, torch.channels_last)])
def test_the_layout_is_one_in_which_gradients_stay_within_their_memory(width, layout):
    """On CPUs with AVX2 the process would die of it: https://github.com/uxlfoundation/oneDNN/issues/6035."""
    model = builder("resnet-18", width=width)()
    assert fast_layout(model, torch.device("cpu")) == layout


@pytest.mark.parametrize("architecture", ["convnet-2", "resnet-18", "resnet-small"])
def test_learns(architecture):
    options = {"width": 4} if architecture == "resnet-18" else {}
    if architecture == "resnet-small":
        options = {"image_size": 32, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
        model = partial(build_evaluator, architecture, class_names=NAMES, num_channels=1, **options)
    else:
        model = builder(architecture, **options)
    result = train(model, protocol=get_protocol("quick", steps=40, learning_rate=0.01))
    assert result.accuracy == 1.0
    assert result.steps == 40 and result.loss < 0.5 and result.images_per_second > 0
    assert not result.model.training


def test_same_seed_same_result_and_the_callers_randomness_is_left_alone():
    torch.manual_seed(11)
    first = train(protocol=dataclasses.replace(QUICK, augmentation=(RandomShift(), CutMix())))
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(1))
    second = train(protocol=dataclasses.replace(QUICK, augmentation=(RandomShift(), CutMix())))
    other = train(protocol=dataclasses.replace(QUICK, augmentation=(RandomShift(), CutMix())), seed=4)
    assert first.loss == second.loss and first.accuracy == second.accuracy
    assert same_weights(first.model, second.model) and not same_weights(first.model, other.model)


class Killed(Exception):
    """Stands for the signal."""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_killed_at_any_epoch_and_resumed_is_identical(tmp_path, optimizer, dropout, epoch):
    model = builder()
    if dropout:
        vit = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = builder("vit", patch_size=4, hidden_dropout_prob=0.3, **vit)
    protocol = get_protocol(
        "quick", epochs=6, batch_size=8, optimizer=optimizer, augmentation=(HorizontalFlip(), RandomShift(), CutMix())
    )
    whole = train(model, protocol=protocol)
    path = tmp_path / "checkpoint.safetensors"

    def kill(metrics):
        if metrics["epoch"] == epoch:
            raise Killed

    with pytest.raises(Killed):
        train(model, protocol=protocol, checkpoint=path, checkpoint_seconds=0, on_epoch=kill)
    assert path.exists() and not list(tmp_path.glob("*.partial"))
    resumed = train(model, protocol=protocol, checkpoint=path, checkpoint_seconds=0)
    assert same_weights(whole.model, resumed.model)
    assert (whole.loss, whole.accuracy, whole.steps) == (resumed.loss, resumed.accuracy, resumed.steps)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    protocol = get_protocol("quick", epochs=3)
    train(protocol=protocol, checkpoint=path, checkpoint_seconds=0)
    for changed, told in (
        ({"seed": 4}, "seed: 3 there, 4 now"),
        ({"protocol": get_protocol("quick", epochs=4)}, "protocol.epochs: 3 there, 4 now"),
        ({"data": toy(seed=1)}, "images: '[0-9a-f]{16}' there, '[0-9a-f]{16}' now"),
    ):
        with pytest.raises(ValueError, match=rf"belongs to another run \({told}.*\)\. Set them as they were"):
            train(**{"protocol": protocol, "checkpoint": path, **changed})


def test_parts_of_a_batch_give_the_gradient_of_the_whole(monkeypatch):
    protocol = dataclasses.replace(EXACT, batch_size=10, augmentation=(CutMix(),))
    whole = train(protocol=protocol)
    monkeypatch.setattr("dsco_hf.evaluators.batches.CPU_PIXELS", 3 * 64)
    parts = train(protocol=protocol)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)


def test_layout_of_the_weights_is_given_back(tmp_path):
    result = train(builder(width=8), protocol=EXACT)
    assert all(p.is_contiguous() for p in result.model.parameters())
    result.model.save_pretrained(tmp_path)


def test_hard_labels_of_mixed_images_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    labels, others = torch.tensor([0, 1]), torch.tensor([1, 1])
    own = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    other = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-1))) / 2
    assert hard_label_loss(logits, labels, others).item() == pytest.approx(own)
    assert hard_label_loss(logits, labels, others, weight=0.3).item() == pytest.approx(0.3 * own + 0.7 * other)


def test_weighted_losses_by_hand():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    first, second = math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))
    counts = counts_of(torch.tensor([9.0, 3.0, 0.0]), torch.tensor([0, 1]))  # 4 in the mean
    assert counts.tolist() == [2.25, 0.75]
    found = hard_label_loss(logits, labels, labels, counts=counts)
    assert found.item() == pytest.approx((2.25 * first + 0.75 * second) / 2)
    targets = torch.nn.functional.one_hot(labels, 2).float()
    assert soft_label_loss(logits, targets, temperature=1.0, counts=counts).item() == pytest.approx(found.item())
    mixed = counts_of(torch.tensor([9.0, 3.0, 0.0]), torch.tensor([0, 1]), torch.tensor([1, 0]), 0.8)
    assert mixed.tolist() == pytest.approx([0.8 * 2.25 + 0.2 * 0.75, 0.8 * 0.75 + 0.2 * 2.25])
    once = hard_label_loss(logits, labels, labels, counts=torch.ones(2))
    torch.testing.assert_close(once, hard_label_loss(logits, labels, labels))


def test_images_of_weight_zero_teach_nothing(tmp_path):
    pixels, labels = toy()
    wrong = torch.cat([labels, (labels + 1) % 3])
    twice, weights = torch.cat([pixels, pixels]), torch.cat([torch.full((30,), 7.0), torch.zeros(30)])
    test = ImageSet(*toy(15, seed=9))
    given = {"protocol": dataclasses.replace(QUICK, steps=60), "seed": 3, "test": test}
    misled = train_evaluator(builder(), ImageSet(twice, wrong), **given)
    taught = train_evaluator(builder(), ImageSet(twice, wrong, weights=weights), **given)
    assert taught.accuracy > 0.9 > misled.accuracy
    ones = ImageSet(pixels, labels, weights=torch.full((30,), 2.0))
    assert ones.digest != ImageSet(pixels, labels).digest
    assert ones.select(torch.tensor([3, 1])).weights.tolist() == [2, 2]
    for bad, message in (
        (torch.ones(29), r"Weights have shape \(29,\), but 30 images need \(30,\): pass one for each image"),
        (torch.full((30,), math.nan), "finite numbers of at least 0"),
        (torch.zeros(30), "not all 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_evaluator(builder(), ImageSet(pixels, labels, weights=bad), **given)


def test_soft_labels_are_kl_without_a_temperature_factor():
    logits, teacher = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.0]])
    p, q = (teacher / 20).softmax(1)[0], (logits / 20).softmax(1)[0]
    expected = sum(p[k] * (p[k] / q[k]).log() for k in range(2)).item()
    assert soft_label_loss(logits, (teacher / 20).softmax(1), temperature=20.0).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_teacher_labels_are_learned_and_the_teacher_is_left_alone():
    teacher = train(protocol=get_protocol("quick", steps=60, learning_rate=0.01)).model
    before = [p.clone() for p in teacher.parameters()]
    protocol = get_protocol(
        "rded-soft-small", steps=60, learning_rate=0.01, image_size=8, augmentation=(CutMix(),), norm="instance"
    )
    pixels, labels = toy()
    wrong = labels.roll(1)  # hard labels must not be looked at
    result = train(protocol=protocol, teacher=teacher, data=(pixels, wrong))
    assert result.accuracy == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_stored_labels_match_the_teachers_where_nothing_is_augmented():
    teacher = train().model
    pixels, labels = toy()
    stored = predict_logits(teacher, pixels).softmax(1)
    soft = train(protocol=dataclasses.replace(EXACT, label_type="stored", temperature=4.0), soft_labels=stored)
    live = train(protocol=dataclasses.replace(EXACT, label_type="teacher", temperature=4.0), teacher=teacher)
    for a, b in zip(soft.model.parameters(), live.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_learned_labels_are_learned_by_their_squared_error_from_the_mean_label():
    assert learned_label_loss(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]])) == 5.5
    pixels, labels = toy()
    wanted = F.one_hot(labels, 3).float() * 3 - 1  # below 0 and above 1
    protocol = get_protocol("quick", steps=200, learning_rate=0.01, label_type="learned", augmentation=(CutMix(0.2),))
    result = train(protocol=protocol, data=(pixels, labels.roll(1)), soft_labels=wanted)
    assert result.accuracy == 1.0
    logits = predict_logits(result.model, pixels)
    assert (logits - wanted + 1 / 3).abs().mean() < 0.3
    with pytest.raises(ValueError, match="are no finite numbers"):
        train(protocol=protocol, soft_labels=wanted * math.nan)


def test_one_hot_stored_labels_are_hard_labels():
    pixels, labels = toy()
    protocol = dataclasses.replace(EXACT, label_type="stored", augmentation=(CutMix(),))
    soft = train(protocol=protocol, soft_labels=F.one_hot(labels, 3).float())
    hard = train(protocol=dataclasses.replace(EXACT, augmentation=(CutMix(),)))
    for a, b in zip(soft.model.parameters(), hard.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_last_epoch_is_reported_and_the_best_only_on_request():
    seen = []
    protocol = get_protocol("quick", epochs=4, learning_rate=0.05, best_every=1)
    result = train(protocol=protocol, track_best=True, on_epoch=seen.append)
    assert [metrics["epoch"] for metrics in seen] == [1, 2, 3, 4]
    assert all("loss" in metrics for metrics in seen)
    assert result.accuracy_best == max([result.accuracy, *(m["accuracy"] for m in seen if "accuracy" in m)])
    plain = train(protocol=protocol)
    assert plain.accuracy_best is None and plain.accuracy == result.accuracy
    pixels, labels = toy(15, seed=9)
    assert plain.accuracy == accuracy(predict_logits(plain.model, pixels), labels)


def test_nan_names_the_step_and_keeps_the_checkpoint(tmp_path):
    pixels, labels = toy()
    path = tmp_path / "checkpoint.safetensors"
    protocol = get_protocol(
        "quick", epochs=20, batch_size=10, optimizer="sgd", learning_rate=1e30, schedule="constant"
    )
    with pytest.raises(TrainingDivergedError, match=r"at step \d+ of 60 .*learning rate 1e\+30.*older and kept"):
        train(
            protocol=protocol,
            checkpoint=_good_checkpoint(path, protocol),
            checkpoint_seconds=0,
        )
    assert path.exists()
    pixels[4] = float("nan")
    with pytest.raises(TrainingDivergedError, match="became nan at step 1 of 12"):
        train(data=(pixels, labels), protocol=dataclasses.replace(QUICK, batch_size=30))


def test_weights_that_are_no_numbers_never_replace_a_checkpoint(tmp_path):
    pixels, labels = toy()
    path = tmp_path / "checkpoint.safetensors"
    protocol = get_protocol(
        "quick", epochs=20, batch_size=30, optimizer="sgd", learning_rate=1e38, schedule="constant"
    )
    # The loss of the first step is finite; its gradient, a thousand times too large, is what breaks the weights.
    options = {"data": (pixels * 1000, labels), "protocol": protocol, "checkpoint": path, "checkpoint_seconds": 0}
    with pytest.raises(TrainingDivergedError, match="weights are no finite numbers after step 1 of 20"):
        train(builder(norm="none"), **options)
    assert not path.exists()


def _good_checkpoint(path, protocol):
    """The checkpoint of a run that was killed before its first step went wrong."""
    from dsco_hf.evaluators.training import _Run, epoch_seed

    torch.manual_seed(epoch_seed(3, 0))
    run = _Run(builder()(), ImageSet(*toy()), protocol, 3, None, Execution())
    run.save(run.checkpoint(path))
    return path


def test_batches_cover_all_images_and_none_is_a_single_one():
    generator, cpu = torch.Generator(), torch.device("cpu")
    for images, size in ((10, 4), (9, 4), (3, 8), (2, 1), (65, 64)):
        batches = epoch_batches(images, size, generator=generator, device=cpu)
        assert sorted(torch.cat(batches).tolist()) == list(range(images))
        assert all(len(batch) >= 2 for batch in batches) or size == 1
    assert [len(b) for b in epoch_batches(65, 64, generator=generator, device=cpu)] == [65]


def test_one_image_per_class_trains_with_batch_norm():
    assert train(builder("resnet-18", width=4), data=toy(3)).steps == 12


def test_biases_and_norms_are_spared_by_weight_decay_where_the_protocol_says():
    model = builder()()
    groups = make_optimizer(model, get_protocol("rded-soft")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim == 1 for p in groups[1]["params"])
    assert len(make_optimizer(model, get_protocol("minimax-hard")).param_groups) == 1


def test_mixed_precision():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        result = train(
            protocol=get_protocol("quick", steps=40, learning_rate=0.01),
            execution=Execution(Accelerator(cpu=True, mixed_precision="bf16")),
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert result.accuracy == 1.0
    assert result.model.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_networks_learn_the_same():
    small = builder("convnet-1", width=2)
    plain, compiled = (train(small, protocol=EXACT, execution=Execution(compiled=way)) for way in (False, True))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
    for a, b in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_only_what_most_batches_have_is_compiled(monkeypatch):
    seen = []

    def compiled(network, dynamic):
        return lambda inputs: (seen.append(len(inputs)), network(inputs))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    options = {"protocol": get_protocol("quick", steps=6, batch_size=12), "data": toy(30)}  # batches of 12, 12 and 6
    fast = train(execution=Execution(compiled=True), **options)
    assert seen == [12, 12, 12, 12] and same_weights(fast.model, train(**options).model)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_runs_on_gray_and_colour(name):
    protocol = get_protocol(name, steps=2, batch_size=6)
    for channels in (1, 3):
        model = partial(build_evaluator, "convnet-2", class_names=NAMES, image_size=8, num_channels=channels, width=4)
        teacher = model() if protocol.label_type == "teacher" else None
        pixels, labels = toy(12)
        data = (pixels.expand(-1, channels, -1, -1), labels)
        result = train(model, data=data, protocol=protocol, teacher=teacher, test=None)
        assert result.steps == 2 and math.isfinite(result.loss) and result.accuracy is None


def test_bad_images_and_labels():
    pixels, labels = toy()
    cases = [
        ((pixels[:0], labels[:0]), "training set is empty"),
        ((pixels[labels == 1], labels[labels == 1]), "All 10 training images have the label 1"),
        ((pixels, labels + 1), "run from 1 to 3, but the evaluator has 3 classes"),
        ((pixels[:5], labels), r"\(5, 1, 8, 8\)"),
    ]
    for data, message in cases:
        with pytest.raises(ValueError, match=message):
            train(data=data)
    with pytest.raises(ValueError, match="test labels run from"):
        train(test=ImageSet(toy(15)[0], torch.full((15,), 7)))


def test_bad_label_sources():
    pixels, labels = toy()
    stored = dataclasses.replace(QUICK, label_type="stored")
    soft = F.one_hot(labels, 3).float()
    cases = [
        ({"protocol": stored}, "`soft_labels` of the images is missing"),
        ({"protocol": dataclasses.replace(QUICK, label_type="teacher")}, "`teacher` is missing"),
        ({"protocol": stored, "soft_labels": soft[:, :2]}, r"need \(30, 3\)"),
        ({"protocol": stored, "soft_labels": soft * 2}, "30 of 30 soft labels .* row 0 with sum 2"),
        ({"protocol": stored, "soft_labels": soft * math.nan}, "are no probabilities"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            train(**options)


def test_a_teacher_with_other_classes_is_refused_by_name():
    protocol = dataclasses.replace(QUICK, label_type="teacher")
    with pytest.raises(ValueError, match=r"3 classes, and the teacher has 3 without \['right'\]"):
        train(protocol=protocol, teacher=builder(class_names=["dark", "left", "up"])())
    with pytest.raises(ValueError, match=r"3 classes, and the teacher has 2 without \['right'\]"):
        train(protocol=protocol, teacher=builder(class_names=["dark", "left"])())
