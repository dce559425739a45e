import json
import shutil

import datasets
import huggingface_hub
import pytest

from dsco_hf.data.shards import rows_sha256
from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import atomic_folder, read_folder, save_dataset_folder, to_json
from hub.cards import validate_card
from hub.samples import HOSTILE_NAMES, RECORD, RESULTS, tiny_dataset


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    configs = {"ipc1": tiny_dataset(1), "ipc10": tiny_dataset(10)}
    return save_dataset_folder(
        configs, tmp_path / "set", default_config="ipc10", results=RESULTS, concentration=RECORD
    )


def load(folder, *args, **options):
    return datasets.load_dataset(str(folder), *args, cache_dir=str(folder.parent / "cache"), **options)


def test_plain_datasets_code_reads_it(folder):
    dataset = load(folder, "ipc10", split="train")
    assert dataset.features == tiny_dataset().features and len(dataset) == 20
    assert rows_sha256(dataset) == rows_sha256(tiny_dataset(10))
    assert len(load(folder, split="train")) == 20  # the default config
    assert len(load(folder, "ipc1")["train"]) == 2
    assert sum(1 for _ in load(folder, "ipc10", split="train", streaming=True)) == 20
    assert datasets.get_dataset_config_names(str(folder)) == ["ipc1", "ipc10"]


def test_it_holds_records_and_a_valid_card(folder):
    assert sorted(contents(folder)) == [
        "README.md",
        "concentration.json",
        "data/ipc1/train-00000-of-00001.parquet",
        "data/ipc10/train-00000-of-00001.parquet",
        "figures/samples.png",
        "results.json",
    ]
    record = json.loads((folder / "concentration.json").read_text())
    assert {key: record[key] for key in RECORD} == RECORD
    assert record["default_config"] == "ipc10" and record["configs"]["ipc1"]["splits"]["train"]["rows"] == 2
    assert json.loads((folder / "results.json").read_text()) == RESULTS
    card = (folder / "README.md").read_text()
    assert validate_card(card, "dataset") == [] and "96.80 ± 0.31" in card
    assert huggingface_hub.DatasetCard(card).data.configs[1]["default"] is True


def test_the_same_content_gives_the_same_bytes(folder, tmp_path):
    before = contents(folder)
    save_dataset_folder(
        {"ipc10": tiny_dataset(10), "ipc1": tiny_dataset(1)}, folder, default_config="ipc10", results=RESULTS,
        concentration=RECORD,
    )  # fmt: skip
    assert contents(folder) == before
    stored = read_folder(folder)
    again = save_dataset_folder(stored.pop("configs"), tmp_path / "again", **stored)
    assert contents(again) == before


def test_splits_and_a_single_dataset(tmp_path):
    both = datasets.DatasetDict(train=tiny_dataset(3), test=tiny_dataset(1))
    folder = save_dataset_folder(both, tmp_path / "set")
    loaded = load(folder)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "test": 2}


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_one_image_and_an_empty_class(tmp_path, mode):
    dataset = tiny_dataset([1, 0], mode=mode)
    loaded = load(save_dataset_folder(dataset, tmp_path / "set"), split="train")
    assert rows_sha256(loaded) == rows_sha256(dataset) and loaded[0]["image"].mode == mode


def test_hostile_class_names_survive_unchanged(tmp_path):
    names = [name for name in HOSTILE_NAMES if "\u202e" not in name] + ["\u202egnp.exe\u2028next"]
    folder = save_dataset_folder(tiny_dataset(1, names), tmp_path / "set")
    assert load(folder, split="train").features["label"].names == names
    card = (folder / "README.md").read_text()
    assert validate_card(card, "dataset") == [] and huggingface_hub.DatasetCard(card).data.license == "unknown"


def test_own_text_and_said_fields_survive_another_save(folder):
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\nMy own words.\n")
    fields = DatasetCardFields(pretty_name="Mine", source_license="mit", generator_license="mit", tags=["x"])
    save_dataset_folder(tiny_dataset(), folder, card=fields)
    text = readme.read_text()
    assert "My own words." in text and "# Mine" in text and huggingface_hub.DatasetCard(text).data.license == "mit"
    stored = read_folder(folder)
    save_dataset_folder(stored.pop("configs"), folder, **stored)
    assert readme.read_text() == text


def test_figures(tmp_path):
    names = ["accuracy.png", "samples.png", "zz_mine.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    folder = save_dataset_folder(tiny_dataset(), tmp_path / "set", figures=[tmp_path / name for name in names])
    assert (folder / "figures/samples.png").read_bytes() == b"samples.png"
    card = (folder / "README.md").read_text()
    positions = [card.index(f"(figures/{name})") for name in ("samples.png", "accuracy.png", "zz_mine.png")]
    assert positions == sorted(positions) and "![zz mine]" in card
    with pytest.raises(FileNotFoundError, match=r"no figure at .*gone\.png"):
        save_dataset_folder(tiny_dataset(), folder, figures=[tmp_path / "gone.png"])
    (tmp_path / "a](x).png").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be a figure"):
        save_dataset_folder(tiny_dataset(), folder, figures=[tmp_path / "a](x).png"])


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(folder):
    before = contents(folder)
    with pytest.raises(ValueError, match="fractions"):
        save_dataset_folder(tiny_dataset(3), folder, results={"rows": [{"method": "nopt", "accuracy_mean": 97}]})
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir() if path.name != "cache"] == ["set"]


def test_foreign_files_are_never_replaced(folder):
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        save_dataset_folder(tiny_dataset(), folder)
    file = folder.parent / "file"
    file.write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save_dataset_folder(tiny_dataset(), file)


def test_default_configs():
    datasets_by_name = {"a": tiny_dataset(), "default": tiny_dataset()}
    with pytest.raises(ValueError, match=r"'x' is not one of the configs \['a', 'default'\]"):
        save_dataset_folder(datasets_by_name, "unused", default_config="x")
    with pytest.raises(ValueError, match="always loads by default"):
        save_dataset_folder(datasets_by_name, "unused", default_config="a")


def test_damaged_folders_are_explained(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no concentration\.json"):
        read_folder(tmp_path)
    shutil.rmtree(folder / "data" / "ipc1")
    with pytest.raises(FileNotFoundError, match="train-00000-of-00001.parquet is missing"):
        read_folder(folder)


def test_json_is_readable_by_any_reader(tmp_path):
    values = {"nan": float("nan"), "path": tmp_path, "set": {2, 1}, "tuple": (1, None), 3: True, "text": "ü\ud800"}
    read = json.loads(to_json(values).encode(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"nan": None, "path": str(tmp_path), "set": [1, 2], "tuple": [1, None], "3": True, "text": "ü?"}


def test_atomic_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new") as part:
        (part / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
