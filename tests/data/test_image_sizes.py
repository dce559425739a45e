import logging

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image

from dsco_hf.data.pixels import default_image_size


def images(*sizes):
    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    columns = {"image": [PIL.Image.new("L", size) for size in sizes], "label": [0] * len(sizes)}
    return Dataset.from_dict(columns, features=features)


def test_squares_of_one_size_keep_it(caplog):
    assert default_image_size(images((8, 8), (8, 8))) is None and not caplog.records


@pytest.mark.parametrize("sizes", [[(8, 8), (9, 9)], [(40, 300)] * 2])
def test_other_images_have_a_size_that_is_said(caplog, sizes):
    with caplog.at_level(logging.WARNING):
        assert default_image_size(images(*sizes)) == 32
    low, high = min(min(size) for size in sizes), max(max(size) for size in sizes)
    assert f"sides of {low} to {high} pixels" in caplog.text and "--image_size" in caplog.text


def test_damaged_and_missing_files_do_not_count(tmp_path):
    images((8, 8)).to_parquet(tmp_path / "x.parquet")
    rows = Dataset.from_dict(
        {
            "image": [{"bytes": b"none", "path": None}, {"bytes": None, "path": str(tmp_path / "gone.png")}],
            "label": [0, 0],
        },
        features=images((8, 8)).features,
    )
    assert default_image_size(rows) is None
