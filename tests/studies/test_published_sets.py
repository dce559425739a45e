"""Sets that peers published: class folders by WordNet id or by number, labels without names, other orders, 224 px."""

from types import SimpleNamespace

import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from dsco_hf import get_protocol
from dsco_hf.data.datasets import with_classes_of, with_numbered_classes
from dsco_hf.studies.study import ComparedOptions


REAL = ("tench", "English springer", "chain saw")  # as Imagenette has them
WNIDS = ("n01440764", "n02102040", "n03000684")
SYNONYMS = ("tench, Tinca tinca", "English springer, English springer spaniel", "chainsaw")
COLORS = {"tench": (255, 0, 0), "English springer": (0, 255, 0), "chain saw": (0, 0, 255)}
# how a set lays out its class folders, in which order its classes are, and what is said of that
FOLDERS = {
    "WordNet ids, as D3HR": (lambda row: WNIDS[row], None),
    "numbers, as RDED": (lambda row: f"{row:05d}", None),
    "words with numbers, as SRe2L": (lambda row: f"new{row:03d}", "index"),
    "synonyms": (lambda row: SYNONYMS[row], None),
    "names": (lambda row: REAL[row], None),
}  # fmt: skip


def picture(row):
    return PIL.Image.new("RGB", (224, 224), COLORS[REAL[row]])


def compared(path, *classes):
    options = ComparedOptions(datasets=[f"peer={path}"], budgets=[1], datasets_classes=list(classes))
    real = SimpleNamespace(names=REAL)
    (images,) = options.load_compared(
        options.open_compared(), real, protocol=get_protocol("quick", image_size=8), progress=False
    ).values()
    return images


def check(images):
    """Every image has the label that its color stands for, in the order of the real classes."""
    assert images.names == REAL and sorted(images.labels.tolist()) == [0, 1, 2]
    for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
        assert pixels.shape == (3, 8, 8) and pixels[:, 4, 4].argmax() == label


@pytest.mark.parametrize("layout", FOLDERS)
def test_class_folders(layout, tmp_path):
    name, told = FOLDERS[layout]
    for row in range(3):
        folder = tmp_path / name(row)
        folder.mkdir()
        picture(row).save(folder / f"class{row:03d}_id000.png")
    if told:
        with pytest.raises(ValueError, match='with --datasets_classes: "index" if label i is class number i there'):
            compared(tmp_path)
        check(compared(tmp_path, f"peer={told}"))  # as it says
        (tmp_path / "which.yaml").write_text("new000: tench\nnew001: n02102040\nnew002: 2\n")
        check(compared(tmp_path, str(tmp_path / "which.yaml")))  # or a file
    else:
        check(compared(tmp_path))


def test_numbers_without_names_as_in_parquet(tmp_path):
    features = Features({"image": Image(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": [picture(row) for row in (2, 0, 1)], "label": [2, 0, 1]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="--datasets_classes index takes numbers without names for places among"):
        compared(tmp_path)
    check(compared(tmp_path, "index"))


def test_classes_in_another_order(tmp_path):
    names = ClassLabel(names=[WNIDS[2], WNIDS[0], "n00000000", WNIDS[1]])  # one of them has no image
    features = Features({"image": Image(), "label": names})
    rows = Dataset.from_dict({"image": [picture(row) for row in (2, 0, 1)], "label": [0, 1, 3]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    check(compared(tmp_path))
    assert with_classes_of(REAL, rows).features["label"].names == [
        "chain saw", "tench", "without images: n00000000", "English springer"
    ]  # fmt: skip
    assert with_classes_of(REAL[:1], rows.select([1])).features["label"].names[1] == "tench"  # one image, one class


def test_what_cannot_be_told_is_refused(tmp_path):
    features = Features({"image": Image(), "label": Value("int64")})
    given = {"image": [picture(0), picture(1)], "label": [0, -1]}
    with pytest.raises(ValueError, match="The numbers of column 'label' are no labels"):
        with_numbered_classes(Dataset.from_dict(given, features=features))
    named = Dataset.from_dict(
        given | {"label": [0, 0]}, features=Features(features | {"label": ClassLabel(names=["dogs"])})
    )
    assert with_numbered_classes(named) is named
    with pytest.raises(ValueError, match="classes of the real images: 'dogs'. Say which is which"):
        with_classes_of(REAL, named)
    with pytest.raises(ValueError, match="takes one value for all datasets, or name=value for some of"):
        ComparedOptions(datasets=["peer=x"], datasets_classes=["other=index"])
