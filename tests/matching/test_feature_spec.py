import json
import logging
import math

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dsco_hf import DsCoPipeline, Herding, MatchingTargets, NOpt, concentrate, dope
from dsco_hf.data.datasets import load_pixels
from dsco_hf.evaluators.preprocessing import preprocess
from dsco_hf.matching.discrepancy import measure_discrepancy
from dsco_hf.matching.feature_spec import POOLED, FeatureSource, FeatureSpec, feature_specs, layer_weights
from dsco_hf.matching.features import features_and_logits, observe, pool
from dsco_hf.sampling.methods.released import RandomExtractor


SMALL = {"embedding_dim": 64, "progress": False}
FAST = {"guidance_scale": 1.0, "num_inference_steps": 4, "progress": False}


def vit():
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))


def swin():
    config = SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2, num_labels=3
    )
    return SwinForImageClassification(config)


def convnext():
    config = ConvNextConfig(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    return ConvNextForImageClassification(config)


def mobilenet():
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=16, depth_multiplier=0.1, num_labels=3))


def efficientnet():
    sizes = {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "image_size": 32}
    return EfficientNetForImageClassification(EfficientNetConfig(**sizes, num_labels=3))


ZOO = {"vit": vit, "swin": swin, "convnext": convnext, "mobilenet": mobilenet, "efficientnet": efficientnet}


@pytest.fixture
def build(make):
    """Tiny classifiers of transformers for small colour images, by name; "resnet" too."""

    def builder(name, seed=0):
        torch.manual_seed(seed)
        if name == "resnet":
            return make.resnet(seed=seed)
        model = ZOO[name]().eval()
        model.config.image_size = 32 if name == "efficientnet" else 16
        model.config.image_mean, model.config.image_std = [0.5] * 3, [0.5] * 3
        return model

    return builder


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def hooks(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("name", [*ZOO, "resnet"])
def test_every_kind_of_classifier_gives_its_layers_pooled(build, name):
    model, x = build(name), pixels(3, 3, 16, 16).requires_grad_(True)
    states = model(preprocess(x, model), output_hidden_states=True)
    wanted = states.get("reshaped_hidden_states") or states.hidden_states
    state, before = wanted[1], hooks(model)  # transformers leaves hooks of its own, once
    layers = [("pooled", "average"), ("hidden_1", "average"), ("hidden_1", "mean_std"), ("logits", "average")]
    seen = observe(model, x, layers=layers)
    pooled, logits = features_and_logits(model, x)
    positions = state[:, 1:].transpose(1, 2) if state.ndim == 3 else state.flatten(2)  # a ViT's class token apart
    mean, std = positions.mean(dim=2), positions.std(dim=2, unbiased=False)
    parts = seen.features.split([pooled.shape[1], mean.shape[1], mean.shape[1], mean.shape[1], 3], dim=1)
    assert torch.equal(parts[0], pooled) and torch.equal(parts[4], logits) and torch.equal(seen.logits, logits)
    torch.testing.assert_close(parts[1], mean)
    torch.testing.assert_close(parts[2], mean)
    torch.testing.assert_close(parts[3], std, atol=2e-3, rtol=0)
    parts[3].sum().backward()
    assert x.grad.flatten(1).norm(dim=1).min() > 0
    assert hooks(model) == before


def test_class_token_and_quarters(build):
    model, x = build("vit"), pixels(2, 3, 16, 16)
    state = model(x, output_hidden_states=True).hidden_states[2]  # (2, 1 + 4 x 4, 8)
    assert torch.equal(observe(model, x, layers=[("hidden_2", "cls")]).features, state[:, 0])
    quarters = observe(model, x, layers=[("hidden_2", "grid2")]).features.view(2, 8, 2, 2)
    torch.testing.assert_close(quarters[:, :, 0, 1], state[:, [3, 4, 7, 8]].mean(dim=1))
    torch.testing.assert_close(quarters[:, :, 1, 0], state[:, [9, 10, 13, 14]].mean(dim=1))


def test_tokens_are_laid_out_as_the_images_are():
    tokens = torch.arange(2 * 11).float().view(1, 11, 2)  # 3 extra tokens and 2 x 4 patches of a wide image
    cells = pool(tokens, "grid2", layer="x", grid=(8, 16)).view(1, 2, 2, 2)
    torch.testing.assert_close(cells[0, 0], torch.tensor([[7.0, 11.0], [15.0, 19.0]]))
    torch.testing.assert_close(pool(tokens[:, 3:], "average", layer="x", grid=(8, 16)), tokens[:, 3:].mean(dim=1))


def test_own_models_are_read_by_module(make):
    convnet, x = make.convnet(), pixels(3, 1, 8, 8)
    seen = observe(convnet, x, layers=[("convnet.blocks.3", "average"), ("pooled", "average")])
    torch.testing.assert_close(seen.features[:, :6], convnet.convnet.blocks[:4](x).mean(dim=(2, 3)))
    assert torch.equal(seen.features[:, 6:], features_and_logits(convnet, x)[0])


def test_pooled_features_are_what_they_always_were_bit_for_bit(pipe, real_images, targets):
    default = MatchingTargets.from_dataset(real_images, pipe, features={}, **SMALL)
    named = MatchingTargets.from_dataset(real_images, pipe, features=FeatureSpec(), **SMALL)
    assert default.features == named.features == POOLED
    for name in ("embeddings", "feature_mean", "feature_std", "frequencies", "probe"):
        assert torch.equal(getattr(default, name), getattr(named, name))
    x = load_pixels(real_images)[0]
    seen = FeatureSource(pipe, POOLED)(x)
    assert all(torch.equal(a, b) for a, b in zip(seen, observe(pipe.classifier, x), strict=True))
    torch.testing.assert_close(default.feature_mean, seen.features.mean(dim=0))


def test_unknown_layers_are_refused_with_what_there_is(build, make):
    x = pixels(2, 3, 16, 16)
    resnet = build("resnet")
    with pytest.raises(ValueError, match=r"no layer 'hidden_9'.*Nearest: 'hidden_.*hidden_0, hidden_1, hidden_2"):
        observe(resnet, x, layers=[("hidden_9", "average")])
    with pytest.raises(ValueError, match=r"no layer 'poold'.*Nearest: 'pooled'.*its modules: resnet, resnet.embedder"):
        observe(resnet, x, layers=[("poold", "average")])
    with pytest.raises(ValueError, match=r"returns no hidden states: choose .*convnet.blocks"):
        observe(make.convnet(channels=3), x, layers=[("hidden_1", "average")])


def test_poolings_that_do_not_fit_are_refused(build):
    x = pixels(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"'cls' takes the class token of a vision transformer.*feature map"):
        observe(build("resnet"), x, layers=[("hidden_1", "cls")])
    with pytest.raises(ValueError, match=r"'cls' .*none among its 16 tokens"):
        pool(torch.zeros(2, 16, 8), "cls", layer="x", grid=(16, 16))
    with pytest.raises(ValueError, match=r"'grid2' needs a map of at least 2x2 .*'hidden_15' has 1x1"):
        observe(build("mobilenet"), x, layers=[("hidden_15", "grid2")])
    with pytest.raises(ValueError, match="pooling='grid2' needs positions"):
        FeatureSpec(pooling="grid2")


def test_specs_in_any_form():
    spec = FeatureSpec(layers=("pooled", "hidden_3"), pooling="grid2")
    assert feature_specs({"layers": ["pooled", "hidden_3"], "pooling": "grid2"}) == (spec,)
    assert feature_specs("{layers: [pooled, hidden_3], pooling: grid2}") == (spec,)
    assert feature_specs([spec, {"network": "random"}]) == (spec, FeatureSpec(network="random"))
    assert FeatureSpec("hidden_3").layers == ("hidden_3",)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"layer": "pooled"}, r"no field 'layer'.*Nearest: 'layers'"),
        ({"pooling": "averge"}, r"`pooling` must be one of .*got 'averge'.*Nearest: 'average'"),
        ({"network": "clasifier"}, r"`network` must be one of .*Nearest: 'classifier'"),
        ({"space": "latent"}, r"`space` must be one of .*Nearest: 'latents'"),
        ({"layers": []}, "must be different names of layers"),
        ({"layers": ["pooled", "pooled"]}, "must be different names of layers"),
        ({"network": "random", "layers": ["hidden_1"]}, "random network has one layer"),
        ([{}, {}], "none twice"),
        ([], "at least one layer"),
        ("pooled", "must be a FeatureSpec"),
        ("{layers: [", "not valid YAML"),
    ],
)
def test_bad_specs_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        feature_specs(given)


def test_layers_count_alike_whatever_their_size():
    weights = layer_weights([2, 6])
    assert weights.shape == (8,)
    assert weights[:2].square().sum() == pytest.approx(4) == weights[2:].square().sum()
    assert torch.equal(layer_weights([5]), torch.ones(5))


@pytest.fixture
def colour_pipe(make, build):
    """Gray 8x8 generator; classifiers for 16x16 colour images."""

    def builder(**classifiers):
        pipe = make.pipe(classifier=make.convnet())
        return DsCoPipeline(
            pipe.transformer, pipe.scheduler, classifier=pipe.classifier, id2label=pipe.id2label, **classifiers
        )

    return builder


def test_targets_of_two_layers(pipe, real_images, tmp_path):
    specs = FeatureSpec(layers=("pooled", "convnet.blocks.3"))
    targets = MatchingTargets.from_dataset(real_images, pipe, features=specs, **SMALL)
    x, labels, _ = load_pixels(real_images)
    features = observe(pipe.classifier, x, layers=[("pooled", "average"), ("convnet.blocks.3", "average")]).features
    sizes = [features.shape[1] - 6, 6]
    std = features.std(dim=0, unbiased=False)
    assert (std[:24] > 0).any() and (std[24:] > 0).all()
    plain = (features - features.mean(dim=0)) / torch.where(std > 0, std, 1.0)
    torch.testing.assert_close(
        (features - targets.feature_mean) / targets.feature_std, plain * layer_weights(sizes), atol=1e-4, rtol=1e-3
    )
    mean = targets.embed(features)[labels == 1].mean(dim=0)
    torch.testing.assert_close(targets.embeddings[1], mean, atol=1e-5, rtol=1e-3)

    targets.save_pretrained(tmp_path)
    loaded = MatchingTargets.from_pretrained(tmp_path)
    assert loaded.features == (specs,) == targets.features
    assert loaded.check_pipeline(pipe).specs == (specs,)
    config = json.loads((tmp_path / "targets.json").read_text())
    del config["features"]  # as files were before there was a choice
    (tmp_path / "targets.json").write_text(json.dumps(config))
    assert MatchingTargets.from_pretrained(tmp_path).features == POOLED


@pytest.mark.parametrize(
    "features",
    [
        FeatureSpec(layers=("pooled", "convnet.blocks.3"), pooling="mean_std"),
        FeatureSpec(network="random"),
        [FeatureSpec(), FeatureSpec(layers=("hidden_1",), pooling="grid2", network="classifier_2")],
    ],
    ids=["two layers", "random", "two classifiers"],
)
def test_noise_is_optimised_for_any_features(colour_pipe, build, real_images, features):
    pipe = colour_pipe(classifier_2=build("resnet"))
    targets = MatchingTargets.from_dataset(real_images, pipe, features=features, **SMALL)
    assert targets.features == feature_specs(features)
    options = {"seeds": range(6), "guidance_scale": 1.0, "num_inference_steps": 6, "method": NOpt("rkhs", start=0.0)}
    ids = [0, 0, 1, 1, 2, 2]
    plain, matched = (pipe.sample(ids, chosen, **options).images * 2 - 1 for chosen in (None, targets))
    rows = torch.tensor(ids)
    before, after = (measure_discrepancy(x, rows, pipe, targets) for x in (plain, matched))
    assert sum(after.values()) < 0.9 * sum(before.values())


def test_blocks_and_herding_use_the_features_of_the_targets(pipe, real_images):
    targets = MatchingTargets.from_dataset(real_images, pipe, features=FeatureSpec(network="random"), **SMALL)
    small = concentrate(pipe, targets, 2, block_size=1, **FAST)
    mixed = dope(small, real_images, pipe, images_per_class=3, strategy=Herding(targets), progress=False)
    assert len(small) == 6 and len(mixed) == 9


def test_calls_are_counted_for_each_network(colour_pipe, build, real_images):
    pipe = colour_pipe(classifier_2=build("resnet"))
    both = [FeatureSpec(), FeatureSpec(network="classifier_2")]
    calls = []
    for features in ({}, both):
        targets = MatchingTargets.from_dataset(real_images, pipe, features=features, **SMALL)
        calls.append(pipe.sample([0, 1], targets, seeds=[0, 1], num_inference_steps=5).classifier_calls)
    assert calls[1] == 2 * calls[0] > 0


def test_data_free_targets_of_other_features(pipe):
    options = {"samples_per_class": 6, "num_inference_steps": 2, "guidance_scale": 1.0, **SMALL}
    targets = MatchingTargets.from_generator(pipe, features=FeatureSpec(network="random"), **options)
    assert targets.feature_dim == 2048 and targets.counts.max() < 6  # weighted by the classifier
    pipe.register_modules(classifier=None)
    with pytest.raises(ValueError, match="asks the pipeline's classifier, and there is none"):
        MatchingTargets.from_generator(pipe, features={"network": "random"}, **options)
    alone = MatchingTargets.from_generator(pipe, features={"network": "random"}, weighting="none", **options)
    assert torch.equal(alone.counts, torch.full((3,), 6.0))
    assert len(concentrate(pipe, alone, 1, **FAST)) == 3


def test_data_free_targets_of_a_label_set(pipe):
    pipe.id2label = {0: "tench, Tinca tinca", 1: "church", 2: "parachute"}
    with pytest.raises(ValueError, match="7 of 10 dataset classes"):
        MatchingTargets.from_generator(pipe, "imagenette", weighting="none", samples_per_class=1, **SMALL)
    with pytest.raises(ValueError, match="no label set 'imagenete'"):
        MatchingTargets.from_generator(pipe, "imagenete", **SMALL)


def test_other_networks_are_refused_layer_by_layer(colour_pipe, build, real_images):
    pipe = colour_pipe(classifier_2=build("resnet"))
    both = [FeatureSpec(), FeatureSpec(network="classifier_2")]
    targets = MatchingTargets.from_dataset(real_images, pipe, features=both, **SMALL)
    assert targets.provenance["classifier_2"] is None  # it has no name, but it was used
    source = targets.check_pipeline(pipe)
    assert [block.shape for block in source.probe()] == [(2, 24), (2, 6)]
    with pytest.raises(ValueError, match="sees other features"):
        targets.check_pipeline(colour_pipe(classifier_2=build("resnet", seed=9)))
    with pytest.raises(ValueError, match="the pipeline has none: pass `classifier_2=`"):
        colour_pipe()([0], targets)
    random = MatchingTargets.from_dataset(real_images, pipe, features=FeatureSpec(network="random"), **SMALL)
    random.features = (FeatureSpec(network="random", seed=1),)
    with pytest.raises(ValueError, match="sees other features"):
        pipe([0], random)


def test_classifier_in_train_mode_or_missing_is_refused(colour_pipe, build, real_images):
    pipe = colour_pipe(classifier_2=build("resnet"))
    pipe.classifier_2.train()
    with pytest.raises(ValueError, match="`classifier_2` is in train mode"):
        MatchingTargets.from_dataset(real_images, pipe, features={"network": "classifier_2"}, **SMALL)
    with pytest.raises(ValueError, match="no layer 'blocks'.*Nearest: 'convnet.blocks'"):
        MatchingTargets.from_dataset(real_images, pipe, features={"layers": ["blocks"]}, **SMALL)


def test_a_second_classifier_is_saved_with_the_pipeline(colour_pipe, build, tmp_path):
    pipe = colour_pipe(classifier_2=build("resnet"))
    pipe.save_pretrained(tmp_path)
    again = DsCoPipeline.from_pretrained(tmp_path)
    x = pixels(2, 1, 8, 8)
    both = [FeatureSpec(), FeatureSpec(network="classifier_2")]
    assert torch.equal(FeatureSource(pipe, both)(x).features, FeatureSource(again, both)(x).features)
    assert DsCoPipeline.from_pretrained(tmp_path, classifier_2=None).classifier_2 is None


@pytest.fixture
def latent_pipe(make, dit_folder):
    """Latents of 4 channels and 4x4, images of 8x8."""
    pipe = DsCoPipeline.from_pretrained(dit_folder, classifier=make.convnet(channels=3))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_classifier(make, seed=2):
    torch.manual_seed(seed)
    model = make.convnet(channels=4)
    config = type(model.config)(**(model.config.to_dict() | {"image_size": 4}))
    return type(model)(config).eval()


def test_features_of_latents_need_no_decoder(latent_pipe, make):
    latent_pipe.register_modules(classifier_2=latent_classifier(make))
    spec = FeatureSpec(network="classifier_2", space="latents")
    names = tuple(latent_pipe.id2label[i] for i in range(3))
    images = make.images(names=names, size=latent_pipe.image_size)
    targets = MatchingTargets.from_dataset(images, latent_pipe, features=spec, **SMALL)
    x = load_pixels(images, num_channels=3)[0]
    latents = latent_pipe.encode_pixels(x, sample_posterior=False)
    expected = latent_pipe.classifier_2.convnet(latents).pooler_output
    torch.testing.assert_close(targets.feature_mean, expected.mean(dim=0))
    options = {"guidance_scale": 1.0, "num_inference_steps": 6, "method": NOpt(start=0.0), "output_type": "latent"}
    distances = []
    for chosen in (None, targets):
        drawn = latent_pipe([0, 0, 1, 1], chosen, generator=make.generators(range(4)), **options)
        psi = targets.embed(FeatureSource(latent_pipe, targets.features)(None, drawn.images).features)
        distances.append((psi.view(2, 2, -1).mean(dim=1) - targets.embeddings[:2]).square().sum(dim=1).mean())
        assert drawn.decoder_calls == 0
    assert drawn.classifier_calls == 20 and distances[1] < 0.9 * distances[0]
    both = MatchingTargets.from_dataset(images, latent_pipe, features=[FeatureSpec(), spec], **SMALL)
    assert latent_pipe([0, 1], both, **options).decoder_calls == 2 * 5


def test_latents_that_a_network_cannot_take_are_refused(latent_pipe, pipe, real_images, make):
    with pytest.raises(ValueError, match=r"`classifier` takes 3 channels of 8 px, the latents have 4 of 4"):
        FeatureSource(latent_pipe, [FeatureSpec(space="latents")])
    with pytest.raises(ValueError, match=r"at least 8 positions a side, the latents have 4"):
        FeatureSource(latent_pipe, [FeatureSpec(network="random", space="latents")])
    with pytest.raises(ValueError, match=r"draws pixels and has no latents"):
        MatchingTargets.from_dataset(real_images, pipe, features={"space": "latents"}, **SMALL)
    with pytest.raises(ValueError, match=r"takes 4 channels, images have 1 or 3.*space='latents'"):
        features_and_logits(latent_classifier(make), pixels(1, 3, 4, 4))


def test_random_network_follows_its_seed_and_is_that_of_the_released_objective(pipe):
    x = pixels(2, 1, 8, 8)
    seen = FeatureSource(pipe, [FeatureSpec(network="random", seed=3)])(x)
    torch.testing.assert_close(seen.features, RandomExtractor(1, seed=3)(x), atol=1e-6, rtol=1e-4)
    assert seen.logits.shape == (2, 0) and math.isfinite(seen.features.sum())


def test_a_classifier_of_other_classes_gives_features_only(make, real_images, caplog):
    pipe = make.pipe(classifier=make.convnet(names=("cat", "dog", "bird")))
    with caplog.at_level(logging.WARNING, "dsco_hf"):
        targets = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    assert "`classifier` was trained on other classes" in caplog.text
    small = concentrate(pipe, targets, 1, **FAST)
    options = {"images_per_class": 2, "progress": False}
    with pytest.raises(ValueError, match="trained on other classes than the dataset.*Or pass a `student`"):
        dope(small, real_images, pipe, strategy="clarity", **options)
    assert len(dope(small, real_images, pipe, strategy="herding", **options)) == 6
