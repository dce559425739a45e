"""The pipeline that the package brings: a real one, small, which needs no network and goes by its name."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from dsco_hf import (
    DsCoPipeline,
    concentrate,
    get_protocol,
    load_digits_dataset,
    load_image_set,
    load_recorded,
    save_dataset_folder,
)
from dsco_hf.concentration.set_records import record_of
from dsco_hf.evaluators.batches import predict_logits
from dsco_hf.sampling.loading import EMBEDDED, embedded_folder
from hub.cards import validate_card
from recipes import embed


@pytest.fixture(scope="module")
def pipe():
    pipe = DsCoPipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_complete():
    folder = EMBEDDED / "digits"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert not any("_name_or_path" in path.read_text() for path in files if path.suffix == ".json")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert validate_card(text, "model") == [] and ModelCard(text).data.license == "cc-by-4.0"
    assert 'DsCoPipeline.from_pretrained("digits")' in text and "user/dsco-pipeline" not in text


def test_it_is_the_same_class_in_float32_and_knows_the_digits(pipe):
    assert type(pipe) is DsCoPipeline and pipe.dtype == torch.float32 == pipe.classifier.dtype
    assert list(pipe.id2label.values()) == [str(digit) for digit in range(10)]
    data = load_digits_dataset()["test"]
    test = load_image_set(data, protocol=get_protocol("quick"), num_channels=1)
    assert (predict_logits(pipe.classifier, test.pixels).argmax(1) == test.labels).float().mean() > 0.99
    drawn = pipe(
        class_labels=list(range(10)) * 4, num_inference_steps=10, generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images  # fmt: skip
    judged = predict_logits(pipe.classifier, 2 * drawn - 1).argmax(1)
    assert (judged == torch.arange(10).repeat(4)).float().mean() > 0.9


def test_another_precision_can_be_asked_for():
    assert DsCoPipeline.from_pretrained("digits", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pipeline_of_the_working_folder_goes_first(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "0").mkdir(parents=True)  # images of that name hide nothing
    assert embedded_folder("digits") == EMBEDDED / "digits"
    assert DsCoPipeline.from_pretrained("digits").name_or_path == "digits"
    pipe.save_pretrained("digits")
    assert embedded_folder("digits") is None
    assert DsCoPipeline.from_pretrained("digits").transformer.config._name_or_path.startswith("digits")
    for name in ("", ".", "digits/transformer", "../embedded/digits", str(EMBEDDED / "digits"), "nothing"):
        assert embedded_folder(name) is None


def test_sets_say_its_name_and_are_drawn_again(pipe, tmp_path):
    small = concentrate(pipe, None, 1, method="plain", class_labels=[3, 5], num_inference_steps=2, guidance_scale=1.0)
    record = record_of(small)
    assert record["generator"]["id"] == "digits" and record["classifier"]["id"] == "digits"
    save_dataset_folder(small, tmp_path / "set")
    text = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert str(EMBEDDED.parent) not in json.dumps(record) + text
    assert re.search(r"\| generator: .*digits.* \| cc-by-4.0 \|", text)
    again, targets, _ = load_recorded(tmp_path / "set")
    assert targets is None and again.name_or_path == "digits" and again.classifier is not None


@pytest.mark.slow
def test_the_recipe_that_made_it_makes_it_again(pipe, tmp_path, monkeypatch):
    """From the same weights the same weights; the card says what was measured."""
    monkeypatch.setattr(embed, "PER_CLASS", 1)
    pipe.save_pretrained(tmp_path / "trained")
    places = ["--into", str(tmp_path / "embedded"), "--results", str(tmp_path / "results")]
    embed.main(["--pipeline", str(tmp_path / "trained"), *places])
    made, stored = tmp_path / "embedded" / "digits", EMBEDDED / "digits"
    names = {path.relative_to(stored) for path in stored.rglob("*") if path.is_file()}
    assert {path.relative_to(made) for path in made.rglob("*") if path.is_file()} == names
    weights = [name for name in names if name.suffix == ".safetensors"]  # other files name versions of libraries
    assert len(weights) == 2 and all((made / name).read_bytes() == (stored / name).read_bytes() for name in weights)
    measured = json.loads((tmp_path / "results" / "half_precision.json").read_text())
    assert measured["samples"] == 10 and measured["classifier_agrees"] == 1 and measured["mean_difference"] == 0
    assert "of 10 plain samples that they are of their class" in (made / "README.md").read_text(encoding="utf-8")
