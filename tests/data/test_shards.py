import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from dsco_hf.data.shards import as_configs, check_rows, compact_soft_labels, describe_split, rows_sha256, write_shards
from hub.samples import tiny_dataset


def file_bytes(dataset, folder, **options):
    paths, _ = write_shards(dataset, folder, split="train", **options)
    return [path.read_bytes() for path in paths]


@pytest.mark.slow
def test_the_same_rows_give_the_same_bytes_however_they_were_put_together(tmp_path):
    dataset = tiny_dataset(300)
    pieces = datasets.concatenate_datasets([dataset.select(range(100)), dataset.select(range(100, 600))])
    shuffled = dataset.shuffle(seed=1)
    back = shuffled.select(np.argsort(shuffled._indices.column(0).to_numpy()))
    reordered = dataset.select_columns(dataset.column_names[::-1])
    expected = file_bytes(dataset, tmp_path / "a")
    for i, same in enumerate((pieces, back, reordered, dataset.with_format("numpy"), dataset.map(lambda row: row))):
        assert file_bytes(same, tmp_path / str(i)) == expected
        assert rows_sha256(same) == rows_sha256(dataset)
    other = tiny_dataset(300, seed=1)
    assert file_bytes(other, tmp_path / "b") != expected and rows_sha256(other) != rows_sha256(dataset)


def test_large_datasets_are_cut_into_shards(tmp_path):
    dataset = tiny_dataset(600)
    paths, size = write_shards(dataset, tmp_path, split="train", max_shard_bytes=60_000)
    assert [path.name for path in paths] == [f"train-{i:05d}-of-{len(paths):05d}.parquet" for i in range(len(paths))]
    assert len(paths) > 2 and sum(pq.read_metadata(path).num_rows for path in paths) == 1200 and size > 120_000
    loaded = datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=tmp_path / "cache")
    assert rows_sha256(loaded) == rows_sha256(dataset)


def test_images_on_disk_are_embedded_without_their_folder(tmp_path):
    dataset = tiny_dataset(1)
    for i in range(2):
        dataset[i]["image"].save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    external = dataset.remove_columns("image").add_column("image", paths).cast_column("image", datasets.Image())
    (shard,), _ = write_shards(external, tmp_path / "out", split="train")
    assert str(tmp_path).encode() not in shard.read_bytes()
    for path in paths:
        (tmp_path / path).unlink()
    loaded = datasets.Dataset.from_parquet(str(shard), cache_dir=tmp_path / "cache")
    assert rows_sha256(loaded) == rows_sha256(dataset)


def test_splits_are_described():
    described = describe_split(tiny_dataset([3, 0, 1], ["a", "b", "c"], real=1))
    assert described["rows"] == 4 and described["rows_per_class"] == [3, 0, 1]
    assert described["sources"] == {"real": 1, "synthetic": 3}
    assert describe_split(tiny_dataset(1).remove_columns("source"))["sources"] == {}
    missing = tiny_dataset(1).map(lambda row: {"label": -1})
    with pytest.raises(ValueError, match="between 0 and 1.*-1"):
        describe_split(missing)


def test_soft_labels_are_kept_in_half_precision(tmp_path):
    dataset = tiny_dataset(3, list("abcde"), soft_labels=True)
    compact = compact_soft_labels(dataset)
    assert compact.features["soft_label"] == datasets.List(datasets.Value("float16"), length=5)
    np.testing.assert_allclose(compact["soft_label"][:], dataset["soft_label"][:], rtol=5e-4)
    (shard,), _ = write_shards(compact, tmp_path, split="train")
    loaded = datasets.Dataset.from_parquet(str(shard), cache_dir=tmp_path / "cache")
    assert loaded["soft_label"][:] == compact["soft_label"][:] and loaded.features == compact.features
    assert compact_soft_labels(compact)["soft_label"][:] == compact["soft_label"][:]


def test_soft_labels_can_be_cut_to_the_most_probable(tmp_path):
    dataset = tiny_dataset(3, list("abcde"), soft_labels=True)
    compact = compact_soft_labels(dataset, top_k=2)
    for row, full in zip(compact["soft_label"][:], dataset["soft_label"][:], strict=True):
        assert row["indices"] == np.argsort(full)[::-1][:2].tolist()
        np.testing.assert_allclose(row["probabilities"], np.sort(full)[::-1][:2], rtol=5e-4)
    (shard,), _ = write_shards(compact, tmp_path, split="train")
    loaded = datasets.Dataset.from_parquet(str(shard), cache_dir=tmp_path / "cache")
    assert loaded["soft_label"][:] == compact["soft_label"][:]
    assert compact_soft_labels(compact) is compact
    with pytest.raises(ValueError, match="between 1 and the number of classes, 5, but is 6"):
        compact_soft_labels(dataset, top_k=6)
    with pytest.raises(ValueError, match="no column 'soft_label'"):
        compact_soft_labels(tiny_dataset())


def test_everything_publishable_becomes_configs_of_splits():
    dataset = tiny_dataset()
    assert list(as_configs(dataset)) == ["default"] and list(as_configs(dataset, config_name="ipc2")) == ["ipc2"]
    both = datasets.DatasetDict(train=dataset, test=dataset)
    assert list(as_configs(both)["default"]) == ["train", "test"]
    assert list(as_configs({"a": dataset, "b": both})["b"]) == ["train", "test"]


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([1], TypeError, "got a list"),
        ({}, ValueError, "dict is empty"),
        ({"../x": tiny_dataset()}, ValueError, "cannot be a config name"),
        ({"a..b": tiny_dataset()}, ValueError, "cannot be a config name"),
        ({"x" * 65: tiny_dataset()}, ValueError, "cannot be a config name"),
        ({1: tiny_dataset()}, ValueError, "cannot be a config name"),
        ({"a": "data"}, TypeError, "config 'a', split 'train'.*got a str"),
        (tiny_dataset().to_iterable_dataset(), TypeError, "IterableDataset.*from_generator"),
        (tiny_dataset().select([]), ValueError, "has no rows"),
        (tiny_dataset().rename_column("image", "img"), ValueError, "'image' of type Image.*Rename 'img'"),
        (tiny_dataset().rename_column("label", "y"), ValueError, "'label' of type ClassLabel.*Rename 'y'"),
        (tiny_dataset().remove_columns("image"), ValueError, "needs a column 'image' of type Image"),
        (
            datasets.DatasetDict(train=tiny_dataset(), test=tiny_dataset(names=["x", "y"])),
            ValueError,
            r"same features, but \['test'\] differ",
        ),
    ],
)
def test_what_cannot_be_published_is_explained(dataset, error, message):
    with pytest.raises(error, match=message):
        as_configs(dataset)


def test_check_rows_accepts_a_concentrated_dataset():
    check_rows(tiny_dataset(), where="config 'a'")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["aux"], "'aux' cannot be a config name: Windows can have no folder of that name. .* 'set-aux'"),
        (["nul.10"], "'nul.10' cannot be a config name: Windows"),
        (["ipc10."], "'ipc10.' cannot be a config name: Windows .* 'set-ipc10'"),
        (["ipc10", "IPC10"], r"configs \['ipc10', 'IPC10'\] would be one folder .* Rename all but one"),
    ],
)
def test_config_names_are_folders_on_every_system(names, message):
    with pytest.raises(ValueError, match=message):
        as_configs({name: tiny_dataset(1) for name in names})
    assert list(as_configs({"set-aux": tiny_dataset(1), "set-ipc10": tiny_dataset(1)})) == ["set-aux", "set-ipc10"]


def test_splits_are_files_on_every_system():
    with pytest.raises(ValueError, match=r"splits \['train', 'Train'\] would be one folder or file"):
        as_configs(datasets.DatasetDict(train=tiny_dataset(1), Train=tiny_dataset(1)))
