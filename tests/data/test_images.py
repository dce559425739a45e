"""What every mode and form of an image means: values worked out by hand, as `docs/inputs.md` states the rules."""

import gc
import io
import re
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Array2D, Array3D, ClassLabel, Dataset, Features, Image
from hypothesis import given, settings
from hypothesis import strategies as st

import dsco_hf
from dsco_hf.data.datasets import load_pixels
from dsco_hf.data.images import (
    as_stored,
    image_array,
    images_from_pixels,
    pixels_from_images,
    to_signed,
    to_unit,
)
from dsco_hf.data.pixels import iterate_pixels


DOCS = Path(__file__).parents[2] / "docs" / "inputs.md"
NEW = PIL.Image.new
SIZE = (2, 2)


def palette(transparency=None):
    image = NEW("P", SIZE, 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def sixteen(value, dtype="uint16"):
    return PIL.Image.fromarray(np.full(SIZE, value, dtype))


# mode -> image, its first pixel in RGB, and in gray: 0.299 R + 0.587 G + 0.114 B (of 10, 200, 30: 123.81)
READ = {
    "1": [(NEW("1", SIZE, 1), [255] * 3, 255), (NEW("1", SIZE, 0), [0] * 3, 0)],
    "L": [(NEW("L", SIZE, 77), [77] * 3, 77)],
    "LA": [(NEW("LA", SIZE, (77, 255)), [77] * 3, 77), (NEW("LA", SIZE, (77, 0)), [77] * 3, 77)],
    "La": [(NEW("La", SIZE, (50, 128)), [99] * 3, 99)],  # 50 / (128 / 255) = 99.6, cut off
    "P": [
        (palette(), [10, 200, 30], 124),
        (palette(1), [10, 200, 30], 124),
        (palette(bytes([0, 7])), [10, 200, 30], 124),
    ],
    "PA": [(NEW("P", SIZE).convert("PA"), [0, 0, 0], 0)],
    "RGB": [(NEW("RGB", SIZE, (10, 200, 30)), [10, 200, 30], 124)],
    "RGBA": [(NEW("RGBA", SIZE, (10, 200, 30, alpha)), [10, 200, 30], 124) for alpha in (255, 128, 0)],
    "RGBa": [(NEW("RGBa", SIZE, (5, 100, 15, 128)), [9, 199, 29], 123)],
    "RGBX": [(NEW("RGBX", SIZE, (10, 200, 30, 9)), [10, 200, 30], 124)],
    "CMYK": [(NEW("CMYK", SIZE, (255, 0, 0, 0)), [0, 255, 255], 179), (NEW("CMYK", SIZE, (0, 0, 0, 255)), [0] * 3, 0)],
    "YCbCr": [(NEW("YCbCr", SIZE, (77, 128, 128)), [77] * 3, 77)],
    "HSV": [(NEW("HSV", SIZE, (0, 255, 200)), [200, 0, 0], 60)],
    "I": [(sixteen(100, "int32"), [100] * 3, 100), (sixteen(0, "int32"), [0] * 3, 0)],
    "I;16": [(sixteen(25_700), [100] * 3, 100), (sixteen(65_535), [255] * 3, 255), (sixteen(0), [0] * 3, 0)],
    "I;16B": [(sixteen(25_700, ">u2"), [100] * 3, 100)],
}
REFUSED = {
    "F": [(NEW("F", SIZE, 0.5), "no defined range")],
    "LAB": [(NEW("LAB", SIZE, (200, 128, 128)), "ImageCms")],
    "I": [(sixteen(256, "int32"), "from 256 to 256"), (sixteen(-1, "int32"), "from -1 to -1")],
    "I;16": [(sixteen(255), "at most 255 of 65535"), (sixteen(1), "astype..uint8")],
}


def column(*images, names=("a",)):
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": list(images), "label": [0] * len(images)}, features=features)


def first(dataset, channels):
    pixels, _, _ = load_pixels(dataset, num_channels=channels)
    values = (pixels[0, :, 0, 0] + 1) * 127.5
    torch.testing.assert_close(values, values.round())
    return values.round().int().tolist()


@pytest.mark.parametrize(("mode", "number"), [(mode, i) for mode, cases in READ.items() for i in range(len(cases))])
def test_every_mode_is_read_as_stated(mode, number):
    image, colour, gray = READ[mode][number]
    assert image.mode.startswith(mode) and image_array(image, 3)[0, 0].tolist() == colour
    assert image_array(image, 1)[0, 0] == gray


@pytest.mark.parametrize(("mode", "number"), [(mode, i) for mode, cases in REFUSED.items() for i in range(len(cases))])
def test_values_without_a_meaning_are_refused_by_name(mode, number):
    image, says = REFUSED[mode][number]
    for channels in (1, 3):
        with pytest.raises(ValueError, match=says):
            image_array(image, channels)


def test_the_documented_table_has_every_mode_of_pillow_once():
    section = DOCS.read_text(encoding="utf-8").split("## Images")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)`((?:, `[^`]+`)*) \|", section, flags=re.MULTILINE)
    documented = [mode for head, more in rows for mode in [head, *re.findall(r"`([^`]+)`", more)]]
    assert sorted(documented) == sorted(set(PIL.Image.MODES))
    tested = {mode for mode in PIL.Image.MODES if mode in READ or mode in REFUSED}
    assert set(PIL.Image.MODES) - tested == {"I;16L", "I;16N"}  # other orders of the two bytes of "I;16"


FILES = {
    "png": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "tiff": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16"],
    "webp": ["RGB", "RGBA"],
    "bmp": ["1", "L", "P", "RGB"],
    "gif": ["L", "P"],
}


@pytest.mark.parametrize("ending", FILES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_files_and_bytes_are_read_as_their_mode_says(ending, tmp_path):
    for mode in FILES[ending]:
        image, colour, gray = READ[mode][0]
        place = tmp_path / f"{mode.replace(';', '')}.{ending}"
        image.save(place, **({"lossless": True} if ending == "webp" else {}))
        for given_as in (str(place), {"bytes": place.read_bytes(), "path": None}, image):
            assert first(column(given_as), 3) == colour and first(column(given_as), 1) == [gray]


ARRAYS = [(np.full(SIZE, 100, dtype), [100]) for dtype in ("uint8", "int16", "int32", "int64", "uint32", "uint64")] + [
    (np.full(SIZE, 25_700, "uint16"), [100]),
    (np.ones(SIZE, bool), [255]),
    (np.full((2, 2, 3), 100, "int64"), [100]),
    (np.full((2, 2, 4), 100, "uint8"), [100]),
]


@pytest.mark.parametrize(("array", "expected"), ARRAYS, ids=lambda value: str(getattr(value, "dtype", "")))
@pytest.mark.filterwarnings("ignore:Downcasting")
def test_integers_of_0_to_255_are_8_bit_values_whatever_their_type(array, expected):
    assert first(column(array), 1) == expected


@pytest.mark.filterwarnings("ignore:Downcasting")
def test_nested_lists_and_array_columns_become_images_by_the_cast_that_the_error_names():
    names = ClassLabel(names=["a"])
    listed = Dataset.from_dict({"image": [[[100] * 4] * 4], "label": [0]}).cast_column("label", names)
    kinds = [
        listed,
        Dataset.from_dict({"image": [[[[100, 100, 100]] * 4] * 4], "label": [0]}).cast_column("label", names),
        Dataset.from_dict(
            {"image": np.full((1, 4, 4), 100, np.uint8), "label": [0]},
            features=Features({"image": Array2D((4, 4), "uint8"), "label": names}),
        ),
        Dataset.from_dict(
            {"image": np.full((1, 4, 4, 3), 100, np.uint8), "label": [0]},
            features=Features({"image": Array3D((4, 4, 3), "uint8"), "label": names}),
        ),
    ]
    for dataset in kinds:
        with pytest.raises(ValueError, match=re.escape("dataset.cast_column('image', datasets.Image())")):
            load_pixels(dataset)
        assert first(dataset.cast_column("image", Image()), 3) == [100] * 3


def test_rotated_by_exif_is_turned_upright(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first stored row is the right side
    stored = PIL.Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], np.uint8))
    stored.save(tmp_path / "a.png", exif=exif)
    pixels, _, _ = load_pixels(column(str(tmp_path / "a.png")), num_channels=1)
    assert ((pixels[0, 0] + 1) * 127.5).round().int().tolist() == [[40, 10], [50, 20], [60, 30]]


@pytest.mark.parametrize("ending", ["gif", "png", "tiff", "webp"])
def test_of_several_frames_the_first_is_read_and_it_is_said(ending, tmp_path, caplog):
    frames = [NEW("RGB", SIZE, (level,) * 3) for level in (40, 200)]
    options = {"lossless": True} if ending == "webp" else {}
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert first(column(str(tmp_path / f"a.{ending}")), 3) == [40] * 3
    assert "1 of 1 images have further frames, which is left out" in caplog.text


def test_transparency_that_is_left_out_is_said_once(caplog):
    seen = [NEW("RGBA", SIZE, (9, 9, 9, 128)), NEW("LA", SIZE, (9, 0)), palette(1), NEW("RGBA", SIZE, (9, 9, 9, 255))]
    buffers = []
    for image in seen:
        image.save(buffer := io.BytesIO(), "png")
        buffers.append({"bytes": buffer.getvalue(), "path": None})
    load_pixels(column(*buffers), batch_size=2)
    assert caplog.text.count("3 of 4 images have transparency, which is left out") == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 1000)])
def test_the_thinnest_images_are_resized_and_cropped(size):
    pixels, _, _ = load_pixels(column(NEW("L", size, 9)), num_channels=1, image_size=8)
    assert pixels.shape == (1, 1, 8, 8) and torch.equal(pixels, torch.full_like(pixels, 9 / 127.5 - 1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["L", "RGB"]), st.integers(0, 2**31))
def test_any_image_survives_the_way_to_pixels_and_back(width, height, mode, seed):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    image = PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    back = images_from_pixels(pixels_from_images([image]))[0]
    assert back.mode == mode and back.tobytes() == image.tobytes()


def test_an_unreadable_image_is_named_by_row_and_file(tmp_path, caplog):
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, part in {"cut.jpg": content[:-100], "empty.jpg": b"", "text.jpg": b"no image"}.items():
        (tmp_path / name).write_bytes(part)
        dataset = column(str(tmp_path / "whole.jpg"), str(tmp_path / name))
        with pytest.raises(ValueError, match=f"row 1 cannot be decoded .*{name}.*on_error='skip'"):
            load_pixels(dataset, num_channels=1)
        assert load_pixels(dataset, num_channels=1, on_error="skip")[2].tolist() == [0]  # the advice works
        assert name in caplog.text


def test_no_file_stays_open_whatever_is_wrong_with_it(tmp_path):
    frames = [PIL.Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20, 30)]
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    frames[0].save(tmp_path / "turned.jpg", format="MPO", save_all=True, append_images=frames[1:], exif=exif)
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "whole.png")
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    names = ["turned.jpg", "moving.gif", "whole.png", "cut.png", "missing.png"]
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    rows = {"image": [str(tmp_path / name) for name in names], "label": [0] * len(names)}
    dataset = Dataset.from_dict(rows, features=features)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = list(iterate_pixels(dataset, on_error="skip"))
        gc.collect()
    assert [warning for warning in caught if issubclass(warning.category, ResourceWarning)] == []
    assert batches[0].indices.tolist() == [0, 1, 2]  # the others cannot be decoded


def test_pixels_as_they_are_stored(tmp_path):
    pixels = torch.cat([torch.linspace(-1.2, 1.2, 4095), torch.tensor([-1.0])]).view(1, 1, 64, 64)
    images_from_pixels(pixels)[0].save(tmp_path / "stored.png")
    with PIL.Image.open(tmp_path / "stored.png") as stored:
        assert torch.equal(as_stored(pixels), pixels_from_images([stored]))
    assert torch.equal(as_stored(as_stored(pixels)), as_stored(pixels)) and as_stored(pixels).unique().numel() == 256
    assert torch.equal(to_signed(to_unit(as_stored(pixels))).round(decimals=6), as_stored(pixels).round(decimals=6))


RANGES = re.compile(r"/ 2 \+ 0\.5|\* 2 - 1\b|\* 127\.5|/ 127\.5|\* 255\b|/ 255\b")
OTHERWISE = {"evaluators/preprocessing.py"}  # the levels that an image processor works with


def test_one_file_converts():
    room = Path(dsco_hf.__path__[0])
    found = {
        path.relative_to(room).as_posix() for path in room.rglob("*.py") if RANGES.search(path.read_text("utf-8"))
    }
    assert found == OTHERWISE | {"data/images.py"}
