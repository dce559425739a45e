"""What a classifier sees through us is what its image processor makes of the image: held against every processor."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from dsco_hf import Clarity, Clearest, dope, get_protocol, select, train_evaluator
from dsco_hf.data.datasets import load_pixels
from dsco_hf.evaluators import ImageSet, predict_logits
from dsco_hf.evaluators.preprocessing import Preprocessing, as_dict, center_crop, check_against, from_dict
from dsco_hf.utils.origins import commit_of


# an image alone becomes something else than pixels of one size here, which is warned of
NOT_FOLLOWED = {"ImageGPTImageProcessorPil", "Siglip2ImageProcessorPil", "DonutImageProcessorPil"}
# these cannot be imported without torchvision or timm
SHORT = get_protocol("quick", epochs=None, steps=2, image_size=8)
NEED_MORE = {"PPLCNetImageProcessor", "TimmWrapperImageProcessor"}


def processors():
    """Names of the processors that transformers lists for the models that classify images."""
    found = set()
    for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        names = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or ()
        names = [names] if isinstance(names, str) else list(names.values()) if isinstance(names, dict) else names
        found |= {name if name in NEED_MORE else f"{name.removesuffix('Pil')}Pil" for name in names if name}
    return sorted(found)


def image(height, width, channels=3, seed=0):
    noise = np.random.default_rng(seed).integers(60, 196, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    smooth = PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC)
    return smooth if channels == 3 else smooth.convert("L")


def both(processor, shown):
    """`pixel_values` by the processor and by us, and the difference in levels of 255."""
    channels = 1 if shown.mode == "L" else 3
    rules = from_dict(as_dict(Preprocessing.of(processor, channels)))
    pixels = torch.from_numpy(np.asarray(shown).reshape(shown.height, shown.width, -1).copy()).permute(2, 0, 1)[None]
    found = rules(pixels / 127.5 - 1)
    expected = torch.as_tensor(np.asarray(processor(shown, return_tensors="np")["pixel_values"]))
    assert found.shape == expected.shape and tuple(found.shape[-2:]) == rules.input_size(shown.height, shown.width)
    scale = torch.tensor(rules.gain).abs().view(-1, 1, 1)
    return (found - expected).abs().div(scale).mul(127.5)


def test_the_list_of_processors_is_that_of_transformers():
    assert len(processors()) >= 20 and NOT_FOLLOWED | NEED_MORE <= set(processors())


@pytest.mark.parametrize("name", [name for name in processors() if name not in NOT_FOLLOWED | NEED_MORE])
@pytest.mark.parametrize("shape", [(48, 48), (300, 300), (40, 64), (90, 33)])
def test_every_processor_is_followed(name, shape):
    for options in ({}, {"resample": 2}, {"do_normalize": False}, {"do_resize": False}):
        if options.get("do_resize") is False and "crop_size" not in getattr(transformers, name)().to_dict():
            continue
        levels = both(getattr(transformers, name)(**options), image(*shape))
        assert levels.max() <= 3 and levels.mean() <= 0.5, options  # Pillow rounds to whole levels twice


SWITCHES = {
    "do_rescale": {"do_rescale": False},
    "rescale_factor": {"rescale_factor": 1 / 127.5},
    "size by height and width": {"size": {"height": 40, "width": 24}, "do_center_crop": False},
    "size by both edges": {"size": {"shortest_edge": 30, "longest_edge": 36}, "do_center_crop": False},
    "size by limits": {"size": {"max_height": 30, "max_width": 20}, "do_center_crop": False},
    "crop": {"size": {"shortest_edge": 40}, "crop_size": {"height": 31, "width": 17}},
    "crop larger than the image": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 27}},
    "nearest": {"resample": 0, "size": {"shortest_edge": 29}, "do_center_crop": False},
    "bilinear": {"resample": 2, "size": {"shortest_edge": 30}, "do_center_crop": False},
    "mean and std": {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.3, 0.2, 0.1]},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_is_followed(switch):
    for shape in ((48, 48), (40, 64), (64, 40)):
        levels = both(transformers.BitImageProcessorPil(**SWITCHES[switch]), image(*shape))
        # of a tie between two pixels "nearest" may take either
        assert (levels.mean() <= 0.5 and levels.max() <= 3) or (switch == "nearest" and levels.mean() <= 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MobileViTImageProcessorPil", {"do_flip_channel_order": False}),
        ("MobileViTImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_pct": 1.0}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 64}, "crop_pct": 0.7}),
        (
            "PoolFormerImageProcessorPil",
            {"size": {"height": 30, "width": 20}, "crop_size": {"height": 30, "width": 20}},
        ),
        ("EfficientNetImageProcessorPil", {"rescale_offset": True, "rescale_factor": 1 / 127.5}),
        ("EfficientNetImageProcessorPil", {"include_top": False}),
        ("EfficientNetImageProcessorPil", {"do_center_crop": True}),
    ],
)
def test_the_switches_of_single_families_are_followed(name, options):
    for shape in ((48, 48), (40, 64)):
        assert both(getattr(transformers, name)(**options), image(*shape)).max() <= 3


def test_gray_images_of_a_gray_classifier():
    processor = transformers.BitImageProcessorPil(
        image_mean=[0.3], image_std=[0.2], do_convert_rgb=False, size={"shortest_edge": 30}, do_center_crop=False
    )
    assert both(processor, image(48, 48, channels=1)).max() <= 3


def test_exact_where_nothing_is_resized():
    processor = transformers.ViTImageProcessorPil(size={"height": 48, "width": 48}, image_mean=[0.4] * 3)
    assert both(processor, image(48, 48)).max() < 1e-3


@pytest.mark.parametrize("name", sorted(NOT_FOLLOWED))
def test_what_is_not_followed_is_warned_of_by_name(name, caplog):
    options = {"clusters": np.zeros((4, 3))} if "ImageGPT" in name else {}
    processor = getattr(transformers, name)(**options)
    try:
        rules = Preprocessing.of(processor)
    except (AttributeError, TypeError, KeyError):
        return  # refused, so that the loader says which values it takes instead
    check_against(processor, rules, 3, "user/model")
    assert name in caplog.text and "'user/model'" in caplog.text


def test_another_filter_is_warned_of_by_name_and_others_are_not(caplog):
    for resample, warned in ((1, "LANCZOS"), (5, "HAMMING"), (2, ""), (3, "")):
        caplog.clear()
        processor = transformers.BitImageProcessorPil(resample=resample)
        check_against(processor, Preprocessing.of(processor), 3, "user/model")
        assert (warned in caplog.text) and bool(caplog.text) == bool(warned)


def test_gradients_pass():
    for name in ("ConvNextImageProcessorPil", "MobileViTImageProcessorPil", "PerceiverImageProcessorPil"):
        rules = Preprocessing.of(getattr(transformers, name)())
        pixels = torch.zeros(1, 3, 24, 24, requires_grad=True)
        rules(pixels).sum().backward()
        assert pixels.grad.abs().sum() > 0


def test_the_centre_is_cut_out_as_transformers_does():
    from transformers.image_transforms import center_crop as theirs

    for have in ((5, 8), (4, 4), (7, 3)):
        values = torch.arange(1, have[0] * have[1] + 1, dtype=torch.float32).view(1, 1, *have)
        for wanted in ((3, 3), (4, 4), (9, 9), (6, 2), (2, 9)):
            expected = theirs(values[0].numpy(), wanted, input_data_format="channels_first")
            assert np.array_equal(center_crop(values - 1, wanted)[0].numpy() + 1, expected), (have, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_every_precision_are_asked_alike(dtype, pipe, real_images, make):
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    expected = predict_logits(make.convnet(), pixels)
    pipe.register_modules(classifier=make.convnet().to(dtype))
    found = predict_logits(pipe.classifier, pixels)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert found.dtype == torch.float32 and pipe.classifier.dtype == dtype
    assert len(select(real_images, Clearest(0.3), pipe=pipe, progress=False)) == 8
    small = real_images.select(range(3))
    for strategy in ("herding", Clarity(protocol=SHORT)):
        mixed = dope(small, real_images, pipe, images_per_class=2, strategy=strategy, progress=False)
        assert len(mixed) == 6
    taught = train_evaluator(
        make.convnet(),
        ImageSet(pixels, labels),
        protocol=dataclasses.replace(SHORT, label_type="teacher"),
        teacher=pipe.classifier,
    )
    assert taught.steps == 2 and pipe.classifier.dtype == dtype and not pipe.classifier.training


def cache_of(folder, repo_id, commits, newest=None):
    """A cache of the Hub with some files of some commits."""
    root = folder / f"models--{repo_id.replace('/', '--')}"
    for commit, save in commits.items():
        (root / "snapshots" / commit).mkdir(parents=True)
        save(root / "snapshots" / commit)
    if newest:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(newest)


def test_the_commit_of_a_model_is_told_from_the_cache(make, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    old, new, card = ("a" * 40, "b" * 40, "c" * 40)
    model, other = make.resnet(seed=1), make.resnet(seed=2)
    nothing = lambda folder: (folder / "preprocessor_config.json").write_text("{}")  # noqa: E731
    cache_of(tmp_path, "ann/one", {old: model.save_pretrained, new: other.save_pretrained, card: nothing}, newest=card)
    model.name_or_path = other.name_or_path = "ann/one"
    assert (commit_of(model), commit_of(other)) == (old, new)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert commit_of(other) is None  # trained since
    cache_of(tmp_path, "ann/two", {old: model.save_pretrained, new: model.save_pretrained}, newest=new)
    model.name_or_path = "ann/two"
    assert commit_of(model) == new
    for name in ("ann/none", "", "a/b/c", str(tmp_path), "not an id"):
        model.name_or_path = name
        assert commit_of(model) is None
