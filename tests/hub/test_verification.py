import json

import pyarrow.parquet as pq
import pytest

from dsco_hf.data.shards import file_sha256
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.hub.verification import verify_folder
from dsco_hf.utils.safety import is_pickle
from hub.samples import RECORD, tiny_dataset


SHARD = "data/ipc2/train-00000-of-00001.parquet"


@pytest.fixture
def folder(tmp_path):
    return save_dataset_folder({"ipc2": tiny_dataset(2, real=1)}, tmp_path / "set", concentration=RECORD)


def edit_record(folder, edit):
    path = folder / "concentration.json"
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def split_of(record):
    return record["configs"]["ipc2"]["splits"]["train"]


def resign(folder, record):
    """What somebody would do who changes a shard and its hash, but forgets the rows."""
    file = split_of(record)["files"][0]
    file["sha256"], file["size"] = file_sha256(folder / SHARD), (folder / SHARD).stat().st_size


def test_an_untouched_folder_is_right(folder):
    assert verify_folder(folder)["method"] == "nopt"


def flip_byte(folder):
    content = bytearray((folder / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARD).write_bytes(content)


def swap_rows(folder):
    table = pq.read_table(folder / SHARD)
    pq.write_table(table.take([1, 0, 2, 3]), folder / SHARD)
    edit_record(folder, lambda record: resign(folder, record))


def drop_column(folder):
    pq.write_table(pq.read_table(folder / SHARD).drop_columns(["seed"]), folder / SHARD)
    edit_record(folder, lambda record: resign(folder, record))


def duplicate_shard(folder):
    (folder / "data/ipc2/train-00001-of-00002.parquet").write_bytes((folder / SHARD).read_bytes())


def break_card(folder):
    (folder / "README.md").write_text("---\nconfigs: 3\n---\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_byte, "the SHA-256 of data/ipc2/train-00000-of-00001.parquet differs"),
        (lambda folder: (folder / SHARD).write_bytes(b"PAR1"), "has 4 bytes instead of"),
        (lambda folder: (folder / SHARD).unlink(), "train-00000-of-00001.parquet is missing"),
        (swap_rows, "rows_sha256 differs"),
        (drop_column, "columns of data/ipc2/train-00000-of-00001.parquet are not the recorded ones"),
        (duplicate_shard, "train-00001-of-00002.parquet is not listed"),
        (lambda folder: (folder / "model.pkl").write_bytes(b""), "model.pkl is a pickle file"),
        (lambda folder: (folder / "README.md").unlink(), r"README\.md is missing"),
        (break_card, r"metadata of README\.md is damaged"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "not valid YAML"),
        (lambda folder: (folder / "README.md").write_text("# bare"), "does not point to its files"),
        (lambda folder: (folder / "concentration.json").write_text("{"), "is damaged: JSONDecodeError"),
        (lambda folder: (folder / "concentration.json").write_text("[]"), "is damaged"),
        (lambda folder: edit_record(folder, lambda r: r.update(format_version=99)), "format_version is 99"),
        (lambda folder: edit_record(folder, lambda r: split_of(r).update(rows=5)), "rows differs: 4 instead of 5"),
        (
            lambda folder: edit_record(folder, lambda r: split_of(r)["sources"].update(real=2)),
            "sources differs: {'real': 1, 'synthetic': 3} instead of {'real': 2, 'synthetic': 3}",
        ),
        (
            lambda folder: edit_record(folder, lambda r: split_of(r)["files"][0].update(path="../../etc/passwd")),
            "leaves the folder",
        ),
        (lambda folder: edit_record(folder, lambda r: r["configs"]["ipc2"].pop("features")), "is damaged"),
        (
            lambda folder: edit_record(folder, lambda r: r["configs"]["ipc2"]["features"].update(seed={"x": 1})),
            "is damaged|columns",
        ),
    ],
)
def test_every_difference_is_found(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        verify_folder(folder)


def test_all_differences_are_listed_at_once(folder):
    flip_byte(folder)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"(?s)README\.md is missing.*SHA-256"):
        verify_folder(folder)


def test_a_folder_without_a_record(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to check it against"):
        verify_folder(tmp_path)


def test_a_table_with_other_class_names_is_found(folder):
    def rename(record):
        record["configs"]["ipc2"]["features"]["label"]["names"] = ["x", "y", "z"]

    edit_record(folder, rename)
    with pytest.raises(ValueError, match="rows_per_class differs"):
        verify_folder(folder)


def test_pickle_names():
    assert is_pickle("a/pytorch_model.bin") and is_pickle("X.PKL") and is_pickle("m.pt")
    assert not is_pickle("model.safetensors") and not is_pickle("data/x.parquet")


def test_a_shard_that_is_no_parquet_file(folder):
    (folder / SHARD).write_bytes(b"PAR1" * 10)
    edit_record(folder, lambda record: resign(folder, record))
    with pytest.raises(ValueError, match="is damaged: ArrowInvalid"):
        verify_folder(folder)
