import logging

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from dsco_hf.evaluators.preprocessing import ensure_preprocessing, preprocess
from dsco_hf.matching.features import (
    batchnorm_layers,
    classification_head,
    feature_dim,
    features_and_logits,
    observe,
    probe_features,
)


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pixels_that_fit_are_passed_on_as_they_are(make):
    x = pixels(2, 1, 8, 8)
    assert preprocess(x, make.convnet()) is x


def test_preprocessing_by_hand(make):
    resnet = make.resnet(image_size=8)
    x = pixels(2, 3, 8, 8)
    torch.testing.assert_close(preprocess(x, resnet), ((x + 1) / 2 - 0.4) / 0.2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [4, 8, 20])
def test_any_size_and_number_of_channels(make, channels, size):
    gray, colour = make.convnet(), make.resnet(image_size=16)
    x = pixels(2, channels, size, size)
    assert preprocess(x, gray).shape == (2, 1, 8, 8)
    assert preprocess(x, colour).shape == (2, 3, 16, 16)
    flat = torch.full((1, channels, size, size), 0.6)
    torch.testing.assert_close(preprocess(flat, colour), torch.full((1, 3, 16, 16), (0.8 - 0.4) / 0.2))


def test_gray_is_repeated_and_colour_averaged(make):
    x = pixels(2, 3, 8, 8)
    torch.testing.assert_close(preprocess(x, make.convnet()), x.mean(dim=1, keepdim=True))
    gray = preprocess(x[:, :1], make.resnet(image_size=8))
    assert torch.equal(gray[:, 0], gray[:, 2])


def test_head_and_features_are_those_of_the_model(make):
    resnet, x = make.resnet(), pixels(3, 3, 16, 16)
    features, logits = features_and_logits(resnet, x)
    values = preprocess(x, resnet)
    torch.testing.assert_close(features, resnet.resnet(values).pooler_output.flatten(1))
    torch.testing.assert_close(logits, resnet(values).logits)
    assert features.shape == (3, feature_dim(resnet)) == (3, 6)
    torch.testing.assert_close(classification_head(resnet)(features), logits)


def test_transformers_without_convolutions_work_too():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    config.image_mean, config.image_std = [0.5] * 3, [0.5] * 3
    vit = ViTForImageClassification(config).eval()
    seen = observe(vit, pixels(2, 3, 8, 8), moments=True)
    assert seen.features.shape == (2, 8) and seen.moments.shape == (2, 0, 2)


def test_a_model_without_linear_head_is_refused(make):
    convnet = make.convnet()
    convnet.config.num_labels = 4
    with pytest.raises(ValueError, match="no linear layer with 4 outputs"):
        classification_head(convnet)


def test_gradient_reaches_the_pixels_and_hooks_are_gone(make):
    convnet, x = make.convnet(), pixels(2, 1, 8, 8).requires_grad_(True)
    features_and_logits(convnet, x)[0].square().sum().backward()
    assert x.grad.flatten(1).norm(dim=1).min() > 0
    observe(convnet, x, moments=True)
    assert not any(module._forward_pre_hooks for module in convnet.modules())


def test_hooks_are_gone_after_an_error_too(make):
    convnet = make.convnet()
    with pytest.raises(RuntimeError):
        observe(convnet, pixels(2, 5, 8, 8).expand(2, 5, 8, 8)[:, :, :, :0])
    assert not any(module._forward_pre_hooks for module in convnet.modules())


def test_moments_are_those_of_the_inputs_of_batchnorm(make):
    convnet, x = make.convnet(), pixels(3, 1, 8, 8)
    layers = batchnorm_layers(convnet)
    assert len(layers) == 2
    inputs = []
    handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    convnet(x)
    for handle in handles:
        handle.remove()
    moments = observe(convnet, x, moments=True).moments
    assert moments.shape == (3, 12, 2)
    torch.testing.assert_close(moments[:, :, 0], torch.cat([i.mean(dim=(2, 3)) for i in inputs], dim=1))
    torch.testing.assert_close(moments[:, :, 1], torch.cat([i.square().mean(dim=(2, 3)) for i in inputs], dim=1))
    assert observe(convnet, x).moments.shape == (3, 0, 2)
    assert batchnorm_layers(make.convnet(norm="instance")) == []


def test_images_are_seen_one_by_one(make):
    convnet, x = make.convnet(), pixels(5, 1, 8, 8)
    together, alone = observe(convnet, x, moments=True), [observe(convnet, i[None], moments=True) for i in x]
    for name in ("features", "logits", "moments"):
        torch.testing.assert_close(getattr(together, name), torch.cat([getattr(seen, name) for seen in alone]))


def test_low_precision_gives_float32_observations(make):
    convnet = make.convnet().to(torch.bfloat16)
    seen = observe(convnet, pixels(2, 1, 8, 8), moments=True)
    assert {tensor.dtype for tensor in seen} == {torch.float32}


def test_probe_knows_the_classifier(make):
    first = probe_features(make.convnet())
    assert first.shape == (2, feature_dim(make.convnet())) and not first.requires_grad
    assert torch.equal(first, probe_features(make.convnet()))
    other = probe_features(make.convnet(seed=9))
    assert (first - other).norm() > 0.1 * first.norm()
    low = probe_features(make.convnet().to(torch.bfloat16))
    assert (first - low).norm() < 0.05 * first.norm()


def forget_preprocessing(model):
    for name in ("image_size", "image_mean", "image_std"):
        delattr(model.config, name)
    return model


def test_preprocessing_is_read_from_the_files_beside_the_weights(make, tmp_path, caplog):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 96}, '
        '"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}'
    )
    resnet = forget_preprocessing(make.resnet())
    resnet.config.name_or_path = resnet.name_or_path = str(tmp_path)
    with caplog.at_level(logging.WARNING, "dsco_hf"):
        assert ensure_preprocessing(resnet) is resnet
    config = resnet.config
    assert (config.image_size, config.image_mean, config.image_std) == (96, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    assert not caplog.records


@pytest.mark.parametrize("channels", [1, 3])
def test_unknown_preprocessing_is_that_of_imagenet_with_a_warning(make, tmp_path, caplog, channels):
    resnet = forget_preprocessing(make.resnet(channels=channels))
    resnet.config.name_or_path = resnet.name_or_path = str(tmp_path)
    with caplog.at_level(logging.WARNING, "dsco_hf"):
        ensure_preprocessing(resnet)
    assert "assuming 224 px" in caplog.text
    assert resnet.config.image_size == 224
    assert len(resnet.config.image_mean) == len(resnet.config.image_std) == channels
    assert resnet.config.image_mean[0] == pytest.approx(0.485 if channels == 3 else 0.449, abs=1e-3)


def test_what_the_config_says_stays(make):
    resnet = make.resnet()
    ensure_preprocessing(resnet)
    assert resnet.config.image_size == 16 and resnet.config.image_mean == [0.4] * 3
