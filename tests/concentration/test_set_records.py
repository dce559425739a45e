"""What a set was drawn with goes with the set, says what is true, and nothing of the machine."""

import json
import re

import pytest
from datasets import concatenate_datasets, load_dataset, load_from_disk

from conftest import pixel_pipeline
from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    PushOptions,
    concentrate,
    concentrate_to_folder,
    concentration_record,
    dope,
    load_recorded,
    publish,
    save_dataset_folder,
    verify,
)
from dsco_hf.concentration.config_records import how_made
from dsco_hf.concentration.records import config_record, record_parameters
from dsco_hf.concentration.set_records import published_origin, read_set, record_of, without_paths, write_set
from dsco_hf.data.shards import rows_record, rows_sha256
from dsco_hf.utils.origins import model_sha256, without_places


OPTIONS = {"num_inference_steps": 3, "guidance_scale": 1.0, "block_size": 2, "progress": False}


@pytest.fixture
def small(pipe, targets):
    return concentrate(pipe, targets, 2, seed=5, **OPTIONS)


def read(folder):
    return json.loads((folder / "concentration.json").read_text(encoding="utf-8"))


def test_a_set_says_what_it_was_drawn_with(small, targets):
    record = record_of(small)
    assert (record["method"], record["seed"]) == ("nopt", 5)
    told = record["parameters"]
    assert (told["guidance_scale"], told["num_inference_steps"], told["images_per_class"]) == (1.0, 3, 2)
    assert told["method"]["objective"]["name"] == "ridge" and told["block_size"] == 2 and record["cost"]["images"] == 6
    assert record["synthetic"] == rows_record(small) and record["synthetic"]["rows_sha256"] == rows_sha256(small)
    assert record["source"]["rows"] == targets.provenance["images"]


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({"method": "plain"}, "plain"),
        ({"objective": "classifier", "targets": None}, "nopt-classifier-only"),
        ({"data_free": True}, "nopt-data-free"),
    ],
)
def test_the_method_is_that_which_drew_it(options, method, pipe, targets):
    options = {"targets": targets, **options}
    if options.pop("data_free", False):
        options["targets"] = MatchingTargets.from_generator(
            pipe, samples_per_class=3, num_inference_steps=2, guidance_scale=1.0, embedding_dim=32, progress=False
        )
    assert record_of(concentrate(pipe, options.pop("targets"), 1, **{**OPTIONS, **options}))["method"] == method


def test_it_survives_what_is_done_with_datasets(small, tmp_path):
    record = record_of(small)
    small.save_to_disk(tmp_path / "saved")
    for kept in (
        small.select(range(3)),
        small.filter(lambda label: label == 0, input_columns="label"),
        small.with_format("torch"),
        small.rename_column("block", "part").rename_column("part", "block"),
        load_from_disk(tmp_path / "saved"),
    ):
        assert record_of(kept) == record
    plain = small.map(lambda row: row)
    plain.info.description = "Somebody's words."
    assert record_of(plain) is None and record_of(concatenate_datasets([small, plain])) is None


@pytest.mark.parametrize("strategy", ["random", "herding"])
def test_doping_adds_its_own(strategy, small, real_images, pipe):
    record = record_of(dope(small, real_images, pipe, images_per_class=4, strategy=strategy, seed=7, progress=False))
    assert record["method"] == "nopt+doping" and record["parameters"] == record_of(small)["parameters"]
    assert record["doping"]["strategy"]["name"] == strategy and record["doping"]["images_per_class"] == 4
    assert record["doping"]["seed"] == 7 and record["doping"]["real_fingerprint"]
    theirs = real_images.select(range(3))
    assert record_of(dope(theirs, real_images, images_per_class=2, strategy="random"))["doping"]["total"] is None


def test_nobody_types_it_again(small, real_images, pipe, targets, tmp_path):
    mixed = dope(small, real_images, pipe, images_per_class=4, strategy="random")
    save_dataset_folder({"ipc2": small, "ipc4": mixed}, tmp_path / "set", targets=targets)
    record = read(tmp_path / "set")
    drawn, doped = (config_record(record, name) for name in ("ipc2", "ipc4"))
    assert drawn["parameters"]["guidance_scale"] == doped["parameters"]["guidance_scale"] == 1.0
    assert doped["doping"]["strategy"] == {"name": "random"} and "doping" not in drawn
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "a ridge regression trained on the few images" in card and "Real images were added at random." in card
    verify(tmp_path / "set")
    assert load_dataset(str(tmp_path / "set"), "ipc2", split="train").num_rows == 6


def test_one_set_drawn_again_from_its_folder_is_the_same(pipe, targets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained(tmp_path / "somewhere" / "pipe")
    loaded = DsCoPipeline.from_pretrained(tmp_path / "somewhere" / "pipe")
    loaded.set_progress_bar_config(disable=True)
    small = concentrate(loaded, targets, 2, seed=5, **OPTIONS)
    save_dataset_folder(small, tmp_path / "somewhere" / "set", targets=targets)
    again, found, record = load_recorded(tmp_path / "somewhere" / "set")
    again.set_progress_bar_config(disable=True)
    rows = concentrate(again, found, seed=record["seed"], progress=False, **record_parameters(record))
    assert rows_sha256(rows) == rows_sha256(small)
    save_dataset_folder(small, tmp_path / "elsewhere" / "deep" / "in" / "a" / "set", targets=targets)
    far = tmp_path / "elsewhere" / "deep" / "in" / "a" / "set"
    with pytest.raises(ValueError, match="a folder called 'pipe' of its maker.*put a copy of it beside.*generator="):
        load_recorded(far)
    told, *_ = load_recorded(far, generator=tmp_path / "somewhere" / "pipe")  # the classifier is the one inside of it
    assert model_sha256(told.denoiser) == record["generator"]["sha256"]
    assert model_sha256(told.classifier) == record["classifier"]["sha256"]
    pixel_pipeline(classifier=loaded.classifier, seed=9).save_pretrained(tmp_path / "another")
    with pytest.raises(ValueError, match="The generator that .* is not the one that the dataset was made with"):
        load_recorded(far, generator=tmp_path / "another")


def test_a_false_record_is_refused_and_changed_rows_are_said(small, tmp_path):
    with pytest.raises(ValueError, match="drawn with parameters.guidance_scale=1.0, the given record says 4.0: leave"):
        save_dataset_folder(small, tmp_path / "a", concentration={"parameters": {"guidance_scale": 4.0}})
    with pytest.raises(ValueError, match="drawn with seed=5, the given record says 0"):
        save_dataset_folder(small, tmp_path / "a", concentration={"seed": 0})
    save_dataset_folder(small.select([0, 2, 4]), tmp_path / "b")
    assert "changed, added or left out" in read(tmp_path / "b")["changed"]
    save_dataset_folder(small, tmp_path / "c")
    assert "changed" not in read(tmp_path / "c")


def test_a_run_says_it_too(pipe, targets, tmp_path):
    rows = concentrate_to_folder(pipe, targets, 2, tmp_path / "run", seed=5, **OPTIONS).dataset()
    record, expected = record_of(rows), record_of(concentrate(pipe, targets, 2, seed=5, **OPTIONS))
    for key in ("method", "seed", "parameters", "targets", "generator", "classifier", "synthetic"):
        assert record.get(key) == expected.get(key), key
    calls = ("images", "denoiser_calls", "decoder_calls", "classifier_calls")
    assert [record["cost"][key] for key in calls] == [expected["cost"][key] for key in calls]
    assert set(record["cost"]) == set(expected["cost"]) and record["cost"]["seconds"] > 0


def test_nothing_of_the_machine_is_published(pipe, real_images, tmp_path):
    home = tmp_path / "home-of-telltale"
    pipe.save_pretrained(home / "pipe")
    real_images.save_to_disk(home / "photos")
    real, loaded = load_from_disk(home / "photos"), DsCoPipeline.from_pretrained(home / "pipe")
    loaded.set_progress_bar_config(disable=True)
    targets = MatchingTargets.from_dataset(real, loaded, embedding_dim=32, progress=False)
    small = concentrate(loaded, targets, 1, **OPTIONS)
    mixed = dope(small, real, loaded, images_per_class=2, strategy="random")
    given = {"generator": {"id": str(home / "pipe")}, "source": {"dataset": str(home / "photos")}}
    save_dataset_folder({"a": small, "b": mixed}, tmp_path / "one", targets=targets)
    save_dataset_folder(small, tmp_path / "two", concentration=given)
    run = concentrate_to_folder(loaded, targets, 1, tmp_path / "run", **OPTIONS)
    save_dataset_folder(run.dataset(), tmp_path / "three")
    for folder in ("one", "two", "three", "run"):
        for path in (tmp_path / folder).rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert b"telltale" not in content and str(tmp_path).encode() not in content, path
    generator = read(tmp_path / "two")["generator"]
    assert generator["folder"] == "pipe" and set(generator) == {"folder", "sha256"}


def test_origins_that_are_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "pipe").mkdir(parents=True)
    for place in (tmp_path / "outputs" / "pipe", "outputs/pipe", "./outputs/pipe", "~/x/pipe", r"C:\users\ann\pipe"):
        assert published_origin(place).get("folder") == "pipe" and "id" not in published_origin(place)
    assert published_origin("user/name") == {"id": "user/name"} and published_origin("digits") == {"id": "digits"}
    assert published_origin(None) == published_origin("") == {}
    assert without_paths({"seed": 1}) == {"seed": 1}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"parameters": {"method": NOpt("rkhs").as_record()}}, "match the features of the whole class"),
        ({"parameters": {"method": NOpt("ridge").as_record()}}, "a ridge regression trained on the few images"),
        ({"parameters": {"method": {"name": "mine:Method"}}}, "sampling of a frozen .* model was steered"),
        (
            {"method": "nopt", "parameters": {"method": {"name": "unknown"}}},
            "together teach what the whole class does",
        ),
        ({"parameters": {"objective": "rkhs"}}, "match the features of the whole class"),
        ({"parameters": {"objective": "ridge"}}, "a ridge regression trained on the few images"),
        ({"parameters": {"objective": "quantile"}}, "quantiles"),
        ({"parameters": {"objective": "classifier"}}, "nothing was matched"),
        ({"method": "plain", "parameters": {"objective": "rkhs"}}, "nothing was optimised"),
        ({}, "is not recorded"),
    ],
)
def test_cards_say_what_was_done(record, says):
    told = how_made({"a": record})
    assert re.search(says, told) and told.count("match the features") == (says.startswith("match"))


def test_a_dry_run_needs_neither_network_nor_token(small, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = publish(small, "name", push=PushOptions(dry_run=True))
    assert result.dry_run and not result.compared and result.commit is None
    assert {"README.md", "concentration.json"} <= set(result.added) and "not compared" in str(result)


def test_places_are_shortened_and_names_are_left():
    snapshot = f"/root/.cache/huggingface/hub/models--ann--pipe/snapshots/{'a' * 40}/unet"
    found = without_places(
        {
            "dataset": "/home/ann/photos", "up": ["../ann/pipe", "./x.png"], "win": r"C:\users\ann\pipe",
            "cached": snapshot, "id": "ann/pipe", "class": "/m/01g317", "out": "outputs/run", "slash": "/", "n": 3,
            "net": {"_name_or_path": "/home/ann/net", "depth": 2}, "hub": {"_name_or_path": "ann/net"},
        }
    )  # fmt: skip
    assert found == {
        "dataset": "photos", "up": ["pipe", "x.png"], "win": "pipe", "cached": "ann/pipe", "id": "ann/pipe",
        "class": "/m/01g317", "out": "outputs/run", "slash": "/", "n": 3, "net": {"depth": 2},
        "hub": {"_name_or_path": "ann/net"},
    }  # fmt: skip


def test_a_set_is_kept_with_its_record_in_one_file(small, tmp_path):
    write_set(small, tmp_path / "set.parquet")
    kept = read_set(tmp_path / "set.parquet")
    assert record_of(kept) == record_of(small) and rows_record(kept) == rows_record(small)
    assert kept.features == small.features and record_of(kept.select([0])) == record_of(small)
    plain = load_dataset("parquet", data_files=str(tmp_path / "set.parquet"), split="train", cache_dir=str(tmp_path))
    assert rows_sha256(plain) == rows_sha256(small) and [file.name for file in tmp_path.glob("*.p*")] == [
        "set.parquet"
    ]


def test_the_name_of_a_folder_contradicts_no_dataset(pipe, targets, tmp_path):
    """A dataset that was saved to disk keeps its name; the folder that it lies in has another."""
    (tmp_path / "mine").mkdir()
    source = {"dataset": str(tmp_path / "mine")}
    for name, expected in (("cifar10", "cifar10"), ("imagefolder", "mine"), (None, "mine")):
        targets.provenance["dataset"] = name
        small = concentrate(pipe, targets, 1, seed=5, **OPTIONS)
        save_dataset_folder(small, tmp_path / "set", concentration={"source": source})
        assert read(tmp_path / "set")["source"]["dataset"] == expected
        told = concentration_record(
            pipe, targets, method="nopt", seed=5, parameters={"images_per_class": 1}, source=source
        )
        assert told["source"]["dataset"] == expected
