import io
import logging
import threading

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset

from dsco_hf.data import datasets as data
from dsco_hf.data import opening


NAMES = ["cat", "dog", "owl"]


def make_image(mode="RGB", size=(6, 6), seed=0):
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PIL.Image.fromarray(array).convert(mode)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def make_dataset(images, labels=None, names=NAMES):
    labels = [i % len(names) for i in range(len(images))] if labels is None else labels
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset():
    return make_dataset([make_image(seed=i) for i in range(7)])


# --- digits


def test_digits_are_images_with_the_right_values():
    digits = data.load_digits_dataset()
    assert {key: len(value) for key, value in digits.items()} == {"train": 1437, "test": 360}
    assert data.class_names(digits["train"]) == [str(i) for i in range(10)]
    assert digits["train"][0]["image"].mode == "L"
    pixels, labels, indices = data.load_pixels(digits["train"], num_channels=1)
    assert pixels.shape == (1437, 1, 8, 8) and pixels.dtype == torch.float32 and labels.dtype == torch.int64
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(indices, torch.arange(1437))


def test_digits_split_is_stratified_disjoint_and_fixed_by_its_seed():
    train, test = (data.load_pixels(split, num_channels=1) for split in data.load_digits_dataset().values())
    assert torch.bincount(test[1]).min() >= 34 and torch.bincount(test[1]).max() <= 37
    rows = {tuple(row.tolist()) for row in train[0].flatten(1)}
    shared = sum(tuple(row.tolist()) in rows for row in test[0].flatten(1))
    assert shared == 0  # no two of the 1,797 digits are the same picture
    again = data.load_digits_dataset()["test"]
    other = data.load_digits_dataset(seed=1)["test"]
    assert torch.equal(test[0], data.load_pixels(again, num_channels=1)[0])
    assert not torch.equal(test[0], data.load_pixels(other, num_channels=1)[0])


# --- opening


def test_digits_come_through_the_same_door():
    assert set(data.load_image_dataset("digits")) == {"train", "test"}
    assert len(data.load_image_dataset("digits", split="test")) == 360
    stream = data.load_image_dataset("digits", split="test", streaming=True)
    assert isinstance(stream, IterableDataset)
    assert data.load_pixels(stream, num_channels=1)[0].shape == (360, 1, 8, 8)
    with pytest.raises(ValueError, match=r"no split 'tset'.*Nearest: 'test'"):
        data.load_image_dataset("digits", split="tset")
    with pytest.raises(ValueError, match="revision='main'.*no meaning"):
        data.load_image_dataset("digits", revision="main")


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_class_folders(tmp_path, streaming):
    for i in range(6):
        folder = tmp_path / "pets" / NAMES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        make_image(seed=i).save(folder / f"{i}.png")
    loaded = data.load_image_dataset(tmp_path / "pets", split="train", streaming=streaming)
    assert data.class_names(loaded) == NAMES
    pixels, labels, _ = data.load_pixels(loaded)
    assert pixels.shape == (6, 3, 6, 6) and torch.bincount(labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_and_saved_datasets(tmp_path, dataset, streaming):
    expected = data.load_pixels(dataset)[0]
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.to_parquet(tmp_path / "b.parquet")
    one = data.load_image_dataset(tmp_path / "a.parquet", split="train", streaming=streaming)
    assert torch.equal(data.load_pixels(one)[0], expected)
    two = data.load_image_dataset([tmp_path / "a.parquet", tmp_path / "b.parquet"], split="train", streaming=streaming)
    assert len(data.load_pixels(two)[1]) == 14
    assert "train" in data.load_image_dataset(str(tmp_path / "*.parquet"), streaming=streaming)
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    for folder in ("saved", "splits"):
        saved = data.load_image_dataset(tmp_path / folder, split="train", streaming=streaming)
        assert torch.equal(data.load_pixels(saved)[0], expected)


def test_folder_with_readme_and_configurations(tmp_path, dataset):
    for config, rows in (("ipc1", 3), ("ipc2", 6)):
        dataset.select(range(rows)).to_parquet(tmp_path / "published" / config / "train-00000-of-00001.parquet")
    (tmp_path / "published" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: ipc1\n  data_files: [{split: train, path: ipc1/*.parquet}]\n"
        "- config_name: ipc2\n  default: true\n  data_files: [{split: train, path: ipc2/*.parquet}]\n---\n"
    )
    assert len(data.load_image_dataset(tmp_path / "published", "ipc1", split="train")) == 3
    assert len(data.load_image_dataset(str(tmp_path / "published"), split="train")) == 6


def test_missing_paths_are_named_with_the_nearest(tmp_path):
    (tmp_path / "imagenette").mkdir()
    with pytest.raises(FileNotFoundError, match="imagenete.*Nearest: 'imagenette'"):
        data.load_image_dataset(tmp_path / "imagenete")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        data.load_image_dataset(str(tmp_path / "x.parquet"))
    with pytest.raises(FileNotFoundError, match="is empty"):
        data.load_image_dataset(tmp_path / "imagenette")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="parquet"):
        data.load_image_dataset(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="empty list"):
        data.load_image_dataset([])


def test_a_hub_id_goes_to_load_dataset_with_its_options(monkeypatch, dataset):
    calls, stream = [], dataset.to_iterable_dataset()
    monkeypatch.setattr(opening, "load_dataset", lambda *args, **kwargs: calls.append((args, kwargs)) or stream)
    loaded = data.load_image_dataset("user/pets", "320px", split="train", revision="abc123", streaming=True, token="t")
    assert loaded is stream
    options = {"split": "train", "revision": "abc123", "streaming": True, "token": "t"}
    assert calls == [(("user/pets", "320px"), options)]


# --- columns


def test_columns_are_found_by_type_whatever_their_names(dataset):
    renamed = dataset.rename_columns({"image": "img", "label": "fine"})
    assert data.find_columns(renamed) == ("img", "fine")
    assert data.find_columns(renamed.to_iterable_dataset()) == ("img", "fine")
    both = renamed.add_column("coarse", [0] * 7).cast_column("coarse", ClassLabel(names=["all"]))
    with pytest.raises(ValueError, match=r"\['fine', 'coarse'\].*label_column="):
        data.find_columns(both)
    assert data.find_columns(both, label_column="coarse") == ("img", "coarse")


def test_a_stream_of_unknown_types_is_resolved_or_reported(dataset):
    stream = dataset.to_iterable_dataset().map(lambda row: row)
    assert stream.features is None
    with pytest.raises(ValueError, match=r"types .* unknown.*stream.cast\(features\)"):
        data.find_columns(stream)
    assert data.find_columns(stream.cast(dataset.features)) == ("image", "label")
    rows = IterableDataset.from_generator(lambda: iter([{"image": png(make_image()), "label": 0}]))
    assert rows.features is None
    with pytest.raises(ValueError, match=r"Did you mean 'image'\?.*cast_column"):
        data.find_columns(rows)
    assert data.load_pixels(rows.cast(dataset.features))[0].shape == (1, 3, 6, 6)


def test_missing_columns_are_reported_with_a_repair():
    encoded = [png(make_image())] * 2
    raw = Dataset.from_dict({"picture": encoded, "label": [0, 1]})
    with pytest.raises(ValueError, match=r"No column is of type Image.*'picture'.*'label' \(int64\).*cast_column"):
        data.find_columns(raw)
    with pytest.raises(ValueError, match=r"type ClassLabel.*Did you mean 'label'\?.*class_encode_column"):
        data.find_columns(raw.cast_column("picture", Image()))
    strings = Dataset.from_dict({"image_path": ["a.png"], "text": ["a cat"], "category": ["cat"]})
    with pytest.raises(ValueError, match=r"Did you mean 'image_path'"):
        data.find_columns(strings)
    with pytest.raises(ValueError, match=r"'text' is string, not ClassLabel. Make it .*class_encode_column\('text'\)"):
        data.class_names(strings, label_column="text")
    with pytest.raises(ValueError, match=r"no column 'imge'.*Nearest: 'image'"):
        data.find_columns(make_dataset([make_image()]), image_column="imge")


def test_all_splits_or_something_else_is_refused(dataset):
    with pytest.raises(TypeError, match=r"\['train'\].*dataset\['train'\]"):
        data.load_pixels(DatasetDict(train=dataset))
    with pytest.raises(TypeError, match="got list"):
        data.class_names([1, 2])


# --- pixels


def test_pixels_are_the_images_exactly(dataset):
    pixels, labels, _ = data.load_pixels(dataset, batch_size=3)
    arrays = np.stack([np.asarray(row["image"]) for row in dataset])
    expected = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(pixels, expected)
    assert pixels.is_contiguous()
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert [
        np.array_equal(a, b) for a, b in zip(map(np.asarray, data.images_from_pixels(pixels)), arrays, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_stream_and_the_last_may_be_smaller(dataset, batch_size):
    streamed = list(data.iterate_pixels(dataset.to_iterable_dataset(), batch_size=batch_size))
    mapped = list(data.iterate_pixels(dataset, batch_size=batch_size))
    assert [len(batch.labels) for batch in streamed] == [len(batch.labels) for batch in mapped]
    assert torch.equal(torch.cat([batch.indices for batch in streamed]), torch.arange(7))
    for a, b in zip(streamed, mapped, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_stream_is_read_only_as_far_as_asked():
    seen = []

    def rows():
        for i in range(100):
            seen.append(i)
            yield {"image": png(make_image(seed=i)), "label": 0}

    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    batches = data.iterate_pixels(IterableDataset.from_generator(rows, features=features), batch_size=4)
    next(batches)
    assert len(seen) < 20


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_read_the_same_batches(dataset, threads):
    alone = list(data.iterate_pixels(dataset, batch_size=3))
    for rows in (dataset, dataset.to_iterable_dataset()):
        ahead = list(data.iterate_pixels(rows, batch_size=3, threads=threads))
        for a, b in zip(alone, ahead, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_threads_read_two_batches_ahead_and_end_with_their_reader():
    seen = []

    def rows():
        for i in range(1000):
            seen.append(i)
            yield {"image": png(make_image(seed=i)), "label": 0}

    features = Features({"image": Image(), "label": ClassLabel(names=["a"])})
    batches = data.iterate_pixels(IterableDataset.from_generator(rows, features=features), batch_size=4, threads=1)
    assert not seen
    next(batches)
    batches.close()
    assert 4 <= len(seen) < 40
    assert not [t for t in threading.enumerate() if t.name.startswith("dsco-")]


def test_errors_of_threads_reach_the_reader():
    with pytest.raises(ValueError, match="row 2 cannot be decoded") as caught:
        list(data.iterate_pixels(corrupt_dataset(), batch_size=2, threads=2))
    assert isinstance(caught.value.__cause__, OSError)


def test_parts_of_a_dataset(dataset):
    part = list(data.iterate_pixels(dataset, rows=[range(1, 4), range(5, 7)], batch_size=2))
    assert [batch.indices.tolist() for batch in part] == [[1, 2], [3], [5, 6]]
    whole = next(data.iterate_pixels(dataset, batch_size=7))
    assert torch.equal(torch.cat([batch.keys for batch in part]), whole.keys[[1, 2, 3, 5, 6]])
    rest = list(data.iterate_pixels(dataset.to_iterable_dataset(), start=5, batch_size=4))
    assert [batch.indices.tolist() for batch in rest] == [[5, 6]] and torch.equal(rest[0].keys, whole.keys[5:])
    assert list(data.iterate_pixels(dataset, rows=[], allow_empty=True)) == []
    with pytest.raises(ValueError, match="row 4 cannot be decoded"):
        list(data.iterate_pixels(corrupt_dataset(), rows=[range(3, 5)]))


def test_keys_tell_pictures_apart_and_nothing_else(dataset):
    doubled = data.load_image_dataset("digits", split="test")
    keys = torch.cat([batch.keys for batch in data.iterate_pixels(doubled, num_channels=1)])
    assert len(keys.unique()) == 360 and keys.min() >= 0
    first, again = (next(data.iterate_pixels(dataset.select(rows))).keys for rows in ([0, 3], [3, 5, 0]))
    assert first[0] == again[2] and first[1] == again[0]


def test_modes_may_differ_within_a_dataset_and_transparent_palettes_do_not_warn(recwarn):
    palette = make_image("P")
    palette.info["transparency"] = bytes([0] * 100)
    images = [make_image("L"), make_image("RGBA"), palette, make_image()]
    assert data.load_pixels(make_dataset([png(image) for image in images]))[0].shape == (4, 3, 6, 6)
    assert not [w for w in recwarn if "alette" in str(w.message)]


def test_varying_sizes_need_image_size():
    varied = make_dataset([make_image(size=size) for size in ((6, 6), (6, 6), (12, 8), (3, 9))])
    with pytest.raises(ValueError, match=r"row 2 is 12x8 pixels, earlier ones 6x6.*image_size="):
        data.load_pixels(varied)
    assert data.load_pixels(varied, image_size=5)[0].shape == (4, 3, 5, 5)
    assert data.load_pixels(varied, image_size=16)[0].shape == (4, 3, 16, 16)


def test_images_that_are_not_square_keep_their_size_or_lose_their_ends():
    array = np.zeros((4, 8, 3), dtype=np.uint8)
    array[:, 2:6] = 255  # the middle square is white, both ends are black
    wide = make_dataset([PIL.Image.fromarray(array)], names=["a"])
    assert data.load_pixels(wide)[0].shape == (1, 3, 4, 8)
    assert (data.load_pixels(wide, image_size=4)[0] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 4}, "1 .gray. or 3"),
        ({"batch_size": 0}, "at least 1"),
        ({"image_size": 0}, "`image_size` must be a whole number of at least 1"),
        ({"on_error": "ignore"}, "`on_error` must be one of"),
    ],
)
def test_bad_options_fail_at_the_call(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        data.iterate_pixels(dataset, **options)


# --- rows that are wrong


def corrupt_dataset():
    good = [png(make_image(seed=i)) for i in range(5)]
    good[2] = {"bytes": good[2]["bytes"][:60], "path": None}  # truncated
    good[4] = {"bytes": b"not an image", "path": None}
    return make_dataset(good)


@pytest.mark.parametrize("stream", [False, True])
def test_a_corrupt_image_is_named_or_skipped_and_counted(stream, caplog):
    corrupt = corrupt_dataset().to_iterable_dataset() if stream else corrupt_dataset()
    with pytest.raises(ValueError, match="row 2 cannot be decoded.*on_error='skip'"):
        data.load_pixels(corrupt)
    with caplog.at_level(logging.WARNING):
        pixels, labels, indices = data.load_pixels(corrupt, on_error="skip", batch_size=2)
    assert indices.tolist() == [0, 1, 3] and labels.tolist() == [0, 1, 0] and len(pixels) == 3
    assert "Skipped 2 of 5" in caplog.text and "[2, 4]" in caplog.text


def test_a_missing_image_file_or_value_is_named(tmp_path):
    with pytest.raises(ValueError, match="row 1 cannot be decoded"):
        data.load_pixels(make_dataset([png(make_image()), str(tmp_path / "gone.png")]))
    with pytest.raises(ValueError, match="row 1 cannot be decoded"):
        data.load_pixels(make_dataset([png(make_image()), None]))


def test_nothing_left_and_nothing_there():
    with pytest.raises(ValueError, match="Not one image"):
        data.load_pixels(make_dataset([{"bytes": b"x", "path": None}]), on_error="skip")
    empty = make_dataset([])
    for nothing in (empty, IterableDataset.from_generator(lambda: iter(()), features=empty.features)):
        with pytest.raises(ValueError, match="dataset is empty"):
            data.load_pixels(nothing)
    with pytest.raises(ValueError, match="dataset is empty"):
        data.load_pixels(Dataset.from_dict({}))


@pytest.mark.parametrize("label", [-1, None])
def test_rows_without_label_are_named(label):
    with pytest.raises(ValueError, match=f"Row 1 has no valid label: got {label}, allowed are 0 to 2"):
        data.load_pixels(make_dataset([make_image(), make_image()], labels=[0, label]))


def test_images_from_pixels_rounds_clips_and_refuses():
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0]).reshape(1, 1, 2, 3)
    image = data.images_from_pixels(pixels)[0]
    assert image.mode == "L" and np.asarray(image).tolist() == [[0, 0, 128], [255, 255, 255]]
    assert data.images_from_pixels(pixels.expand(2, 3, 2, 3))[1].mode == "RGB"
    with pytest.raises(ValueError, match=r"got \(1, 2, 3\)"):
        data.images_from_pixels(pixels[0])
    with pytest.raises(ValueError, match="NaN"):
        data.images_from_pixels(pixels * torch.nan)


# --- choosing rows


def test_stratified_split_keeps_proportions_and_all_rows():
    many = make_dataset([make_image(seed=i) for i in range(30)])
    split = data.stratified_split(many, test_size=9, seed=0)
    assert [split[key]["label"][:].count(c) for key in ("train", "test") for c in range(3)] == [7, 7, 7, 3, 3, 3]
    pixels = torch.cat([data.load_pixels(part)[0] for part in split.values()])
    assert len({tuple(row.tolist()) for row in pixels.flatten(1)}) == 30
    again, other = (data.stratified_split(many, test_size=0.3, seed=seed) for seed in (0, 1))
    assert data.dataset_fingerprint(again["test"]) == data.dataset_fingerprint(split["test"])
    assert data.dataset_fingerprint(other["test"]) != data.dataset_fingerprint(split["test"])


def test_stratified_split_refuses_classes_too_small_and_streams(dataset):
    with pytest.raises(ValueError, match="at least 2 images.*'owl' has 1"):
        data.stratified_split(make_dataset([make_image()] * 7, labels=[0, 0, 0, 1, 1, 1, 2]), test_size=2, seed=0)
    with pytest.raises(TypeError, match="streamed"):
        data.stratified_split(dataset.to_iterable_dataset(), test_size=2, seed=0)


def test_fingerprint_follows_the_content(dataset):
    fingerprint = data.dataset_fingerprint(dataset)
    assert fingerprint == data.dataset_fingerprint(make_dataset([make_image(seed=i) for i in range(7)]))
    assert fingerprint != data.dataset_fingerprint(dataset.select(range(6)))
    assert fingerprint != data.dataset_fingerprint(make_dataset([make_image(seed=i + 1) for i in range(7)]))
    assert fingerprint != data.dataset_fingerprint(dataset.cast_column("label", ClassLabel(names=["a", "b", "c"])))
    assert len(data.dataset_fingerprint(dataset.to_iterable_dataset())) == 16
