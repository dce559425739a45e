"""The page of a set: every image at its place, what is near, and nothing from outside as HTML."""

import base64
import io
import re

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from dsco_hf import look, measure_discrepancy
from dsco_hf.data.datasets import load_pixels
from dsco_hf.studies.figures import page
from hub.samples import HOSTILE_NAMES, RECORD, RESULTS, tiny_dataset


def drawn(text, tile):
    """The image of a tile, `(H, W, 3)`, cut from its sheet as a browser does it."""
    name, x, y = re.fullmatch(
        r'<i role="img" class="p (\w+)" style="background-position:(.*)% (.*)%".*', tile
    ).groups()
    columns, lines, data = re.search(rf"\.{name} {{ background-size: (\d+)% (\d+)%; .*?base64,(.*?)\)", text).groups()
    sheet = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    side = sheet.shape[1] * 100 // int(columns)
    column, line = (round(float(at) / 100 * (int(size) // 100 - 1)) for at, size in ((x, columns), (y, lines)))
    return sheet[line * side : (line + 1) * side, column * side : (column + 1) * side]


def tiles(text, kind="s"):
    return re.findall(rf'<i role="img" class="p {kind}\d+".*?></i>', text)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_image_is_at_its_place(tmp_path, monkeypatch, mode):
    """Also where a sheet is full, and another has to be begun."""
    monkeypatch.setattr(page, "COLUMNS", 2)
    monkeypatch.setattr(page, "SHEET", 4)
    small = tiny_dataset([3, 4], mode=mode).select([6, 0, 3, 1, 4, 2, 5])
    text = look(small, tmp_path / "look.html", progress=False).read_text("utf-8")
    order = [1, 3, 5, 0, 2, 4, 6]  # by class, in each as the rows are
    assert len(tiles(text)) == 7 and re.findall(r"<small>row (\d)", text) == [str(row) for row in order]
    for row, tile in zip(order, tiles(text), strict=True):
        assert (drawn(text, tile) == np.asarray(small[row]["image"].convert("RGB"))).all()


def test_large_images_are_shown_smaller_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PIXELS", 2 * 16**2)
    wide = PIL.Image.new("RGB", (64, 32), (200, 30, 30))
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    small = Dataset.from_dict({"image": [wide, wide.rotate(90, expand=True)], "label": [0, 0]}, features=features)
    text = look(small, tmp_path / "look.html", progress=False).read_text("utf-8")
    first, second = (drawn(text, tile) for tile in tiles(text))
    assert first.shape == (16, 16, 3) and (first[4:12] == (200, 30, 30)).all() and not first[:4].any()
    assert (second == first.swapaxes(0, 1)).all()
    assert re.findall("<small>(.*?)</small>", text) == ["row 0", "row 1"]  # all of plain images


def test_the_nearest_real_image_is_of_the_same_class(tmp_path):
    real = tiny_dataset(5, seed=1)
    small = real.select([7, 2]).remove_columns("real_index")
    shuffled = real.select([9, 2, 0, 7, 1, 3, 4, 5, 6, 8]).rename_columns({"image": "img"})
    near = page.nearest_real(small, shuffled, progress=False)
    assert list(near.rows) == [3, 1] and list(near.distances) == [0, 0] and near.seen_by == "pixels"
    text = look(small, tmp_path / "look.html", real=shuffled, progress=False).read_text("utf-8")
    assert "nearest 1 at 0.0000" in text and "by the pixels" in text
    for own, other in zip(tiles(text), tiles(text, "r"), strict=True):
        assert (drawn(text, own) == drawn(text, other)).all()
    with pytest.raises(ValueError, match="No real image is of class 'cat'"):
        page.nearest_real(small, real.filter(lambda row: row["label"] == 1), progress=False)


def test_a_classifier_says_what_is_near_and_targets_how_far(tmp_path, pipe, targets, real_images):
    small = real_images.select(range(6))
    text = look(small, tmp_path / "l.html", real=real_images, pipe=pipe, targets=targets, progress=False).read_text()
    assert "by the features of the classifier" in text and re.findall(r"nearest (\d+) at 0.0000", text)
    pixels, labels, _ = load_pixels(small, num_channels=1)
    for value in measure_discrepancy(pixels, labels, pipe, targets).values():
        assert f"discrepancy {value:.4f} (random real " in text


def test_it_tells_what_the_record_says(tmp_path):
    measured = {"by class": {"cat": 0.25, "dog": 0.5}, "random by class": {"cat": 0.125}}
    record = {**RECORD, "discrepancy": measured, "changed": "rows were left out"}
    told = {"record": record, "results": RESULTS, "title": "Ann's set"}
    text = look(tiny_dataset(2, real=1), tmp_path / "look.html", progress=False, **told).read_text("utf-8")
    for part in ("<title>Ann&#39;s set", "ann/digits", "DiT-XL-2-256", "rows were left out", "12.3", "256 MiB"):
        assert part in text
    assert "96.80 ± 0.31" in text and "all real data" in text
    assert "discrepancy 0.2500 (random real 0.1250)" in text and "discrepancy 0.5000</p>" in text
    assert re.findall(r"<tr><td>(cat|dog)<", text) == ["dog", "cat"]  # the worst first
    assert "4 images of 2 classes: 1 real, 3 synthetic." in text and "row 3 of the real data" in text


def test_nothing_from_outside_is_html(tmp_path):
    names = [*HOSTILE_NAMES, "</script><script>alert(1)</script>", "\ud800lone", '" onclick="alert(1)']
    record = {**RECORD, "method": "<b>", "cost": {"<i>": "</style>"}, "generator": {"id": "<img src=x>"}}
    record["discrepancy"] = {"by class": {names[3]: 1.0}}
    results = {"rows": [{"method": "<u>", "accuracy_mean": 0.5}]}
    told = {"record": record, "results": results, "title": "<h3>"}
    text = look(tiny_dataset(1, names), tmp_path / "look.html", progress=False, **told).read_text("utf-8")
    tags = set(re.findall(r"<(/?\w+)", text))
    assert not tags & {"b>", "img", "u", "h3"} and text.count("<script") == text.count("</script") == 1
    assert (
        "onclick=" not in re.sub(r"&#34;.*?&#34;", "", text) and "\u202e" not in text and "&lt;img src=x&gt;" in text
    )
    assert text.count("</style") == 1 and 'class="p s0"' in text


@pytest.mark.parametrize(
    "found", ["much", ["by class"], {"by class": "much"}, {"by class": {"cat": "<b>", "dog": float("nan")}}]
)
def test_a_record_of_somebody_else_may_hold_anything(tmp_path, found):
    record = {"discrepancy": found, "cost": "nothing", "generator": "mine", "method": 3, "source": {"dataset": ["x"]}}
    text = look(tiny_dataset(1), tmp_path / "look.html", record=record, progress=False).read_text("utf-8")
    assert "2 images of 2 classes" in text and "Discrepancy by class" not in text and "<b>" not in text[-3000:]


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dataset of the page needs a column 'image'"):
        look(tiny_dataset(1).remove_columns("image"), tmp_path / "look.html")
    with pytest.raises(ValueError, match="has no rows"):
        look(tiny_dataset(1).select([]), tmp_path / "look.html")
    assert not list(tmp_path.iterdir())
