"""Whatever is kept is used again where nothing that decides it has changed, and only there."""

import copy
import dataclasses
import shutil
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler

from conftest import NAMES, striped_images
from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    RunSession,
    build_evaluator,
    concentrate,
    concentrate_to_folder,
    get_protocol,
    train_evaluator,
)
from dsco_hf.data.datasets import dataset_fingerprint
from dsco_hf.evaluators import Execution, TrainingJob, load_image_set, run_job, train_job
from dsco_hf.generators.data import TrainingData
from dsco_hf.matching.kept import kept_targets, pipeline_identity
from dsco_hf.studies.kept import KeptSets, kept_check


QUICK = get_protocol("quick", epochs=2, image_size=8)
OTHER_VERSIONS = {"torch": "0.0"}
MODULES = ("evaluators.training", "evaluators.evaluation", "matching.kept", "concentration.runs", "matching.targets",
           "generators.training")  # fmt: skip
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def other_versions(monkeypatch):
    """A function after which the libraries have other versions."""

    def change():
        for module in MODULES:
            monkeypatch.setattr(f"dsco_hf.{module}.versions", lambda: OTHER_VERSIONS)

    return change


def half(mixed_precision):
    """An accelerator of another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision=mixed_precision)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def soft(model, shift):
    """A teacher whose last bias is shifted."""
    with torch.no_grad():
        model.classifier.bias.add_(shift)
    return model


class Killed(Exception):
    pass


CHANGES = ["nothing", "teacher", "teacher's preprocessing", "protocol", "seed", "pixels", "labels", "weights",
           "precision", "test images", "versions"]  # fmt: skip


@pytest.mark.parametrize("changed", CHANGES)
def test_the_checkpoint_of_a_training(changed, make, tmp_path, other_versions):
    images = load_image_set(striped_images((4, 4, 4)), protocol=QUICK, num_channels=1)
    options = {
        "protocol": get_protocol("quick", epochs=2, label_type="teacher"), "seed": 0, "teacher": make.convnet(),
        "test": images, "track_best": True,
        "checkpoint": tmp_path / "c.safetensors", "checkpoint_seconds": 0,
    }  # fmt: skip
    model = partial(build_evaluator, "convnet-2", class_names=NAMES, image_size=8, num_channels=1, width=4)
    trained, epochs = images, []

    def kill(metrics):
        raise Killed

    with pytest.raises(Killed):
        train_evaluator(model, trained, on_epoch=kill, **options)
    if changed == "teacher":
        options["teacher"] = soft(make.convnet(), 1.0)
    elif changed == "teacher's preprocessing":
        options["teacher"].config.image_mean = [0.25]
    elif changed == "protocol":
        options["protocol"] = dataclasses.replace(options["protocol"], temperature=2.0)
    elif changed == "seed":
        options["seed"] = 1
    elif changed == "pixels":
        trained = dataclasses.replace(images, pixels=images.pixels.clone())
        trained.pixels[-1, 0, 0, 0] += 0.5
    elif changed == "labels":
        trained = dataclasses.replace(images, labels=images.labels.roll(1))
    elif changed == "weights":
        model = model()  # begins with the weights of PyTorch's generator, not with those of the seed
    elif changed == "precision":
        options["execution"] = Execution(half("bf16"))
    elif changed == "test images":
        options["test"] = dataclasses.replace(images, labels=images.labels.roll(1))
    elif changed == "versions":
        other_versions()
    if changed == "nothing":
        train_evaluator(model, trained, on_epoch=epochs.append, **options)
        assert [epoch["epoch"] for epoch in epochs] == [2]  # goes on after the first
    else:
        with pytest.raises(ValueError, match=r"belongs to another run \(.*: .* there, .* now"):
            train_evaluator(model, trained, **options)


@pytest.mark.parametrize("changed", [
    "nothing", "images", "test images", "soft labels", "architecture", "options", "seed", "protocol", "teacher",
    "teacher's preprocessing", "precision", "compiled", "best", "versions",
])  # fmt: skip
def test_the_job_of_an_evaluator(changed, make, tmp_path, other_versions):
    images = load_image_set(striped_images((4, 4, 4)), protocol=QUICK, num_channels=1)
    job = {
        "architecture": "convnet-2", "overrides": {"width": 4}, "execution": Execution(Accelerator()),
        "protocol": dataclasses.replace(QUICK, label_type="teacher"), "teacher": make.convnet(),
    }  # fmt: skip
    sets, done = [images, images], []

    def run(key, checkpoint):
        done.append(key)
        return train_job(TrainingJob(**job), *sets)

    def ask():
        run_job("job", run, settings=lambda key: TrainingJob(**job).identity(*sets), folder=tmp_path)

    ask()
    if changed == "images":
        sets[0] = dataclasses.replace(images, pixels=-images.pixels)
    elif changed == "test images":
        sets[1] = dataclasses.replace(images, labels=images.labels.roll(1))
    elif changed == "soft labels":
        sets[0] = dataclasses.replace(images, soft_labels=torch.full((12, 3), 1 / 3))
    elif changed == "teacher":
        job["teacher"] = soft(make.convnet(), 1.0)
    elif changed == "teacher's preprocessing":
        job["teacher"].config.image_std = [0.25]
    elif changed == "precision":
        job["execution"] = Execution(half("bf16"))
    elif changed == "versions":
        other_versions()
    elif changed != "nothing":
        job |= {
            "architecture": {"architecture": "convnet-1"}, "options": {"overrides": {"width": 5}}, "seed": {"seed": 1},
            "protocol": {"protocol": dataclasses.replace(QUICK, label_type="teacher", weight_decay=0.5)},
            "compiled": {"execution": Execution(Accelerator(), compiled=True)}, "best": {"track_best": True},
        }[changed]  # fmt: skip
    if changed == "nothing":
        ask()
        return
    names = {
        "test images": "test_images", "options": "options.width", "teacher's preprocessing": "teacher",
        "soft labels": "images", "precision": "mixed_precision", "best": "track_best",
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=rf"other settings or data \({names.get(changed, changed)}.*: .* there, .* now"
    ):
        ask()
    assert done == ["job"]


def flipped(dataset, row):
    """The dataset with one other image."""
    return dataset.map(
        lambda one, index: {"image": one["image"].rotate(180) if index == row else one["image"]}, with_indices=True
    )


@pytest.mark.slow
def test_the_fingerprint_of_a_dataset_sees_every_image_and_label():
    rows = striped_images((700, 700, 700))
    base = dataset_fingerprint(rows)
    assert base == dataset_fingerprint(striped_images((700, 700, 700)))
    for row in (1, 1047, 2099):
        assert dataset_fingerprint(flipped(rows, row)) != base
    labels = rows["label"][:]
    for row in (3, 1200):
        other = [*labels[:row], (labels[row] + 1) % 3, *labels[row + 1 :]]
        changed = rows.remove_columns("label").add_column("label", other).cast(rows.features)
        assert dataset_fingerprint(changed) != base


def test_the_fingerprint_of_a_large_dataset_sees_every_label(monkeypatch):
    monkeypatch.setattr("dsco_hf.data.datasets._FINGERPRINT_BYTES", 1000)
    rows = striped_images((700, 700, 700))
    base, labels = dataset_fingerprint(rows), rows["label"][:]
    changed = rows.remove_columns("label").add_column("label", [*labels[:3], (labels[3] + 1) % 3, *labels[4:]])
    assert dataset_fingerprint(changed.cast(rows.features)) != base
    assert dataset_fingerprint(flipped(rows, 0)) != base  # one of those that are read


@pytest.mark.parametrize("part", ["clean", "labels", "std", "mirrored"])
def test_what_a_generator_learns_from(part):
    def data():
        mirrored = TrainingData(torch.full((700, 1, 2, 2), 2.0), torch.zeros(700, dtype=torch.int64))
        return TrainingData(torch.zeros(700, 1, 2, 2), torch.zeros(700, dtype=torch.int64), torch.ones(700), mirrored)

    base, other = data(), data()
    assert base.fingerprint == other.fingerprint
    tensor = other.mirrored.clean if part == "mirrored" else getattr(other, part)
    tensor[341] += 1  # no multiple of anything
    assert base.fingerprint != other.fingerprint


REAL = ["nothing", "image", "label", "classifier", "classifier's preprocessing", "dtype", "options", "versions",
        "denoiser"]  # fmt: skip


@pytest.mark.parametrize("renew", [False, True])
@pytest.mark.parametrize("changed", REAL)
def test_targets_of_real_images(changed, renew, pipe, make, tmp_path, other_versions):
    made, real, options = [], striped_images((3, 3, 3)), {"seed": 0}

    def ask():
        def build(**shared):
            made.append(shared["work_dir"])
            return MatchingTargets.from_dataset(real, pipe, embedding_dim=8, progress=False, **options, **shared)

        identity = pipeline_identity(pipe, real, draws=False, **options)
        return kept_targets(tmp_path / "targets", identity, build, accelerator=Accelerator(), renew=renew)

    first = ask()
    if changed == "image":
        real = flipped(real, 4)
    elif changed == "label":
        real = striped_images((3, 2, 4))
    elif changed == "classifier":
        pipe.register_modules(classifier=make.convnet(seed=7))
    elif changed == "classifier's preprocessing":
        pipe.classifier.config.image_mean = [0.3]
    elif changed == "dtype":
        pipe.classifier.half().float()
        pipe.classifier.classifier.half()
    elif changed == "options":
        options["seed"] = 1
    elif changed == "versions":
        other_versions()
    elif changed == "denoiser":  # which no real image passes through
        pipe.register_modules(transformer=make.transformer(seed=5))
    if changed in ("nothing", "denoiser"):
        again = ask()
        assert len(made) == 1 and torch.equal(first.embeddings, again.embeddings)
    elif renew and changed != "dtype":
        ask()
        assert len(made) == 2 and made[0] != made[1] and not list(tmp_path.glob("targets-work-*"))
    elif not renew:
        with pytest.raises(ValueError, match="holds targets that were made otherwise .* there, .* now.*Remove it"):
            ask()
        assert len(made) == 1
        if changed != "dtype":  # whose networks do not fit together
            shutil.rmtree(tmp_path / "targets")  # as it says
            ask()
            assert len(made) == 2


PASSES = ["nothing", "class names", "scheduler", "denoiser", "classifier", "versions"]


@pytest.mark.parametrize("changed", PASSES)
def test_the_feature_files_of_a_pass_over_samples(changed, pipe, make, tmp_path, other_versions):
    options = {"samples_per_class": 2, "embedding_dim": 8, "work_dir": tmp_path, "progress": False, **SAMPLING}
    first = MatchingTargets.from_generator(pipe, **options)
    if changed == "class names":
        pipe = DsCoPipeline(**pipe.components, id2label={0: "square", 1: "circle", 2: "triangle"})
    elif changed == "scheduler":
        pipe.register_modules(scheduler=DDIMScheduler(clip_sample=False))
    elif changed == "denoiser":
        pipe.register_modules(transformer=make.transformer(seed=5))
    elif changed == "classifier":
        pipe.register_modules(classifier=make.convnet(seed=7))
    elif changed == "versions":
        other_versions()
    if changed == "nothing":
        assert torch.equal(MatchingTargets.from_generator(pipe, **options).embeddings, first.embeddings)
    else:
        with pytest.raises(ValueError, match="holds the features of another pass; these differ: .* there, .* now"):
            MatchingTargets.from_generator(pipe, **options)


def test_feature_files_of_latents_know_the_autoencoder(make, tmp_path):
    pipe = DsCoPipeline(make.transformer(channels=4), DDIMScheduler(), vae=make.vae(), id2label=dict(enumerate(NAMES)))
    features = {"network": "random", "space": "latents"}
    options = {"features": features, "embedding_dim": 8, "work_dir": tmp_path, "progress": False}
    MatchingTargets.from_dataset(striped_images((2, 2, 2), size=16), pipe, **options)
    pipe.register_modules(vae=make.vae(seed=8))
    with pytest.raises(ValueError, match="these differ: networks.vae: "):
        MatchingTargets.from_dataset(striped_images((2, 2, 2), size=16), pipe, **options)


@pytest.mark.parametrize(
    "changed", ["nothing", "real", "class_labels", "num_inference_steps", "denoiser", "classifier", "versions"]
)
def test_the_check_of_a_generator(changed, pipe, make, tmp_path, other_versions, monkeypatch):
    real, options = striped_images((3, 3, 3)), {"images_per_class": 1, "class_labels": None, **SAMPLING}
    first = kept_check(tmp_path / "check.json", pipe, real, **options)
    sampled, sample = [], pipe.sample
    monkeypatch.setattr(pipe, "sample", lambda *args, **given: sampled.append(args) or sample(*args, **given))
    if changed == "real":
        real = flipped(real, 0)
    elif changed == "denoiser":
        pipe.register_modules(transformer=make.transformer(seed=5))
    elif changed == "classifier":
        pipe.register_modules(classifier=make.convnet(seed=7))
    elif changed == "versions":
        other_versions()
    elif changed != "nothing":
        options[changed] = {"class_labels": [0, 2], "num_inference_steps": 3}[changed]
    again = kept_check(tmp_path / "check.json", pipe, real, **options)
    assert bool(sampled) == (changed != "nothing")
    if changed == "nothing":
        assert again == first


def test_a_kept_set_and_its_record(pipe, targets, tmp_path):
    kept, made_with = KeptSets(tmp_path / "sets"), {"seed": 0, "options": {"contrast": 0.0}}
    rows = concentrate(pipe, targets, 1, progress=False, **SAMPLING)
    assert "a" not in kept and not kept.is_made("a", made_with)
    kept.save("a", rows, made_with, seconds=1.5)
    assert kept.is_made("a", copy.deepcopy(made_with)) and kept.told("a")["seconds"] == 1.5
    again = kept.rows("a")
    assert again.info.description == rows.info.description and again.features == rows.features
    assert [image.tobytes() for image in again["image"]] == [image.tobytes() for image in rows["image"]]
    assert not kept.is_made("a", {**made_with, "seed": 1}) and not kept.is_made("a", {"seed": 0})
    kept.file("a").with_suffix(".json").write_text("{")
    assert not kept.is_made("a", made_with)


@pytest.mark.parametrize("changed", ["nothing", "measure_by", "versions", "dtype"])
def test_a_run_folder(changed, pipe, targets, tmp_path, other_versions):
    options = {"seed": 0, "progress": False, **SAMPLING}
    judge = {"measure_by": None}
    concentrate_to_folder(pipe, targets, 1, tmp_path, **judge, **options)
    if changed == "measure_by":  # the discrepancies of finished units are kept, too
        judge["measure_by"] = dataclasses.replace(targets, embeddings=targets.embeddings * 0.9)
    elif changed == "versions":
        other_versions()
    elif changed == "dtype":
        pipe.transformer.half()
    if changed == "nothing":
        assert concentrate_to_folder(pipe, targets, 1, tmp_path, **judge, **options).session["images"] == 0
        return
    name = {"dtype": "models.transformer", "versions": "versions.torch"}.get(changed, changed)
    with pytest.raises(ValueError, match=f"holds a run with other settings .*{name}: .*accept_changed=.*{name}"):
        concentrate_to_folder(pipe, targets, 1, tmp_path, **judge, **options)
    if changed != "dtype":
        accepted = {"session": RunSession(accept_changed=[changed]), **judge, **options}
        assert concentrate_to_folder(pipe, targets, 1, tmp_path, **accepted).session["images"] == 0
