import copy
import json

import huggingface_hub
import pytest
import yaml

from dsco_hf.data.images import draw_samples
from dsco_hf.hub.cards import (
    DatasetCardFields,
    accuracy_table,
    combined_license,
    dataset_metadata,
    is_non_commercial,
    render_dataset_card,
    size_category,
)
from dsco_hf.studies.generator_check import GeneratorCheck
from hub.cards import validate_card
from hub.golden import check_golden
from hub.samples import HOSTILE_NAMES, RECORD, RESULTS, tiny_dataset


def described(dataset, *, rows_sha256="0" * 64):
    """A config as `concentration.json` describes it, with fixed hashes and sizes."""
    labels = dataset["label"][:]
    sources = dataset["source"][:]
    return {
        "features": dataset.features.to_dict(),
        "splits": {
            "train": {
                "rows": len(dataset),
                "rows_per_class": [labels.count(i) for i in range(len(dataset.features["label"].names))],
                "sources": {n: sources.count(i) for i, n in enumerate(("synthetic", "real")) if sources.count(i)},
                "rows_sha256": rows_sha256,
                "bytes": 1000,
                "files": [{"path": "data/x/train-00000-of-00001.parquet", "size": 900, "sha256": "1" * 64}],
            }
        },
    }


def record(**configs):
    configs = {name: described(dataset) for name, dataset in configs.items()}
    return {"format_version": 1, **copy.deepcopy(RECORD), "default_config": next(iter(configs)), "configs": configs}


def test_golden_card():
    concentration = record(ipc10=tiny_dataset(10), ipc1=tiny_dataset(1), doped=tiny_dataset([7, 9], real=6))
    fields = DatasetCardFields(repo_id="ann/digits-dsco", language=["en"], description="For teaching.")
    figures = ["figures/samples.png", "figures/accuracy.png"]
    text = render_dataset_card(concentration, fields=fields, results=RESULTS, figures=figures)
    check_golden("dataset_card.md", text)
    assert validate_card(text, "dataset") == []


def test_golden_card_of_bare_records_and_soft_labels():
    concentration = {"default_config": "default", "configs": {"default": described(tiny_dataset(1, soft_labels=True))}}
    text = render_dataset_card(concentration)
    check_golden("dataset_card_bare.md", text)
    assert validate_card(text, "dataset") == []


def test_metadata_is_what_the_hub_and_datasets_expect():
    text = render_dataset_card(record(ipc1=tiny_dataset(1), ipc10=tiny_dataset(10)))
    data = huggingface_hub.DatasetCard(text).data
    assert data.task_categories == ["image-classification"] and data.size_categories == ["n<1K"]
    assert "dataset-concentration" in data.tags and data.source_datasets == ["ann/digits"]
    assert [config["config_name"] for config in data.configs] == ["ipc1", "ipc10"]
    assert [config.get("default") for config in data.configs] == [True, None]
    assert data.dataset_info[1]["splits"][0]["num_examples"] == 20


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_harm_nothing(name):
    dataset = tiny_dataset(1, ["ok", name])
    hostile = record(default=dataset)
    hostile["parameters"] = {name: name}
    hostile["source"] = {"dataset": name, "license": name}
    hostile["generator"] = {"id": name, "revision": name}
    hostile["versions"] = {name: name}
    hostile["cost"] = {name: name}
    hostile["method"] = name
    results = {"config": {name: name}, "rows": [{"method": name, "accuracy_mean": 0.5}]}
    fields = DatasetCardFields(pretty_name=name, description=name, license="other", tags=["t"])
    text = render_dataset_card(hostile, fields=fields, results=results)
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    metadata = yaml.safe_load(front)
    assert metadata["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]["1"] == name
    assert metadata["license"] == "other"
    assert huggingface_hub.DatasetCard(text).data.license == "other"
    unescaped = body.replace("\\]", "")
    assert "<script" not in body and "](javascript" not in unescaped and "](https://evil" not in unescaped
    assert body.count("<!-- dsco_hf:end -->") == 1
    assert "---" not in body.splitlines()
    assert len(body) < 40_000
    assert "49" not in body.split("Load it")[0]  # nothing from outside is a template
    markdown_it = pytest.importorskip("markdown_it")
    html = markdown_it.MarkdownIt("commonmark").enable(["table"]).render(body)
    assert html.count("<h1>") == 1 and "<script" not in html and 'href="javascript' not in html and "<img" not in html


def test_accuracy_table_is_sorted_and_made_of_the_results():
    table = accuracy_table(RESULTS)
    assert [(row["method"], row["images_per_class"]) for row in table] == [
        ("DsCo", "1"),
        ("random real", "10"),
        ("plain generator", "10"),
        ("DsCo", "10"),
        ("all real data", "–"),
    ]
    assert table[3]["accuracy"] == "96.80 ± 0.31" and table[3]["retention"] == "97.0" and table[3]["runs"] == "6"
    assert table[1]["discrepancy"] == "–"


def test_accuracy_table_of_partial_results():
    assert accuracy_table(None) == [] and accuracy_table({}) == []
    row = accuracy_table({"rows": [{"method": "mine", "accuracy_mean": float("nan")}]})[0]
    assert row["method"] == "mine" and row["accuracy"] == "– ± –" and row["retention"] == "–"
    with pytest.raises(ValueError, match="96.8.*fractions.*Divide"):
        accuracy_table({"rows": [{"method": "nopt", "accuracy_mean": 96.8}]})


def test_results_survive_json():
    assert accuracy_table(json.loads(json.dumps(RESULTS))) == accuracy_table(RESULTS)


@pytest.mark.parametrize(
    ("source", "generator", "expected"),
    [
        ("mit", "mit", {"license": "mit"}),
        ("mit", "cc-by-nc-4.0", {"license": "other", "license_name": "mit-and-cc-by-nc-4.0"}),
        (None, "mit", {"license": "unknown"}),
        ("mit", None, {"license": "unknown"}),
        ("unknown", "mit", {"license": "unknown"}),
    ],
)
def test_licences_are_combined(source, generator, expected):
    assert combined_license(source, generator) == expected


def test_the_card_warns_of_unknown_and_non_commercial_licences():
    concentration = record(default=tiny_dataset(1))
    text = render_dataset_card(concentration)
    assert "Not for commercial use" in text and "cc-by-nc-4.0" in text  # known for this generator
    concentration["generator"] = {"id": "ann/own"}
    assert "Licence of the generator's weights not known" in render_dataset_card(concentration)
    free = DatasetCardFields(source_license="cc0-1.0", generator_license="cc0-1.0")
    text = render_dataset_card(concentration, fields=free)
    assert "[!WARNING]" not in text and huggingface_hub.DatasetCard(text).data.license == "cc0-1.0"
    chosen = DatasetCardFields(license="cc-by-4.0")
    assert dataset_metadata(concentration, fields=chosen)["license"] == "cc-by-4.0"
    assert is_non_commercial("CC-BY-NC-SA-4.0") and not is_non_commercial("cc-by-4.0") and not is_non_commercial(None)


def test_configs_with_records_of_their_own_are_told_apart():
    concentration = record(ipc1=tiny_dataset(1), doped=tiny_dataset(2, real=1))
    own = {"method": "nopt+doping", "parameters": {"images_per_class": 2}, "cost": {"seconds": 1.5, "note": "a|b"}}
    concentration["configs"]["doped"] |= own
    text = render_dataset_card(concentration)
    assert "| `ipc1` (default) | DsCo | train |" in text and "| `doped` | DsCo + doping | train |" in text
    first, doped = text.split("### `ipc1`")[1].split("### `doped`")
    assert "| parameter: images\\_per\\_class | 10 |" in first and "| method | nopt |" in first
    assert "| parameter: images\\_per\\_class | 2 |" in doped and "| method | nopt+doping |" in doped
    assert "| source data | ann/digits |" in text.split("### `ipc1`")[0]  # what both share stands above, once
    assert "| `doped`: seconds | 1.5 |" in text and "| `ipc1`: seconds | 12.3 |" in text
    assert "| `doped`: note | a\\|b |" in text


def test_real_rows_are_mentioned():
    assert "unaltered images of the source" in render_dataset_card(record(doped=tiny_dataset(2, real=1)))
    assert "No row is a real image" in render_dataset_card(record(ipc2=tiny_dataset(2)))


@pytest.mark.parametrize(
    ("rows", "name"), [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**5, "100K<n<1M"), (10**7, "1M<n<10M")]
)
def test_size_categories(rows, name):
    assert size_category(rows) == name


def test_sample_grids():
    assert draw_samples(tiny_dataset(1, ["only"])).size == (48, 48)
    assert draw_samples(tiny_dataset([3, 0, 1], ["a", "b", "c"])).size == (3 * 50 - 2, 2 * 50 - 2)
    assert draw_samples(tiny_dataset(1, side=200, mode="RGB")).size == (96, 2 * 98 - 2)
    assert draw_samples(tiny_dataset(20, list("abcdefghijklmno"))).size == (498, 498)


def test_random_real_images_stand_beside_every_discrepancy():
    told = {"images_per_class": 1, "images": 10, "accuracy_mean": 0.5}
    rows = [{"method": "nopt", "discrepancy": 0.2, **told}, {"method": "random", "discrepancy": 0.6, **told}]
    beside = [{**rows[0], "random_discrepancy": 0.7}]
    assert [row["random_discrepancy"] for row in accuracy_table({"rows": rows})] == ["0.6000", "0.6000"]
    assert accuracy_table({"rows": beside})[0]["random_discrepancy"] == "0.7000"
    assert accuracy_table({"rows": rows[:1]})[0]["random_discrepancy"] == "–"


def test_the_check_of_the_generator_stands_on_the_card():
    concentration = record(ipc1=tiny_dataset(1))
    shares = {f"class {index:02d}": index / 20 for index in range(12)}
    check = GeneratorCheck(0.5, 0.9, shares, 12.5, 40, 0.1).record()
    concentration |= {"generator_check": check, "discrepancy": {"set": 0.25, "as many random real images": 0.5}}
    card = " ".join(render_dataset_card(concentration).split())
    for told in (
        "accuracy | 0.5 |",
        "accuracy_real | 0.9 |",
        "class 00 0, class 01 0.05,",
        "(7 more)",
        "level | 0.5 |",
    ):
        assert told in card.replace("\\", "")
    assert "discrepancy: set | 0.25" in card and "discrepancy: as many random real images | 0.5" in card
