import json

import PIL.Image
import pytest

from dsco_hf.concentration.concentrate import plan_units, row_features, to_dataset
from dsco_hf.concentration.run_folder import RunFolder, check_settings, unit_name
from dsco_hf.utils.files import DamagedFileError
from dsco_hf.utils.processes import RunError


NAMES = ["a", "b", "c"]
SETTINGS = {
    "num_classes": 3, "images_per_class": 4, "block_size": 2, "images_per_call": 4, "seed": 0,
    "class_names": NAMES, "options": {"eta": 1.0}, "models": {"vae": "x", "classifier": "y"}, "targets": None,
}  # fmt: skip
UNITS = plan_units(3, 4, block_size=2, images_per_call=4)


def rows_of(unit):
    """Rows whose gray level tells class and index."""
    images = [(row, index) for row in unit.rows for index in unit.indices]
    rows = [
        {"image": PIL.Image.new("L", (2, 2), 10 * row + index), "label": row, "seed": index, "block": unit.block}
        for row, index in images
    ]
    return to_dataset(rows, NAMES)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "ein Lauf, ünïcode")
    with folder.locked():
        folder.begin(SETTINGS)
        yield folder


def test_units_cover_every_image_once_whatever_their_sizes():
    for classes, images, block, call in ((3, 4, 2, 4), (10, 5, 2, 7), (100, 1, 10, 128), (7, 25, 10, 1), (1, 1, 1, 1)):
        units = plan_units(classes, images, block_size=block, images_per_call=call)
        drawn = sorted((row, index) for unit in units for row in unit.rows for index in unit.indices)
        assert drawn == [(row, index) for row in range(classes) for index in range(images)]
        assert all(unit.images <= max(call, min(block, images)) for unit in units)
        assert [unit.block for unit in units] == sorted(unit.block for unit in units)
        groups = {unit.group: unit.rows for unit in units}
        assert all(groups[unit.group] == unit.rows for unit in units)  # the same classes in every block
        sizes = [len(rows) for rows in groups.values()]
        assert max(sizes) - min(sizes) <= 1


def test_a_unit_is_stored_with_its_checksum_and_read_back(folder):
    for unit in reversed(UNITS):
        folder.write_unit(unit, rows_of(unit), {"seconds": 1.5})
    assert folder.finished() == {unit_name(unit) for unit in UNITS}
    entry = folder.entry(unit_name(UNITS[1]))
    assert entry["seconds"] == 1.5 and entry["images"] == UNITS[1].images and len(entry["sha256"]) == 64
    assert folder.verify(sorted(folder.finished())) == []
    features = row_features(NAMES)
    assert folder.rows(UNITS[0], features)["label"][:] == rows_of(UNITS[0])["label"][:]
    for cache in (None, folder.path / "rows.arrow"):
        dataset = folder.assemble(UNITS, features, cache_file=cache)
        assert dataset.features == features and list(dataset["block"]) == [0, 0, 1, 1] * 3
        assert [image.getpixel((0, 0)) for image in dataset["image"]] == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]


def test_shards_are_plain_datasets(folder):
    from datasets import load_dataset

    for unit in UNITS:
        folder.write_unit(unit, rows_of(unit), {})
    loaded = load_dataset(str(folder.units), split="train", cache_dir=str(folder.path / "cache"))
    assert len(loaded) == 12 and loaded.features == row_features(NAMES)


def damage(path, how):
    data = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])


@pytest.mark.parametrize("how", ["removed", "truncated", "one bit"])
def test_damaged_shards_are_found(folder, how):
    for unit in UNITS[:3]:
        folder.write_unit(unit, rows_of(unit), {})
    name = unit_name(UNITS[1])
    damage(folder.units / f"{name}.parquet", how)
    assert folder.verify(sorted(folder.finished())) == [name]
    assert folder.finished() == {unit_name(UNITS[0]), unit_name(UNITS[2])}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bytes": 3}'])
def test_damaged_entries_do_not_count(folder, text):
    folder.write_unit(UNITS[0], rows_of(UNITS[0]), {})
    name = unit_name(UNITS[0])
    (folder.units / f"{name}.json").write_text(text)
    assert folder.verify([name]) == [name] and not folder.finished()


def test_what_a_killed_run_left_behind_is_removed(folder):
    folder.write_unit(UNITS[0], rows_of(UNITS[0]), {})
    (folder.units / ".group-00001-block-00000.parquet.77.partial").write_bytes(b"half")
    folder.begin(SETTINGS)
    assert not list(folder.units.glob(".*")) and len(folder.finished()) == 1


def test_settings_that_differ_are_named(folder):
    changed = {**SETTINGS, "seed": 1, "options": {"eta": 0.5}, "class_names": ["a", "b", "d"]}
    with pytest.raises(ValueError) as error:
        folder.begin(changed)
    message = str(error.value)
    assert "seed: 0 there, 1 now" in message and "options.eta: 1.0 there, 0.5 now" in message
    assert "class_names.2: 'c' there, 'd' now" in message and "accept_changed=['options.eta']" in message
    assert str(folder.path) in message and "targets" not in message
    folder.begin(SETTINGS)


def test_a_change_can_be_accepted_and_is_noted(folder):
    folder.write_unit(UNITS[0], rows_of(UNITS[0]), {})
    repaired = {**SETTINGS, "models": {"vae": "x", "classifier": "z"}}
    with pytest.raises(ValueError, match="models.classifier: 'y' there, 'z' now"):
        folder.begin(repaired, accept_changed=["options", "models.vae"])
    folder.begin(repaired, accept_changed=["models"])
    assert folder.settings() == repaired
    assert folder.changes() == [{"settings": {"models.classifier": ["y", "z"]}, "finished_units": 1}]
    folder.begin(repaired)
    with pytest.raises(ValueError, match="`accept_changed` takes settings of .* got 'model'. Nearest: 'models'"):
        folder.begin(repaired, accept_changed=["model"])
    with pytest.raises(ValueError, match="got 'seed'"):  # that would be another run
        folder.begin({**repaired, "seed": 5}, accept_changed=["seed"])


@pytest.mark.parametrize(("before", "now", "fits"), [
    (4, 8, True), (8, 4, True), (4, 5, True), (2, 9, True), (4, 4, True), (5, 5, True), (3, 3, True),
    (5, 8, False), (8, 5, False), (1, 4, False), (4, 1, False), (3, 4, False),
])  # fmt: skip
def test_a_run_grows_by_whole_blocks(before, now, fits, tmp_path):
    old, new = ({**SETTINGS, "images_per_class": n} for n in (before, now))
    if fits:
        assert check_settings(old, new, tmp_path) == {}
    else:
        with pytest.raises(ValueError, match=f"images_per_class={before}, and {now} were asked for.*multiple of 2"):
            check_settings(old, new, tmp_path)


def test_the_largest_plan_is_remembered(folder):
    folder.begin({**SETTINGS, "images_per_class": 8})
    folder.begin({**SETTINGS, "images_per_class": 2})
    assert folder.settings()["images_per_class"] == 8
    with pytest.raises(ValueError, match="images_per_class=8, and 7 were asked for"):
        folder.begin({**SETTINGS, "images_per_class": 7})


def test_folders_that_hold_no_run(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no run.json"):
        RunFolder(tmp_path).settings()
    for text in ("{", "[]", "", '{"format_version": 1}', '{"format_version": 1, "settings": {"num_classes": 0}}'):
        (folder.path / "run.json").write_text(text)
        with pytest.raises(DamagedFileError, match="run.json is damaged: .*Put it back, or choose another folder"):
            folder.begin(SETTINGS)
    (folder.path / "run.json").unlink()
    folder.write_unit(UNITS[0], rows_of(UNITS[0]), {})
    with pytest.raises(ValueError, match="holds units, but no run.json"):
        folder.begin(SETTINGS)


def test_two_runs_at_once(folder):
    with pytest.raises(RunError, match="Another run is at work on"), RunFolder(folder.path).locked():
        pass


def test_relative_paths_are_resolved_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("a/b")
    monkeypatch.chdir("/")
    with folder.locked():
        folder.begin(SETTINGS)
    assert (tmp_path / "a" / "b" / "run.json").is_file()


def test_the_log_is_json_lines_and_stops_nothing(folder):
    folder.log(1, "unit", images=3)
    folder.log(1, "finished")
    lines = [json.loads(line) for line in (folder.logs / "process-00001.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["unit", "finished"] and lines[0]["images"] == 3
    assert lines[0]["time"].endswith("+00:00") and lines[1]["clock"] >= lines[0]["clock"]
    (folder.logs / "process-00002.jsonl").mkdir()
    folder.log(2, "unit")
