"""What an image costs when there are many: blocks of one run up to 200 images per class, and targets of more data.

    python recipes/benchmarks/cost_per_image.py --out cost_per_image.json

A run draws `--images_per_class` images of each class in blocks; every block's seconds and calls are in its manifest.
The first block, which loads code and memory, does not count. Beside it, block by block, the same number of images is
drawn with targets that were made from a tenth of the data. Generator and classifier have random weights unless a
pipeline is given, which makes no difference to their cost.

Prints one JSON object as its last line. `calls_per_image`: how often an image passed through the denoiser, one entry
for every different number there was; `flatness`: seconds per image of the last quarter of the blocks by those of the
first quarter; `largest_deviation`: of a quarter's seconds per image from all of them, as a fraction;
`by_dataset_size`: seconds per image with targets of all data by those with targets of a tenth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dsco_hf.concentration.concentrate import Unit, UnitSampler, plan_units
from dsco_hf.concentration.run_folder import RunFolder, unit_name
from dsco_hf.concentration.runs import concentrate_to_folder
from dsco_hf.data.datasets import load_digits_dataset
from dsco_hf.evaluators import build_evaluator
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.call import Sampling
from dsco_hf.sampling.pipeline import DsCoPipeline


NAMES = [str(digit) for digit in range(10)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Draws, and reads the manifest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images_per_class", type=int, default=200)
    parser.add_argument("--block_size", type=int, default=10)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--pipeline", type=Path, help="pipeline folder with a classifier; random weights if left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pipe = make_pipeline(options.pipeline)
    digits = load_digits_dataset()["train"]
    some = digits.select(range(0, len(digits), 10))
    targets, of_some = (MatchingTargets.from_dataset(data, pipe, progress=False) for data in (digits, some))
    sizes = {"block_size": options.block_size, "images_per_call": options.block_size * len(NAMES)}
    sampling = {"num_inference_steps": options.num_inference_steps, "guidance_scale": 1.0}
    with tempfile.TemporaryDirectory() as scratch:
        whole, part = ({}, {})
        # in turns, so that whatever else the machine does falls on both alike
        for images in range(options.block_size, options.images_per_class + 1, options.block_size):
            for found, goal, name in ((whole, targets, "whole"), (part, of_some, "part")):
                folder = Path(scratch) / name
                concentrate_to_folder(pipe, goal, images, folder, progress=False, **sizes, **sampling)
                for unit in plan_units(len(NAMES), images, **sizes):
                    found[unit] = RunFolder(folder).entry(unit_name(unit))
        single = one_image(pipe, targets, sampling)
    results = figures(whole, part, single) | {
        "classes": len(NAMES),
        "weights": "random" if options.pipeline is None else "given",
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key not in ("out", "pipeline")},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def make_pipeline(folder: Path | None) -> DsCoPipeline:
    """The given pipeline, or one for the digits with random weights."""
    if folder is not None:
        return DsCoPipeline.from_pretrained(folder)
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=1, out_channels=1, num_layers=4, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    classifier = build_evaluator("convnet-2", class_names=NAMES, image_size=8, num_channels=1, width=64).eval()
    return DsCoPipeline(
        transformer, DDIMScheduler(clip_sample=True), classifier=classifier, id2label=dict(enumerate(NAMES))
    )


def one_image(pipe: DsCoPipeline, targets: MatchingTargets, sampling: dict[str, Any]) -> float:
    """Denoiser calls of a set of one image per class, per image."""
    *_, output = UnitSampler(pipe, targets, Sampling(**sampling)).draw(Unit(0, 0, range(len(NAMES)), range(1)))
    return output.denoiser_calls / len(NAMES)


def figures(whole: dict[Unit, Any], part: dict[Unit, Any], single: float) -> dict[str, Any]:
    """Ratios from the manifests of both runs."""
    calls = {single, *(entry["denoiser_calls"] / unit.images for unit, entry in whole.items())}

    def costs(entries: dict[Unit, Any]) -> list[float]:
        units = sorted(entries, key=lambda unit: unit.block)
        return [entries[unit]["seconds"] / unit.images for unit in units if unit.block > 0]

    seconds = costs(whole)
    quarter = max(1, len(seconds) // 4)
    quarters = [statistics.median(seconds[first : first + quarter]) for first in range(0, 4 * quarter, quarter)]
    middle = statistics.median(seconds)
    return {
        "calls_per_image": sorted(calls),
        "flatness": round(quarters[-1] / quarters[0], 4),
        "largest_deviation": round(max(abs(value / middle - 1) for value in quarters), 4),
        "by_dataset_size": round(statistics.median(a / b for a, b in zip(seconds, costs(part), strict=True)), 4),
        "seconds_per_image": round(middle, 5),
        "seconds_per_image_by_block": [round(value, 5) for value in seconds],
    }


if __name__ == "__main__":
    main()
