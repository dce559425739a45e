"""The evaluator networks: shapes, sizes, saving and loading, and any architecture of transformers."""

import importlib

import pytest
import torch
from transformers import AutoModelForImageClassification

from dsco_hf.evaluators import ConvNetConfig, EvaluatorResNetConfig, build_evaluator
from dsco_hf.evaluators.models import is_own_architecture, pooled_sizes


NAMES = ["cat", "dog", "eel"]
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
STOCK = {
    "mobilenet_v2": {"depth_multiplier": 0.1},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
    "convnext": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2},
    "vit": VIT,
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "patch_size": 4},
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
}


def build(architecture, image_size=32, num_channels=3, **options):
    torch.manual_seed(0)
    return build_evaluator(
        architecture, class_names=NAMES, image_size=image_size, num_channels=num_channels, **options
    )


@pytest.mark.parametrize(
    ("size", "depth", "sizes"),
    [(32, 3, [16, 8, 4]), (8, 2, [4, 2]), (8, 3, [4, 2, 2]), (224, 6, [112, 56, 28, 14, 7, 3])],
)
def test_a_block_halves_the_map_but_never_to_one_pixel(size, depth, sizes):
    assert pooled_sizes(size, depth) == sizes


def test_convnet3_has_the_published_size():
    model = build_evaluator("convnet-3", class_names=[str(i) for i in range(10)], image_size=32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 320_010  # ConvNet of arXiv 2006.05929


def test_resnet18_has_the_size_of_the_original_with_the_cifar_stem():
    model = build_evaluator("resnet-18", class_names=[str(i) for i in range(10)], image_size=32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert model.resnet.stem[0].kernel_size == (3, 3)
    large = build_evaluator("resnet-18", class_names=[str(i) for i in range(1000)], image_size=224)
    assert sum(parameter.numel() for parameter in large.parameters()) == 11_689_512  # torchvision's resnet18


@pytest.mark.parametrize("architecture", ["convnet-3", "convnet-6", "resnet-18", "resnetap-10", "resnet-small"])
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_own_networks_take_small_images_and_see_them(architecture, size, channels):
    options = {} if architecture == "resnet-small" else {"width": 8}
    model = build(architecture, size if options else 32, channels, **options).eval()
    images = torch.randn(2, channels, *(model.config.image_size,) * 2)
    logits = model(images).logits
    assert logits.shape == (2, 3)
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("size", [96, 160])
def test_stems_of_larger_images_leave_a_quarter_or_half(size):
    for architecture in ("resnetap-10", "resnet-18"):
        model = build(architecture, size, width=4)
        map_size = model.resnet.stem(torch.randn(1, 3, size, size)).shape[-1]
        assert map_size == (size // 2 if architecture == "resnetap-10" and size <= 128 else size // 4)


@pytest.mark.parametrize("architecture", ["convnet-2", "resnetap-10", "resnet-18"])
def test_save_and_load_gives_identical_logits(architecture, tmp_path):
    model = build(architecture, 8, 1, width=4).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert loaded.config.id2label == dict(enumerate(NAMES))
    assert loaded.config.image_mean == [0.5]


@pytest.mark.parametrize("architecture", list(STOCK))
def test_any_architecture_of_transformers(architecture):
    model = build(architecture, **STOCK[architecture])
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)
    assert model.config.image_size == 32
    assert not is_own_architecture(architecture)


def test_weights_follow_from_the_seed_and_are_pytorchs_own():
    first, second = build("convnet-3", width=8), build("convnet-3", width=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(0)
    bound = torch.nn.Conv2d(3, 8, 3).weight.abs().max()
    assert first.convnet.blocks[0].weight.abs().max() <= 1 / 27**0.5
    assert abs(first.convnet.blocks[0].weight.abs().max() - bound) < 0.02


def test_loss_is_the_cross_entropy():
    model = build("convnet-2", width=4)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    output = model(images, labels=labels)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))


def test_unknown_architecture_names_the_nearest():
    with pytest.raises(ValueError, match="'mobilenetv2'.*mobilenet_v2"):
        build("mobilenetv2")


def test_bad_classes_and_sizes():
    with pytest.raises(ValueError, match="at least two classes"):
        build_evaluator("convnet-3", class_names=["cat"], image_size=32)
    with pytest.raises(ValueError, match=r"\['cat'\] more than once"):
        build_evaluator("convnet-3", class_names=["cat", "cat", "dog"], image_size=32)
    with pytest.raises(ValueError, match="depth=0"):
        ConvNetConfig(depth=0)
    with pytest.raises(ValueError, match="Unknown norm 'layer'"):
        EvaluatorResNetConfig(norm="layer")
    with pytest.raises(ValueError, match="at least 1"):
        EvaluatorResNetConfig(depths=[])


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("models", ("ConvNetConfig", "ConvNetForImageClassification", "EvaluatorResNetConfig", "pooled_sizes")),
        ("protocols", ("Protocol", "Variant", "by_budget", "learning_rate_factor", "PROTOCOLS", "LABEL_TYPES")),
        ("training", ("epoch_batches", "fast_layout", "part_size", "predict_logits")),
    ],
)
def test_names_stay_where_published_files_and_users_look_for_them(module, names):
    found = importlib.import_module(f"dsco_hf.evaluators.{module}")
    assert all(hasattr(found, name) for name in names)
