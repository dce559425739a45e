"""What errors about trainings, of evaluators and of generators, say to do is done, and works."""

import dataclasses

import pytest
import torch

from advice import follow, is_of
from dsco_hf import (
    ImageSet,
    get_protocol,
    train_evaluator,
)
from dsco_hf.data.pixels import load_pixels
from dsco_hf.evaluators.batches import check_images, check_soft_labels, class_columns
from dsco_hf.evaluators.evaluation import load_image_set, run_job
from dsco_hf.evaluators.models import build_evaluator
from dsco_hf.evaluators.protocols import protocol_from_dict
from dsco_hf.generators.base import denoiser_of
from dsco_hf.generators.denoisers import GeneratorTrainingConfig
from dsco_hf.generators.training import train_generator


TINY = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "train_steps": 1, "batch_size": 4}
GENERATOR = GeneratorTrainingConfig(**TINY)


def six():
    """An evaluator of six classes."""
    return build_evaluator("convnet-1", class_names=list("abcdef"), image_size=8)


def oblong(w):
    return w.real.map(lambda row: {"image": row["image"].resize((8, 6))})


def toy(labels=(0, 1, 2, 0)):
    torch.manual_seed(0)
    return torch.randn(len(labels), 1, 8, 8), torch.tensor(labels)


def trained(w, *, pixels=None, path=None, **options):
    x, labels = toy()
    given = {"protocol": get_protocol("quick", steps=2, **options.pop("changes", {})), **options}
    images = ImageSet(x if pixels is None else pixels, labels)
    return train_evaluator(w.make.convnet(), images, checkpoint=path, **given).steps


def job(w, seed, folder="jobs"):
    run_job("a", lambda key, path: {"accuracy": seed}, settings=lambda key: {"seed": seed}, folder=w.folder / folder)
    return seed


def generator(w, rows=None, *, image_size=None, channels=1, **options):
    x, y = load_pixels(w.real if rows is None else rows, image_size=image_size, num_channels=channels)[:2]
    config = dataclasses.replace(GENERATOR, **options.pop("config", {}))
    return train_generator(x, y, config, num_classes=3, progress=False, **options).step


def resumable(w, folder="g", **options):
    return generator(w, checkpoint_dir=w.folder / folder, **options)


def stopped(w):
    """A training that was stopped after its first epoch."""

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(w, path=w.folder / "c", checkpoint_seconds=0, on_epoch=stop)


EVALUATORS = {
    "labels that the evaluator does not have": (
        lambda w: check_images(*toy((0, 1, 5)), 3),
        "build it with the class names of the training set",
        lambda w: check_images(*toy((0, 1, 5)), len(six().config.id2label)),
        None,
    ),
    "logits for soft labels": (
        lambda w: check_soft_labels(torch.tensor([[2.0, -1.0]]), 1, 2),
        "logits need a softmax first",
        lambda w: check_soft_labels(torch.tensor([[2.0, -1.0]]).softmax(1), 1, 2),
        None,
    ),
    "other names of classes": (
        lambda w: class_columns(["a", "b"], ["b", "c"], what="the teacher"),
        "Use the same names for both; their order does not matter",
        lambda w: class_columns(["a", "b"], ["b", "a"], what="the teacher"),
        [1, 0],
    ),
    "a test set for no training set": (
        lambda w: load_image_set(w.real, protocol=get_protocol("quick"), test_for=w.real),
        "must be the training set that `load_image_set` read",
        lambda w: (
            load_image_set(
                w.real,
                protocol=get_protocol("quick"),
                test_for=load_image_set(w.real, protocol=get_protocol("quick")),
            ).labels
        ),
        is_of(21),
    ),
    "no protocol": (
        lambda w: load_image_set(w.real, protocol="quick"),
        r"`get_protocol\(name\)` finds one",
        lambda w: load_image_set(w.real, protocol=get_protocol("quick")).labels,
        is_of(21),
    ),
    "a protocol without a name": (
        lambda w: protocol_from_dict({"epochs": 3}),
        "give them, or `base`, the name of a protocol that it differs from",
        lambda w: [
            protocol_from_dict({"epochs": 3, "name": "mine", "source": "me"}).epochs,
            protocol_from_dict({"epochs": 3, "base": "quick"}).epochs,
        ],
        [3, 3],
    ),
    "a job of other settings": (
        lambda w: [job(w, 0), job(w, 1)],
        "Set them as they were, remove .*jobs, or write to another folder",
        lambda w: [job(w, 0), job(w, 1, "others"), (w.folder / "jobs").rename(w.folder / "old") and job(w, 1)],
        [0, 1, 1],
    ),
    "a checkpoint of another training": (
        lambda w: [stopped(w), trained(w, path=w.folder / "c", seed=1)],
        "Set them as they were to go on, delete it to start anew, or write to another folder",
        lambda w: [
            trained(w, path=w.folder / "c"),
            trained(w, path=w.folder / "d", seed=1),
            (w.folder / "c").unlink(missing_ok=True) or trained(w, path=w.folder / "c", seed=1),
        ],
        [2, 2, 2],
    ),
    "a loss that is no number": (
        lambda w: trained(w, pixels=toy()[0] * float("nan")),
        "or check the images and soft labels for NaN",
        lambda w: trained(w, pixels=(toy()[0] * float("nan")).nan_to_num()),
        2,
    ),
}

GENERATORS = {
    "images that are no squares": (
        lambda w: generator(w, oblong(w)),
        r"`load_pixels\(image_size=...\)` crops them",
        lambda w: generator(w, oblong(w), image_size=6),
        1,
    ),
    "no checkpoints alone": (
        lambda w: resumable(w, distributed=False),
        "leave `checkpoint_dir` out, or train together",
        lambda w: [generator(w, distributed=False), resumable(w)],
        [1, 1],
    ),
    "a time limit without a checkpoint": (
        lambda w: generator(w, max_minutes=5.0),
        "`max_minutes` needs a `checkpoint_dir` to continue from",
        lambda w: resumable(w, max_minutes=5.0),
        1,
    ),
    "a checkpoint that is there": (
        lambda w: [resumable(w), resumable(w)],
        r"Pass `resume=True` \(`--resume`\) to continue it, or delete it",
        lambda w: [
            resumable(w, resume=True),
            (w.folder / "g").rename(w.folder / "old") and resumable(w),
        ],
        [1, 1],
    ),
    "a checkpoint of other settings": (
        lambda w: [resumable(w), resumable(w, resume=True, config={"seed": 4})],
        "Set them as they were to go on, delete it to start anew, or write to another folder",
        lambda w: [resumable(w, resume=True), resumable(w, "h", config={"seed": 4})],
        [1, 1],
    ),
    "a checkpoint of an earlier version": (
        lambda w: [(w.folder / "g" / "step-00000001").mkdir(parents=True), resumable(w, resume=True)],
        "delete it to start anew, or finish that training with the version that began it",
        lambda w: [(w.folder / "g" / "step-00000001").rmdir(), resumable(w, resume=True)][1:],
        [1],
    ),
    "a denoiser of other classes": (
        lambda w: generator(w, denoiser=w.make.transformer(classes=5)),
        r"`denoiser_of\(network\).adapt` changes classes and size; or bring the images to the size with "
        "`image_size`, to the channels with `num_channels`",
        lambda w: [
            generator(w, denoiser=denoiser_of(w.make.transformer(classes=5)).adapt(num_classes=3)),
            generator(w, image_size=4, denoiser=w.make.transformer(sample_size=4)),
            generator(w, channels=3, denoiser=w.make.transformer(channels=3)),
        ],
        [1, 1, 1],
    ),
}


TABLE = EVALUATORS | GENERATORS


@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
