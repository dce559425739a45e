"""What is recorded of each config: joined with what its maker adds, said on the card by its name, never untrue."""

import copy
import json

import numpy as np
import pytest
from datasets import ClassLabel, Features, List, Value, load_dataset

from conftest import tiny_convnet
from dsco_hf import (
    Clarity,
    MatchingTargets,
    concentrate,
    concentration_record,
    dope,
    get_protocol,
    save_dataset_folder,
    verify,
)
from dsco_hf.concentration.config_records import by_config, laid_out, shared
from dsco_hf.concentration.records import config_record
from dsco_hf.concentration.set_records import record_of
from dsco_hf.data.shards import rows_sha256
from dsco_hf.evaluators.protocols import protocol_from_dict
from dsco_hf.hub.remake import compared, recorded_rows


OPTIONS = {"num_inference_steps": 2, "guidance_scale": 1.0, "progress": False}


@pytest.fixture(scope="module")
def _sets(_pixel_pipe, _targets):
    pipe = copy.deepcopy(_pixel_pipe)
    return concentrate(pipe, _targets, 1, seed=3, **OPTIONS), concentrate(pipe, _targets, 2, seed=4, **OPTIONS)


@pytest.fixture
def one(_sets):
    """One image of each class, drawn with seed 3."""
    return copy.deepcopy(_sets[0])


@pytest.fixture
def two(_sets):
    """Two images of each class, drawn with seed 4."""
    return copy.deepcopy(_sets[1])


def saved(folder, configs, **options):
    save_dataset_folder(configs, folder, **options)
    return json.loads((folder / "concentration.json").read_text(encoding="utf-8"))


def with_soft_labels(dataset, kind="float64"):
    rows = np.random.default_rng(0).dirichlet(np.ones(3), len(dataset))
    return dataset.add_column("soft_label", rows.tolist(), feature=List(Value(kind)))


# One layout for all: what holds for every config once, and nothing for a config of which it was not recorded.


def test_records_are_laid_out_and_read_back():
    records = {"a": {"seed": 1, "source": {"x": 1}}, "b": {"seed": 2, "source": {"x": 1}, "changed": "rows"}}
    found = laid_out(records)
    assert found == {"source": {"x": 1}, "configs": {"a": {"seed": 1}, "b": {"seed": 2, "changed": "rows"}}}
    assert by_config(found) == records
    assert laid_out({**records, "c": {}})["configs"] == {**records, "c": {}}  # nothing is shared with c
    with pytest.raises(
        ValueError, match=r"a record of a config 'ipc01', but the configs are \['ipc10'\]. Nearest: 'ipc10'"
    ):
        by_config({"configs": {"ipc01": {}}}, ["ipc10"])
    assert shared([{"id": "x", "rows": 1}, {"id": "x", "rows": 2}]) == {"id": "x"} and shared([1, 2]) is None


def test_the_card_tells_of_each_config_by_its_name(one, two, real_images, targets, tmp_path):
    doped = dope(one, real_images, images_per_class=3, strategy="random", seed=7)
    nobodys = real_images.select(range(3))
    record = saved(tmp_path / "set", {"ipc1": one, "ipc2": two, "doped": doped, "other": nobodys})
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    head, *sections = card.split("## How it was made")[1].split("## Cost")[0].split("### `")
    told = {name: text for name, _, text in (section.partition("`") for section in sections)}
    assert list(told) == ["doped", "ipc1", "ipc2", "other"] and "| seed |" not in head
    assert "| seed | 3 |" in told["ipc1"] and "| seed | 4 |" in told["ipc2"] and "| seed | 3 |" in told["doped"]
    assert "| parameter: images\\_per\\_class | 1 |" in told["ipc1"]
    assert "| parameter: images\\_per\\_class | 2 |" in told["ipc2"]
    assert "Real images were added at random." in told["doped"] and "| doping: seed | 7 |" in told["doped"]
    assert "a ridge regression trained on the few images" in told["ipc2"] and "added" not in told["ipc2"]
    assert "is not recorded" in told["other"] and "| seed |" not in told["other"]
    assert config_record(record, "other") == {"config": "other"}
    assert "| `ipc2`: images | 6 |" in card and "| `ipc1`: images | 3 |" in card
    # three that were drawn alike: what they share stands once, above
    saved(tmp_path / "alike", {"ipc1": one, "doped": doped})
    head = (
        (tmp_path / "alike" / "README.md")
        .read_text(encoding="utf-8")
        .split("What all configs share")[1]
        .split("### `")[0]
    )
    assert "| seed | 3 |" in head and "| generator: sha256 |" in head and "| method |" not in head


# What the maker adds.


def test_what_the_maker_adds_is_joined_with_what_the_set_carries(one, two, tmp_path):
    source = {"dataset": "ann/stripes", "license": "mit"}
    record = saved(tmp_path / "one", one, concentration={"source": source, "note": "by hand"})
    carried = record_of(one)
    assert record["source"] == {**carried["source"], **source} and record["note"] == "by hand"
    assert {key: record[key] for key in ("seed", "parameters", "cost", "synthetic")} == {
        key: carried[key] for key in ("seed", "parameters", "cost", "synthetic")
    }
    given = {"source": source, "generator": {"id": "ann/pipe"}, "configs": {"a": {"note": 1}}}
    record = saved(tmp_path / "both", {"a": one, "b": two}, concentration=given)
    for name, rows in (("a", one), ("b", two)):
        found = config_record(record, name)
        assert found["seed"] == record_of(rows)["seed"] and found["source"]["license"] == "mit"
        assert found["generator"] == {"sha256": carried["generator"]["sha256"], "id": "ann/pipe"}
    assert "note" not in config_record(record, "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "plain"}, "Config 'default' says itself that it was drawn with method='nopt', .* says 'plain'"),
        ({"seed": 9}, "seed=3, the given record says 9: leave 'seed' out"),
        ({"parameters": {"eta": 0.5}}, r"parameters.eta=1.0, the given record says 0.5"),
        ({"source": {"rows": 7}}, "source.rows=21, the given record says 7"),
        ({"generator": {"sha256": "0" * 64}}, "generator.sha256='.*', the given record says '0000"),
        ({"cost": {"images": 5}}, "cost.images=3, the given record says 5"),
        ({"configs": {"defautl": {}}}, "tells of a config 'defautl', but the configs are .*Nearest: 'default'"),
    ],
)
def test_contradictions_are_refused_by_name(one, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        save_dataset_folder(one, tmp_path / "set", concentration=given)
    assert not (tmp_path / "set").exists()


def test_names_of_the_source_may_be_more_exact(pipe, targets):
    targets.provenance["dataset"] = "imagenette"
    parameters = {"images_per_class": 1}
    for name in ("frgfm/imagenette", "Imagenette"):
        record = concentration_record(
            pipe, targets, method="nopt", seed=0, parameters=parameters, source={"dataset": name, "split": "train"}
        )
        assert record["source"]["dataset"] == name and record["source"]["rows"] == 21
    for source, message in (
        ({"dataset": "frgfm/imagewoof"}, "dataset='imagenette'"),
        ({"fingerprint": "0"}, "fingerprint"),
    ):
        with pytest.raises(ValueError, match=f"targets were made of data with {message}.*leave"):
            concentration_record(pipe, targets, method="nopt", seed=0, parameters=parameters, source=source)


# Rows that were changed are said to be, others never.


def test_soft_labels_and_real_images_change_no_drawn_row(one, real_images, tmp_path):
    soft = with_soft_labels(one)
    doped = dope(one, real_images, images_per_class=3, strategy="random")
    theirs = real_images.select(range(3))
    again = dope(doped, real_images, images_per_class=4, strategy="random", seed=1)
    sets = {"soft": soft, "doped": doped, "both": with_soft_labels(doped), "again": again}
    sets["other"] = dope(theirs, real_images, images_per_class=2, strategy="random")
    record = saved(tmp_path / "set", sets)
    for name in sets:
        assert "changed" not in config_record(record, name), name
    assert "changed" not in json.dumps(record) and verify(tmp_path / "set")
    assert config_record(record, "again")["doping"]["before"] == record_of(doped)["doping"]
    for name in ("soft", "doped", "both"):
        found = recorded_rows(record, name)
        assert found["rows_sha256"] == found["published_sha256"] == rows_sha256(one) and found["changed"] is None
    assert recorded_rows(record, "doped")["real"] == 6


def changes(name, dataset):
    """A set after something was done with it."""
    darker = {"image": [image.point(lambda value: value // 2) for image in dataset["image"]]}
    swapped = dataset.features.copy()
    swapped["label"] = ClassLabel(names=["square", "circle", "triangle"])
    table = {column: dataset[column][:] for column in dataset.column_names}
    kind = dataset.features
    return {
        "fewer": lambda: dataset.select([0, 2]),
        "order": lambda: dataset.select([2, 1, 0, *range(3, len(dataset))]),
        "pixels": lambda: type(dataset).from_dict({**table, **darker}, features=kind, info=dataset.info.copy()),
        "names": lambda: dataset.cast(Features(swapped)),
        "seeds": lambda: dataset.map(lambda row: {"seed": row["seed"] + 1}),
        "plain": lambda: dataset.select([1, 0, 2]).select_columns(["image", "label"]),
    }[name]()


@pytest.mark.parametrize("change", ["fewer", "order", "pixels", "names", "seeds", "plain"])
def test_changed_rows_are_said_to_be(change, one, tmp_path):
    rows = changes(change, one)
    assert record_of(rows) is not None
    record = saved(tmp_path / "set", {"a": rows, "b": one})
    found = recorded_rows(record, "a")
    assert "changed" in config_record(record, "a") and "changed" not in config_record(record, "b")
    assert found["changed"] and verify(tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "| since then | " in card.split("### `a`")[1].split("### `b`")[0] and "[!WARNING]\n> Rows" in card
    # nor does a set become what it is not when its old record is given for it
    plain = rows.select_columns(rows.column_names)
    plain.info.description = ""
    record = saved(tmp_path / "given", plain, concentration=record_of(one))
    assert record["changed"]


def test_rows_that_were_changed_are_never_called_identical(one, real_images, tmp_path):
    """What `recipes/concentrate.py --from` tells after it has drawn the rows of `one` again."""
    doped = dope(one, real_images, images_per_class=3, strategy="random")
    sets = {"kept": one, "cut": one.select([0, 2]), "soft": with_soft_labels(one), "doped": doped}
    sets |= {"cut-doped": doped.select([0, 2, *range(3, len(doped))])}
    record, told = saved(tmp_path / "set", sets), {}
    for name in sets:
        told[name] = compared({"dataset": name, "versions": {}, **recorded_rows(record, name)}, rows_sha256(one))
    assert {name: outcome["identical"] for name, (outcome, _) in told.items()} == {
        "kept": True, "cut": False, "soft": True, "doped": True, "cut-doped": False,
    }  # fmt: skip
    assert told["kept"][1] == " All rows are identical to those of kept."
    assert told["doped"][1] == " All synthetic rows are identical to those of doped."
    for name in ("cut", "cut-doped"):
        assert "identical" not in told[name][1] and f"NOT as {name} has them: rows were changed" in told[name][1]
    assert "DIFFER" in compared({"dataset": "x", "versions": {}, **recorded_rows(record, "kept")}, "0" * 64)[1]
    # a set of an earlier version whose record told a falsehood in silence
    for split in record["configs"]["cut"]["splits"].values():
        assert split["rows_sha256"] != record["configs"]["kept"]["splits"]["train"]["rows_sha256"]
    del record["configs"]["cut"]["changed"]
    assert recorded_rows(record, "cut")["changed"] == "its rows are not those that its record says were drawn"


@pytest.mark.parametrize("change", ["order", "pixels"])
def test_changed_real_rows_of_a_doped_set_are_said_to_be(change, one, real_images, tmp_path):
    doped = dope(one, real_images, images_per_class=3, strategy="random")
    kept = [row for row, source in enumerate(doped["source"]) if source == 0]
    record = saved(tmp_path / "left-out", doped.select([*kept, len(kept)]))
    assert "real rows were changed" in record["changed"]
    assert "rows were changed" in saved(tmp_path / "set", changes(change, doped))["changed"]
    no_column = doped.remove_columns(["source", "real_index"])
    assert "changed" not in saved(tmp_path / "columns", no_column)  # the rows are known by their images


def test_a_false_record_does_not_verify(one, two, tmp_path):
    record = saved(tmp_path / "set", one)
    record["synthetic"] = record_of(two)["synthetic"]
    (tmp_path / "set" / "concentration.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(
        ValueError,
        match="(?s)says of how it was made is not what is recorded.*not those that the record says were drawn",
    ):
        verify(tmp_path / "set")


# Targets of another set.


def test_targets_of_another_set_are_refused(one, two, pipe, real_images, targets, make, tmp_path):
    fewer = MatchingTargets.from_dataset(real_images.select(range(9)), pipe, embedding_dim=256, progress=False)
    with pytest.raises(
        ValueError,
        match=r"Config 'default' was drawn for targets with the SHA-256 .*21 images\), those given .*9 images",
    ):
        save_dataset_folder(one, tmp_path / "a", targets=fewer)
    plain = concentrate(pipe, None, 1, method="plain", **OPTIONS)
    sets = {"plain": plain, "one": one, "two": two}
    with pytest.raises(
        ValueError,
        match=r"Config 'plain' was drawn without targets \(plain\): `targets=\{name: .* \['one', 'two'\]\}`",
    ):
        save_dataset_folder(sets, tmp_path / "a", targets=targets)
    record = saved(tmp_path / "a", sets, targets={name: targets for name in ["one", "two"]})  # as it says
    assert "path" in config_record(record, "one")["targets"] and "targets" not in config_record(record, "plain")
    animals = make.images((2, 2), names=("cat", "dog"))
    with pytest.raises(ValueError, match="are of other classes: they have .*'circle'.*but not 'cat'"):
        save_dataset_folder(animals, tmp_path / "b", targets=targets)
    pipe.register_modules(classifier=tiny_convnet(seed=9))
    with pytest.raises(ValueError, match="classifier"):
        concentration_record(pipe, targets, method="nopt", seed=0, parameters={"images_per_class": 1})


# What is stored is what is said.


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_soft_labels_are_stored_as_the_card_says(kind, one, tmp_path):
    record = saved(tmp_path / "set", with_soft_labels(one, kind))
    stored = load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache"))
    assert stored.features["soft_label"] == List(Value("float16"), length=3)
    assert "half precision" in (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert record["configs"]["default"]["features"]["soft_label"]["feature"]["dtype"] == "float16"
    saved(tmp_path / "top", with_soft_labels(one, kind), soft_label_top_k=2)
    stored = load_dataset(str(tmp_path / "top"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(stored[0]["soft_label"]["indices"]) == 2


def test_the_protocol_of_a_students_clarity_is_recorded_in_full(one, real_images, pipe):
    protocol = get_protocol("quick", steps=2, learning_rate=0.005)
    rule = Clarity(protocol=protocol, num_students=2, architecture="convnet-2")
    doping = record_of(dope(one, real_images, pipe, images_per_class=2, strategy=rule, progress=False))["doping"]
    told = protocol_from_dict(doping["strategy"]["protocol"])
    # the student learns the labels of the pipeline's classifier
    assert told.learning_rate == 0.005 and told.steps == 2 and told.label_type == "teacher" and told.temperature == 1
    assert doping["strategy"] | {"protocol": None} == {
        **{"name": "clarity", "student": None, "protocol": None, "architecture": "convnet-2", "num_students": 2}
    }
    assert len(doping["classifier_sha256"]) == 64
    rule = Clarity(student=pipe.classifier)
    given = record_of(dope(one, real_images, strategy=rule, total=6, progress=False))["doping"]["strategy"]
    assert given["student"]["architecture"] == "ConvNetForImageClassification" and "protocol" not in given


def test_a_small_set_of_several_sizes_has_no_size_of_its_own(make):
    row = make.images((1, 1, 1), size=8)
    mixed = type(row).from_dict(
        {"image": [*row["image"], *make.images((1, 1, 1), size=12)["image"]], "label": [0, 1, 2] * 2},
        features=row.features,
    )
    options = {"images_per_class": 3, "strategy": "random"}
    with pytest.raises(ValueError, match="2 sizes \\(3 of 8 x 8, 3 of 12 x 12\\).*`image_size=8`.*'original'"):
        dope(mixed, make.images((3, 3, 3), size=10), **options)
    for size, expected in ((8, 8), ("original", 10)):  # as it says
        doped = dope(mixed, make.images((3, 3, 3), size=10), image_size=size, **options)
        assert {image.size for image in doped["image"][6:]} == {(expected, expected)}
        assert record_of(doped)["doping"]["image_size"] == size


def test_results_are_published_without_places(one, tmp_path):
    results = {"rows": [], "config": {"dataset": "/home/ann/photos", "output_dir": "outputs/x", "seed": 1}}
    saved(tmp_path / "set", one, results=results)
    told = json.loads((tmp_path / "set" / "results.json").read_text(encoding="utf-8"))
    assert told["config"] == {"dataset": "photos", "output_dir": "outputs/x", "seed": 1}
