"""Untrained networks as feature specs, and what is matched by default."""

import pytest
import torch

from dsco_hf import MatchingTargets, build_evaluator, concentrate
from dsco_hf.evaluators.preprocessing import preprocess
from dsco_hf.matching.feature_spec import POOLED, UNTRAINED, FeatureSource, FeatureSpec, feature_specs, features_of
from dsco_hf.matching.features import features_and_logits
from dsco_hf.utils.origins import targets_sha256


NARROW = FeatureSpec(network="untrained", architecture="convnet-2", width=5, seed=7)
SMALL = {"embedding_dim": 32, "progress": False}
FAST = {"num_inference_steps": 3, "guidance_scale": 1.0, "progress": False}


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_its_features_are_those_of_an_evaluator_before_its_training(pipe):
    names, x = [str(index) for index in range(10)], pixels(3, 1, 8, 8)
    known = {"class_names": names, "image_size": 8, "num_channels": 1}
    before = torch.get_rng_state()
    seen = FeatureSource(pipe, [NARROW])(x)
    assert torch.equal(torch.get_rng_state(), before)
    network = build_evaluator("convnet-2", seed=7, width=5, **known).eval()
    assert torch.equal(seen.features, features_and_logits(network, x)[0])
    assert seen.logits.shape == (3, 0)  # what an untrained head says means nothing


def test_one_network_of_a_spec_frozen_where_the_pipeline_is(pipe):
    pipe.to(torch.bfloat16)
    (one,), (two,) = (FeatureSource(pipe, [NARROW]).networks for _ in range(2))
    assert one is two and not one.training and one.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in one.parameters())
    (other,) = FeatureSource(pipe, [FeatureSpec(network="untrained", architecture="convnet-2", width=5)]).networks
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_what_a_spec_leaves_open_is_decided_by_the_images():
    sizes = {8: "convnet-3", 16: "convnet-3", 32: "convnet-3", 64: "convnet-4", 256: "convnet-6"}
    for size, architecture in sizes.items():
        made = UNTRAINED.made_for(size)
        assert (made.architecture, made.width, made.seed) == (architecture, 256, 1000)
    assert NARROW.made_for(256) is not UNTRAINED and NARROW.made_for(256) == NARROW
    assert FeatureSpec(network="untrained", architecture="resnet-18").made_for(64).width is None
    assert POOLED[0].made_for(64) == POOLED[0]


def test_by_default_both_networks_are_matched_or_the_one_that_is_there(pipe, real_images):
    targets = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    assert targets.features == (FeatureSpec(), UNTRAINED.made_for(8)) == features_of(pipe)
    assert targets.second_moment is not None
    assert len(concentrate(pipe, targets, 1, **FAST)) == 3
    pipe.register_modules(classifier=None)
    alone = MatchingTargets.from_dataset(real_images, pipe, **SMALL)
    assert alone.features == (UNTRAINED.made_for(8),) and alone.feature_dim == 256 * 2 * 2
    assert len(concentrate(pipe, alone, 1, **FAST)) == 3
    with pytest.raises(ValueError, match="the pipeline has none: pass `classifier=`"):
        targets.check_pipeline(pipe)


def test_it_is_recorded_and_made_again(pipe, real_images, tmp_path):
    both = [{}, {"network": "untrained", "architecture": "convnet-2", "width": 5, "seed": 7}]
    targets = MatchingTargets.from_dataset(real_images, pipe, features=both, **SMALL)
    targets.save_pretrained(tmp_path)
    again = MatchingTargets.from_pretrained(tmp_path)
    assert again.features == targets.features == (FeatureSpec(), NARROW)
    assert targets_sha256(again) == targets_sha256(targets)
    assert torch.equal(torch.cat(again.check_pipeline(pipe).probe(), dim=1), targets.probe)
    again.features = (FeatureSpec(), FeatureSpec(network="untrained", architecture="convnet-2", width=5))
    with pytest.raises(ValueError, match="sees other features"):
        again.check_pipeline(pipe)


def test_a_record_says_of_other_networks_what_it_always_said():
    fields = {"layers": ["pooled"], "pooling": "average", "network": "classifier", "space": "pixels", "seed": 0}
    assert FeatureSpec().as_record() == fields
    assert NARROW.as_record() == {**fields, "network": "untrained", "seed": 7, "architecture": "convnet-2", "width": 5}
    assert feature_specs(NARROW.as_record()) == (NARROW,)


def test_any_architecture_and_latents(latent_pipe, pipe):
    spec = FeatureSpec(network="untrained", architecture="convnet-1", width=3, space="latents")
    source = FeatureSource(latent_pipe, [spec])
    channels, side, _ = latent_pipe.latent_shape
    assert source(None, pixels(2, channels, side, side)).features.shape[0] == 2
    (network,) = source.networks
    assert (network.config.num_channels, network.config.image_size) == (channels, side)
    layers = FeatureSpec(network="untrained", architecture="resnet-small", layers=("hidden_1",), pooling="grid2")
    x = pixels(2, 1, 8, 8).requires_grad_(True)
    seen = FeatureSource(pipe, [layers])(x)
    seen.features.sum().backward()
    assert x.grad.flatten(1).norm(dim=1).min() > 0
    (network,) = FeatureSource(pipe, [layers]).networks
    assert torch.equal(preprocess(x, network), x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "convnet-3"}, "`architecture` is of an untrained network, and this is 'classifier'"),
        ({"network": "random", "width": 8}, "`width` is of an untrained network, and this is 'random'"),
        (
            {"network": "untrained", "architecture": "convnt-3"},
            "Unknown architecture 'convnt-3'. Nearest: 'convnet-3'",
        ),
        ({"network": "untrained", "architecture": "vit", "width": 8}, "'vit' has no `width`: leave it out"),
        ({"network": "untrained", "width": 0}, "`width` must be a whole number of at least 1, got 0"),
        ({"network": "untraned"}, "`network` must be one of .*Nearest: 'untrained'"),
    ],
)
def test_bad_specs(fields, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec(**fields)
