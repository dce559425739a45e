"""recipes/look.py: the page of a folder or repository, with what was published with it."""

import json

import pytest

from dsco_hf import concentrate
from dsco_hf.hub.folder import save_dataset_folder
from hub.samples import RECORD, RESULTS, tiny_dataset
from recipes import look


@pytest.fixture
def page(tmp_path, capsys):
    def made(*arguments):
        path = look.main([*map(str, arguments), "--output_file", str(tmp_path / "look.html")])
        told = capsys.readouterr().out
        assert told.endswith(f" MB: open {path.resolve().as_uri()} in a browser.\n")
        return path.read_text("utf-8")

    return made


def test_a_folder_with_its_record_and_results(page, tmp_path):
    configs = {"ipc1": tiny_dataset(1), "ipc3": tiny_dataset(3, real=2)}
    folder = save_dataset_folder(
        configs, tmp_path / "set", default_config="ipc3", concentration=RECORD, results=RESULTS
    )
    text = page(folder)
    assert "<title>set</title>" in text and "6 images of 2 classes: 2 real, 4 synthetic." in text
    assert "96.80 ± 0.31" in text and "denoiser calls" in text and "ann/digits" in text
    (tmp_path / "other.json").write_text(json.dumps({"rows": [{"method": "nopt", "accuracy_mean": 0.125}]}))
    text = page("--dataset", folder, "--dataset_name", "ipc1", "--results", tmp_path / "other.json", "--title", "One")
    assert "<title>One</title>" in text and "2 images of 2 classes: 2 synthetic." in text and "12.50" in text


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("results.json", {"rows": "all"}, r"`results\['rows'\]` must be a list of rows, got 'all'"),
        ("results.json", {"rows": [{"method": "nopt", "accuracy_mean": "high"}]}, "accuracy_mean"),
        ("concentration.json", {"configs": {"default": {"cost": "low"}}}, r"\['cost'\]` must be a dict, got 'low'"),
    ],
)
def test_what_somebody_else_has_published_is_checked(page, tmp_path, name, content, error):
    save_dataset_folder(tiny_dataset(1), tmp_path / "set", concentration=RECORD)
    (tmp_path / "set" / name).write_text(json.dumps(content))
    with pytest.raises((TypeError, ValueError), match=error):
        page(tmp_path / "set")


def test_images_alone(page, tmp_path):
    tiny_dataset(2).select_columns(["image", "label"]).to_parquet(tmp_path / "images.parquet")
    text = page(tmp_path / "images.parquet", "--real", tmp_path / "images.parquet")
    assert "4 images of 2 classes." in text and text.count(" at 0.0000") == 4 and "How it was made" not in text


def test_what_it_was_drawn_with_measures_it(page, pipe, targets, real_images, tmp_path):
    pipe.save_pretrained(tmp_path / "generator")
    small = concentrate(
        type(pipe).from_pretrained(tmp_path / "generator"), targets, images_per_class=1, num_inference_steps=2
    )
    save_dataset_folder(small, tmp_path / "set", targets=targets)
    real_images.to_parquet(tmp_path / "real.parquet")
    text = page(tmp_path / "set", "--real", tmp_path / "real.parquet", "--measure")
    assert "by the features of the classifier" in text and text.count(" (random real ") == 3


@pytest.mark.slow
def test_a_repository(hub, ann, tmp_path):
    folder = save_dataset_folder(tiny_dataset(2), tmp_path / "set", concentration=RECORD, results=RESULTS)
    call = "import sys; from recipes import look; return look.main(arguments).read_text('utf-8')"
    ann.run("import dsco_hf; dsco_hf.publish(folder, 'ann/looked')", folder=str(folder))
    text = ann.run(call, arguments=["ann/looked", "--output_file", str(tmp_path / "look.html")])
    assert "<title>looked</title>" in text and "96.80 ± 0.31" in text and "4 images of 2 classes" in text
