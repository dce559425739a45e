import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq
import pytest

import launches
from dsco_hf.hub.folder import save_dataset_folder
from hub import Client
from hub.samples import RECORD, TOKEN, tiny_dataset


pytestmark = pytest.mark.slow  # clients are processes, and each imports what it needs


# In a client's process, what `python recipes/publish.py ...` prints, or says when it stops.
CALL = """
import contextlib, io, sys
from hub.client import ROOT
sys.path.insert(0, str(ROOT / "recipes"))
import publish as recipe
printed = io.StringIO()
try:
    with contextlib.redirect_stdout(printed):
        recipe.main(arguments)
except SystemExit as error:
    return str(error)
return printed.getvalue()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    configs = {"ipc1": tiny_dataset(1), "ipc10": tiny_dataset(10)}
    path = tmp_path_factory.mktemp("outputs") / "set"
    return save_dataset_folder(configs, path, default_config="ipc10", concentration=RECORD)


def call(client, *arguments):
    return client.run(CALL, arguments=[str(argument) for argument in arguments])


def test_a_dry_run_then_a_folder_is_published(hub, ann, folder):
    printed = call(ann, "--folder", folder, "--repo_id", "ann/set", "--dry-run")
    assert "would send 5 files" in printed and not hub.requests("POST", "")
    options = ["--private", "--source_license", "mit"]
    assert "sent 5 files" in call(ann, "--folder", folder, "--repo_id", "ann/set", *options)
    assert hub.store.load("datasets", "ann/set")["private"]
    files = hub.files("ann/set")
    record = json.loads(files["concentration.json"])
    assert record["default_config"] == "ipc10" and record["method"] == "nopt"
    assert record["card"] == {"source_license": "mit"}
    shard = "data/ipc1/train-00000-of-00001.parquet"
    assert files[shard] == (folder / shard).read_bytes()
    assert "up to date" in call(ann, "--folder", folder, "--repo_id", "ann/set", *options)


def test_a_teachers_labels_are_made_and_published(hub, ann, folder, make, tmp_path):
    make.convnet(names=["dog", "cat"]).save_pretrained(tmp_path / "teacher")
    options = ["--soft_labels", tmp_path / "teacher", "--views", 2, "--top_k", 1]
    assert "sent 5 files" in call(ann, "--folder", folder, "--repo_id", "ann/soft", *options)
    card = hub.files("ann/soft")["README.md"].decode()
    assert "The teacher is teacher, at temperature 1, mean over 2 views" in card and "nopt" in card
    stored = pq.read_table(io.BytesIO(hub.files("ann/soft")["data/ipc10/train-00000-of-00001.parquet"]))["soft_label"]
    assert len(stored) == 20 and all(0.5 <= one["probabilities"][0] <= 1 for one in stored.to_pylist())


def test_a_page_is_published_where_it_is_asked_for(hub, ann, folder):
    """Beside the default config, which it shows; published again, it is the same."""
    options = ["--folder", folder, "--repo_id", "ann/looked", "--preview"]
    assert "sent 6 files" in call(ann, *options)
    files = hub.files("ann/looked")
    page = files["figures/look.html"].decode()
    assert "<title>ann/looked ipc10</title>" in page and "20 images of 2 classes: 20 synthetic." in page
    assert "denoiser calls" in page and "420" in page
    card = files["README.md"].decode()
    assert "[`figures/look.html`](figures/look.html) shows all images" in card and "![look]" not in card
    assert "up to date" in call(ann, *options)
    assert "figures/look.html" not in hub.files("ann/set")


def test_errors_are_one_line(hub, ann, folder):
    printed = call(ann, "--folder", ".", "--repo_id", "ann/errors")
    assert printed.startswith("FileNotFoundError: . holds neither concentration.json") and "\n" not in printed
    printed = call(ann, "--folder", folder, "--repo_id", "bob/errors")
    assert printed.startswith("PermissionError: Cannot publish to bob/errors: the Hub refused (403)")


def test_only_the_main_process_of_a_launch_pushes(hub, folder, tmp_path):
    with contextlib.ExitStack() as opened, ThreadPoolExecutor() as threads:
        variables = [rank | {"ACCELERATE_USE_CPU": "true"} for rank in launches.ranks(2)]
        ranks = [
            opened.enter_context(Client(hub.url, tmp_path / f"home{index}", token=TOKEN, **rank))
            for index, rank in enumerate(variables)
        ]
        told = threads.map(lambda rank: call(rank, "--folder", folder, "--repo_id", "ann/launched"), ranks)
        printed, logged = "".join(told), "".join(rank.output() for rank in ranks)
    assert printed.count("sent 5 files") == 1 and TOKEN not in printed + logged
    assert len(hub.requests("POST", "/ann/launched/commit/")) == 1
