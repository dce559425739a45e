import copy
import dataclasses
import json

import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file, save_file

from dsco_hf import MatchingTargets
from dsco_hf.data.datasets import load_pixels
from dsco_hf.matching.features import features_and_logits, probe_features
from dsco_hf.matching.files import CONFIG_NAME, WEIGHTS_NAME
from dsco_hf.matching.kernels import fourier_embedding
from dsco_hf.matching.population import rows_of_labels
from dsco_hf.utils.origins import targets_sha256


TENSORS = ("embeddings", "counts", "feature_mean", "feature_std", "frequencies", "probe")
SMALL = {"features": {}, "embedding_dim": 64, "progress": False}
DRAWN = {"num_inference_steps": 3, "guidance_scale": 1.0, **SMALL}


def assert_same(a, b, **tolerance):
    assert (a.class_names, a.class_labels) == (b.class_names, b.class_labels)
    assert a.bandwidth == pytest.approx(b.bandwidth, rel=1e-4 if tolerance else 0, abs=0)
    for name in TENSORS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance or {"rtol": 0, "atol": 0})


def test_targets_equal_a_direct_computation(pipe, targets, real_images):
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    with torch.no_grad():
        features, _ = features_and_logits(pipe.classifier, pixels)
    varying = features.std(0, unbiased=False) > 1e-6
    assert 3 < varying.sum() <= targets.feature_dim == features.shape[1]
    torch.testing.assert_close(targets.feature_mean, features.mean(0))
    torch.testing.assert_close(targets.feature_std[varying], features.std(0, unbiased=False)[varying])
    standardised = (features - targets.feature_mean) / targets.feature_std
    psi = fourier_embedding(standardised, targets.frequencies)
    torch.testing.assert_close(targets.embed(features), psi)
    expected = torch.stack([psi[labels == row].mean(0) for row in range(3)])
    torch.testing.assert_close(targets.embeddings, expected, atol=1e-4, rtol=0)
    assert (targets.embeddings[0] - targets.embeddings[1]).norm() > 0.05  # the classes do differ
    assert targets.counts.tolist() == [9, 7, 5]
    assert (targets.num_classes, targets.embedding_dim) == (3, 256)
    assert torch.equal(targets.probe, probe_features(pipe.classifier))
    provenance = targets.provenance
    assert (provenance["population"], provenance["images"], provenance["skipped"]) == ("data", 21, 0)


@pytest.mark.parametrize("batch_size", [1, 4, 21, 100])
def test_a_stream_gives_the_targets_of_the_dataset(pipe, real_images, batch_size):
    whole = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    stream = real_images.to_iterable_dataset()
    streamed = MatchingTargets.from_dataset(stream, pipe, batch_size=batch_size, **SMALL)
    assert_same(streamed, whole, rtol=1e-4, atol=1e-4)
    assert (streamed.provenance["images"], streamed.provenance["skipped"]) == (21, None)


def test_one_class_and_one_image(pipe, make):
    images = make.images((1,), names=("square",))
    targets = MatchingTargets.from_dataset(images, pipe, **SMALL)
    assert targets.class_labels == [1] and targets.bandwidth == 1.0
    pixels, _, _ = load_pixels(images, num_channels=1)
    psi = targets.embed(features_and_logits(pipe.classifier, pixels)[0])
    torch.testing.assert_close(psi, targets.embeddings, atol=1e-5, rtol=0)


def test_classes_are_matched_by_name_or_by_mapping(pipe, make):
    images = make.images((2, 2), names=("Triangle", "box"))
    targets = MatchingTargets.from_dataset(images, pipe, mapping={"box": "square"}, **SMALL)
    assert (targets.class_names, targets.class_labels) == (["Triangle", "box"], [2, 1])
    with pytest.raises(ValueError, match="no certain match.*'box'"):
        MatchingTargets.from_dataset(images, pipe, **SMALL)


def test_latent_generator_sees_the_data_at_its_own_size(latent_pipe, make):
    images = make.images((2, 2, 2), names=("Tinca tinca", "goldfish", "chainsaw"), size=20)
    targets = MatchingTargets.from_dataset(images, latent_pipe, **SMALL)
    pixels, labels, _ = load_pixels(images, num_channels=3, image_size=8)
    with torch.no_grad():
        psi = targets.embed(features_and_logits(latent_pipe.classifier, pixels)[0])
    torch.testing.assert_close(psi[labels == 2].mean(0), targets.embeddings[2], atol=1e-5, rtol=0)


def test_seed_and_bandwidth(pipe, real_images):
    first = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    assert_same(first, MatchingTargets.from_dataset(real_images, pipe, **SMALL))
    other = MatchingTargets.from_dataset(real_images, pipe, seed=1, **SMALL)
    assert other.bandwidth == first.bandwidth and not torch.equal(other.frequencies, first.frequencies)
    wide = MatchingTargets.from_dataset(real_images, pipe, bandwidth=3.0, **SMALL)
    torch.testing.assert_close(wide.frequencies * 3.0, first.frequencies * first.bandwidth)


def test_generator_targets_are_the_means_of_plain_samples(pipe, monkeypatch):
    drawn = []
    sample = pipe.sample

    def recording(labels, *args, **options):
        drawn.append((labels, sample(labels, *args, **options)))
        return drawn[-1][1]

    pipe.sample = recording
    targets = MatchingTargets.from_generator(
        pipe, ["triangle", 0], samples_per_class=5, batch_size=3, weighting="none", **DRAWN
    )
    assert (targets.class_names, targets.class_labels) == (["triangle", "circle"], [2, 0])
    assert [len(labels) for labels, _ in drawn] == [3, 2, 3, 2]
    with torch.no_grad():
        psi = [targets.embed(features_and_logits(pipe.classifier, o.images * 2 - 1)[0]) for _, o in drawn]
    expected = torch.stack([torch.cat(psi[:2]).mean(0), torch.cat(psi[2:]).mean(0)])
    torch.testing.assert_close(targets.embeddings, expected, atol=1e-4, rtol=0)
    assert targets.counts.tolist() == [5, 5]
    assert targets.provenance["population"] == "generator" and targets.provenance["weighting"] == "none"


def test_generator_targets_read_no_image(pipe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a real image was read")

    monkeypatch.setattr("dsco_hf.matching.targets.shared_batches", refuse)
    monkeypatch.setattr("dsco_hf.matching.targets.dataset_fingerprint", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    targets = MatchingTargets.from_generator(pipe, samples_per_class=4, **DRAWN)
    assert targets.class_names == ["circle", "square", "triangle"]
    assert "dataset" not in targets.provenance and "fingerprint" not in targets.provenance


def test_generator_targets_do_not_depend_on_batches(pipe):
    a, b = (MatchingTargets.from_generator(pipe, samples_per_class=5, batch_size=n, **DRAWN) for n in (5, 2))
    assert_same(a, b, rtol=1e-3, atol=1e-3)
    other = MatchingTargets.from_generator(pipe, samples_per_class=5, seed=1, **DRAWN)
    assert (other.feature_mean - a.feature_mean).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["confidence", "agreement", "none"])
def test_samples_are_weighted_by_the_classifier(pipe, kind):
    sharpen(pipe.classifier)
    drawn = []
    sample = pipe.sample
    pipe.sample = lambda *args, **options: drawn.append(sample(*args, **options)) or drawn[-1]
    weights = {
        "confidence": lambda p: p,
        "agreement": lambda p: (p > 0.5).float(),
        "none": lambda p: torch.ones_like(p),
    }[kind]
    labels = [0] if kind == "agreement" else [0, 1]
    centre(pipe)
    drawn.clear()
    targets = MatchingTargets.from_generator(pipe, labels, samples_per_class=8, weighting=kind, **DRAWN)
    for row, (label, output) in enumerate(zip(labels, drawn, strict=True)):
        features, logits = features_and_logits(pipe.classifier, output.images * 2 - 1)
        w = weights(logits.softmax(1)[:, label]).detach()
        assert targets.counts[row].item() == pytest.approx(w.sum().item(), rel=1e-4)
        psi = targets.embed(features).detach()
        expected = (w[:, None] * psi).sum(0) / w.sum()
        torch.testing.assert_close(targets.embeddings[row], expected, atol=1e-4, rtol=0)
        if kind != "none":
            assert w.std() > 1e-4  # the weights do differ


def test_samples_count_for_every_class_by_their_probability(pipe):
    sharpen(pipe.classifier)
    pipe.classifier.classifier.weight.data.mul_(10)
    drawn, sample = [], pipe.sample
    pipe.sample = lambda *args, **options: drawn.append(sample(*args, **options)) or drawn[-1]
    centre(pipe)
    drawn.clear()
    targets = MatchingTargets.from_generator(pipe, [0, 1], samples_per_class=8, weighting="posterior", **DRAWN)
    features, logits = features_and_logits(pipe.classifier, torch.cat([output.images for output in drawn]) * 2 - 1)
    shares = logits.softmax(1)[:, :2].detach()
    shares = torch.where(shares < 0.01, 0, shares)
    torch.testing.assert_close(targets.counts, shares.sum(0), atol=1e-3, rtol=1e-4)
    psi = targets.embed(features).detach()
    torch.testing.assert_close(targets.embeddings, shares.T @ psi / shares.sum(0)[:, None], atol=1e-4, rtol=0)
    assert shares[:8, 1].max() > 0.5 and shares.min() == 0  # drawn for the other class; for one class only


def sharpen(classifier):
    """Two classes of which samples are on either side; the third is out of reach."""
    with torch.no_grad():
        classifier.classifier.weight.mul_(40)
        classifier.classifier.weight[2] = 0
        classifier.classifier.bias[2] = -1e4


def centre(pipe):
    """Moves the border between the two classes to the middle of the samples of class 0, so that about half agree."""
    probe = MatchingTargets.from_generator(pipe, [0], samples_per_class=8, weighting="none", **DRAWN)
    head = pipe.classifier.classifier
    with torch.no_grad():
        head.bias[:2] -= head(probe.feature_mean[None])[0, :2]


def test_a_class_that_no_sample_agrees_with_is_named(pipe):
    with torch.no_grad():
        pipe.classifier.classifier.bias.copy_(torch.tensor([0.0, 0.0, -1e4]))
    with pytest.raises(ValueError, match=r"have no image to learn a target from: \['triangle'\]"):
        MatchingTargets.from_generator(pipe, ["triangle"], samples_per_class=3, weighting="agreement", **DRAWN)


def test_round_trip(targets, tmp_path):
    targets.provenance["note"] = "Größe"
    targets.save_pretrained(tmp_path / "deep" / "folder")
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    loaded = MatchingTargets.from_pretrained(tmp_path / "deep" / "folder")
    assert_same(loaded, targets)
    assert loaded.provenance == targets.provenance
    loaded = MatchingTargets.from_pretrained(tmp_path / "deep", subfolder="folder")
    assert_same(loaded, targets)


def test_the_second_moment_is_kept_unless_it_is_not_wanted(pipe, real_images, tmp_path):
    with_moment = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    without = MatchingTargets.from_dataset(real_images, pipe, second_moment=False, **SMALL)
    assert without.second_moment is None
    assert_same(with_moment, without)
    assert with_moment.second_moment.shape == (64, 64) and with_moment.second_moment.trace() == pytest.approx(1.0)
    assert with_moment.to("cpu").second_moment is not None
    with_moment.save_pretrained(tmp_path)
    loaded = MatchingTargets.from_pretrained(tmp_path)
    assert torch.equal(loaded.second_moment, with_moment.second_moment)
    drawn = MatchingTargets.from_generator(pipe, samples_per_class=3, **DRAWN)
    assert drawn.second_moment.trace() == pytest.approx(1.0)
    # targets without one have the digest of the time before there was such a field
    without = dataclasses.replace(with_moment, second_moment=None)
    before = {field.name: getattr(without, field.name) for field in dataclasses.fields(without)[:-1]}
    earlier = dataclasses.make_dataclass("Earlier", before)(**before)
    assert targets_sha256(without) == targets_sha256(earlier) != targets_sha256(with_moment)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    save_file({**tensors, "second_moment": torch.zeros(2, 2)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"second_moment has shape \(2, 2\) instead of \(64, 64\)"):
        MatchingTargets.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(targets, tmp_path, name):
    targets.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing.*save_pretrained"):
        MatchingTargets.from_pretrained(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="targets-of-mine"):
        MatchingTargets.from_pretrained(tmp_path / "targets-of-mine")


@pytest.mark.parametrize("keep", [0, 4, 50, 0.5, 0.99])
def test_truncated_tensors(targets, tmp_path, keep):
    targets.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} is damaged: .*(truncated|empty).*Save the targets again"):
        MatchingTargets.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:40], "targets.json is damaged: it may be truncated"),
        (lambda text: "[]", "targets.json is damaged.*a JSON object is needed, this is a list"),
        (lambda text: json.dumps({"class_names": ["a"]}), "lacks.*'class_labels', 'bandwidth', 'provenance'"),
    ],
)
def test_broken_json(targets, tmp_path, change, message):
    targets.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        MatchingTargets.from_pretrained(tmp_path)


def test_files_of_two_different_targets_are_refused(pipe, targets, tmp_path, make):
    targets.save_pretrained(tmp_path)
    two = MatchingTargets.from_dataset(make.images((2, 2), names=("circle", "square")), pipe, **SMALL)
    two.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / WEIGHTS_NAME).replace(tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"do not belong together: for 3 class_names, embeddings has shape \(2, 64\)"):
        MatchingTargets.from_pretrained(tmp_path)


def test_a_class_that_was_edited_out_of_the_json_is_noticed(targets, tmp_path):
    targets.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "class_labels": config["class_labels"][:2]}))
    with pytest.raises(ValueError, match="for 3 class_names, there are 2 class_labels"):
        MatchingTargets.from_pretrained(tmp_path)


def test_tensors_of_something_else(targets, tmp_path, make):
    targets.save_pretrained(tmp_path)
    make.convnet().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").replace(tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="lacks .*'embeddings'"):
        MatchingTargets.from_pretrained(tmp_path)


def test_saving_again_replaces(pipe, targets, tmp_path, real_images):
    MatchingTargets.from_dataset(real_images, pipe, **SMALL).save_pretrained(tmp_path)
    targets.save_pretrained(tmp_path)
    assert MatchingTargets.from_pretrained(tmp_path).embedding_dim == 256


def test_the_classifier_must_be_the_same(pipe, targets, make):
    targets.check_pipeline(pipe)
    with pytest.raises(ValueError, match="the pipeline has none: pass `classifier=`"):
        targets.check_pipeline(make.pipe())
    with pytest.raises(ValueError, match="is not the one that the targets were made with"):
        targets.check_pipeline(make.pipe(classifier=make.convnet(seed=9)))
    with pytest.raises(ValueError, match=rf"gives 32 features, the targets are for {targets.feature_dim}"):
        targets.check_pipeline(make.pipe(classifier=make.convnet(width=8)))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_bfloat16_copy_of_the_classifier_is_the_same(make, real_images, norm):
    pipe = make.pipe(classifier=make.convnet(norm=norm))
    targets = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    low = copy.deepcopy(pipe.classifier).to(torch.bfloat16)
    assert not torch.equal(probe_features(low), targets.probe)
    targets.check_pipeline(make.pipe(classifier=low))


def test_a_classifier_that_sees_nan_is_not_the_same(pipe, targets):
    pipe.classifier.classifier.weight.data.zero_()  # the head does not matter: features come before it
    targets.check_pipeline(pipe)
    for parameter in pipe.classifier.convnet.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="sees other features"):
        targets.check_pipeline(pipe)


def test_features_of_another_size_are_refused(targets):
    with pytest.raises(ValueError, match=f"dimension {targets.feature_dim}, got 5"):
        targets.embed(torch.zeros(2, 5))


@pytest.mark.parametrize("source", ["dataset", "generator"])
def test_missing_or_training_classifier(make, real_images, source):
    def run(pipe):
        if source == "dataset":
            return MatchingTargets.from_dataset(real_images, pipe, **SMALL)
        return MatchingTargets.from_generator(pipe, samples_per_class=2, **DRAWN)

    with pytest.raises(ValueError, match="the pipeline has none: pass `classifier=`"):
        run(make.pipe())
    pipe = make.pipe(classifier=make.convnet())
    pipe.classifier.train()
    before = copy.deepcopy(pipe.classifier.state_dict())
    with pytest.raises(ValueError, match=r"train mode.*pipe.classifier.eval\(\)"):
        run(pipe)
    assert all(torch.equal(value, before[key]) for key, value in pipe.classifier.state_dict().items())


def test_nan_features_are_refused(pipe, real_images):
    next(pipe.classifier.parameters()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="features are not finite for 4 of 4 images .image 0 and following"):
        MatchingTargets.from_dataset(real_images, pipe, batch_size=4, **SMALL)
    with pytest.raises(ValueError, match="not finite for 2 of 2 images .template samples of class 'circle'"):
        MatchingTargets.from_generator(pipe, samples_per_class=2, **DRAWN)


def test_a_class_without_image_is_left_out_and_named(pipe, make, caplog):
    filtered = MatchingTargets.from_dataset(make.images((2, 0, 2)), pipe, **SMALL)
    assert filtered.class_names == ["circle", "triangle"] and filtered.class_labels == [0, 2]
    assert "1 classes have no image and are left out: ['square']" in caplog.text
    two = make.images((2, 2), names=("circle", "square")).select([0, 2])  # the same images, of two classes by name
    renamed = MatchingTargets.from_dataset(two, pipe, **SMALL)
    assert torch.equal(renamed.embeddings, MatchingTargets.from_dataset(two, pipe, **SMALL).embeddings)
    with pytest.raises(ValueError, match=r"1 of 3 classes have no image.*\['square'\].*not streamed"):
        MatchingTargets.from_dataset(make.images((2, 0, 2)).to_iterable_dataset(), pipe, **SMALL)


def test_unreadable_images(pipe, real_images):
    rows = real_images.cast_column("image", copy.deepcopy(real_images.features["image"]))
    images = rows.with_format("arrow")[:]["image"].to_pylist()
    images[4]["bytes"] = b"broken"
    broken = real_images.remove_columns("image").add_column("image", images).cast(real_images.features)
    with pytest.raises(ValueError, match="row 4 cannot be decoded"):
        MatchingTargets.from_dataset(broken, pipe, **SMALL)
    targets = MatchingTargets.from_dataset(broken, pipe, on_error="skip", **SMALL)
    assert (targets.provenance["images"], targets.provenance["skipped"]) == (20, 1)
    assert targets.counts.sum() == 20


def test_columns_of_the_wrong_type(pipe, real_images):
    with pytest.raises(ValueError, match="No column is of type Image.*label"):
        MatchingTargets.from_dataset(real_images.remove_columns("image"), pipe, **SMALL)
    with pytest.raises(ValueError, match="No column is of type ClassLabel.*image"):
        MatchingTargets.from_dataset(real_images.remove_columns("label"), pipe, **SMALL)


def test_generator_arguments(pipe, make):
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"`samples_per_class` must be a whole number of at least 1, got {count}"):
            MatchingTargets.from_generator(pipe, samples_per_class=count, **DRAWN)
    with pytest.raises(ValueError, match="`weighting` must be one of .* Nearest: 'agreement'"):
        MatchingTargets.from_generator(pipe, samples_per_class=2, weighting="agreemnt", **DRAWN)
    with pytest.raises(ValueError, match="no class 'circel'. Nearest: 'circle'"):
        MatchingTargets.from_generator(pipe, ["circel"], samples_per_class=2, **DRAWN)
    with pytest.raises(ValueError, match="outside the generator's 3 classes"):
        MatchingTargets.from_generator(pipe, [3], samples_per_class=2, **DRAWN)
    pipe = make.pipe(classifier=make.convnet(names=("cat", "dog", "cow")))
    with pytest.raises(ValueError, match="trained on others.*Or pass `weighting='none'`"):
        MatchingTargets.from_generator(pipe, samples_per_class=2, **DRAWN)
    assert MatchingTargets.from_generator(pipe, samples_per_class=2, weighting="none", **DRAWN).num_classes == 3


def test_nan_generator(pipe):
    next(pipe.transformer.parameters()).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite for 2 of 2 images"):
        MatchingTargets.from_generator(pipe, samples_per_class=2, **DRAWN)


def test_rows_of_labels():
    assert rows_of_labels([7, 3, 9], [9, 7, 7]).tolist() == [2, 0, 0]
    with pytest.raises(
        ValueError, match=r"no targets for class\(es\) \[4\] of the generator; there are for \[3, 7, 9\]"
    ):
        rows_of_labels([7, 3, 9], [3, 4])


def test_label_names_are_kept(pipe, real_images, targets):
    assert targets.class_names == real_images.features["label"].names
    renamed = real_images.cast_column("label", ClassLabel(names=["SQUARE", "circle", "triangle"]))
    assert MatchingTargets.from_dataset(renamed, pipe, **SMALL).class_labels == [1, 0, 2]
