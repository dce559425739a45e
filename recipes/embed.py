"""Puts a trained pipeline into the package, in half precision, and measures what that changes.

    accelerate launch recipes/train_classifier.py --config recipes/configs/classifier_digits.yaml
    accelerate launch recipes/train_generator.py --config recipes/configs/generator_digits.yaml \
        --classifier outputs/classifier_digits
    python recipes/embed.py --pipeline outputs/generator_digits --name digits

`DsCoPipeline.from_pretrained("digits")` then loads it, in float32. What both precisions draw and know of the digits
stands in `<results>/half_precision.json`; the card is that of a published pipeline.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from dsco_hf import DsCoPipeline, get_protocol, load_digits_dataset, load_image_set
from dsco_hf.evaluators.batches import predict_logits
from dsco_hf.hub.model_cards import FILL, render_pipeline_card
from dsco_hf.sampling.loading import EMBEDDED
from dsco_hf.utils.files import write_json


PER_CLASS = 50


def main(arguments: list[str] | None = None) -> None:
    """Loads, stores, measures and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, default=Path("outputs/generator_digits"))
    parser.add_argument("--name", default="digits")
    parser.add_argument("--into", type=Path, default=EMBEDDED, help="folder of the embedded pipelines")
    parser.add_argument("--results", type=Path, default=Path("recipes/results/digits_pipeline"))
    options = parser.parse_args(arguments)
    folder = options.into / options.name
    shutil.rmtree(folder, ignore_errors=True)
    DsCoPipeline.from_pretrained(options.pipeline, dtype=torch.float16).save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)
    for code in folder.rglob("*.py"):  # for repositories, from which diffusers loads by itself
        code.unlink()
    trained = DsCoPipeline.from_pretrained(options.pipeline, dtype=torch.float32)
    stored = DsCoPipeline.from_pretrained(folder, dtype=torch.float32)
    for path in folder.rglob("*.json"):  # where its models lay on this machine
        told = re.sub(r'^ *"_name_or_path": ".*",\n', "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        path.write_text(told, encoding="utf-8")
    measured = compare(trained, stored)
    measured["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "half_precision.json", measured)
    (folder / "README.md").write_text(card(stored, options.name, measured), encoding="utf-8")
    print(measured)


@torch.no_grad()
def compare(trained: DsCoPipeline, stored: DsCoPipeline) -> dict[str, Any]:
    """What float32 weights and those rounded to float16 know of the test images and draw from the same noise."""
    rows = load_digits_dataset()["test"]
    test = load_image_set(rows, protocol=get_protocol("quick"), num_channels=1)
    known, drawn = [], []
    labels = torch.arange(10).repeat_interleave(PER_CLASS)
    for pipe in (trained, stored):
        pipe.set_progress_bar_config(disable=True)
        known.append(predict_logits(pipe.classifier, test.pixels).argmax(1))
        draw = {"num_inference_steps": 40, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        drawn.append(pipe(class_labels=labels.tolist(), **draw).images)  # (B, 1, 8, 8), range [0, 1]
    difference = (drawn[0] - drawn[1]).abs()
    judged = [predict_logits(trained.classifier, 2 * images - 1).argmax(1) for images in drawn]
    return {
        "test_images": len(test.labels),
        "classifier_accuracy": [float((found == test.labels).float().mean()) for found in known],
        "classifier_agrees": float((known[0] == known[1]).float().mean()),
        "samples": len(labels),
        "samples_of_their_class": [float((found == labels).float().mean()) for found in judged],
        "mean_difference": float(difference.mean()),  # of pixels in [0, 1]
        "images_within_1_of_255": float((difference.flatten(1).amax(1) <= 1 / 255).float().mean()),
    }


def card(pipe: DsCoPipeline, name: str, measured: dict[str, Any]) -> str:
    """The card of a published pipeline, with what was measured, and without the way through a repository."""
    text = render_pipeline_card(pipe, repo_id=name, license="cc-by-4.0")
    text = re.sub(r"Through diffusers, .*?```\n\n", "", text, count=1, flags=re.DOTALL)
    trained, stored = (f"{100 * value:.1f} %" for value in measured["classifier_accuracy"])
    mine, rounded = (f"{100 * value:.1f} %" for value in measured["samples_of_their_class"])
    told = (
        f"The classifier is right on {stored} of {measured['test_images']} test images of the digits ({trained} "
        f"before its weights were rounded to float16), and says of {rounded} of {measured['samples']} plain samples "
        f"that they are of their class ({mine}). From the same noise, pixels in [0, 1] differ by "
        f"{measured['mean_difference']:.1e} in the mean. Sets drawn with it are in `recipes/results/quickstart`, "
        "its training in `recipes/results/digits_pipeline`."
    )
    return FILL.sub(lambda match: f"{match[1]}{told}{match[3]}" if match["name"] == "measured" else match[0], text)


if __name__ == "__main__":
    main()
