"""Predicted against measured time of real concentrations: how far the cost model can be trusted on this machine.

    python recipes/benchmarks/plan_accuracy.py --out plan_accuracy.json
    python recipes/benchmarks/plan_accuracy.py --num_classes 2 --images_per_class 3 --num_inference_steps 4

For every setting, a probe times calls of a few steps, the cost model predicts from that, and then the concentration
is really done: a generator and a classifier of the size that fits the 8x8 digits, with random weights, which do not
change the time. Prints one JSON object as its last line. `predicted_over_measured`: predicted by measured seconds of
the setting that is farthest off, each setting's being the median of its rounds; `calls_exact`: 1 if all predicted
calls are those that the run counted.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dsco_hf import (
    ConvNetConfig,
    ConvNetForImageClassification,
    DsCoPipeline,
    NOpt,
    Plain,
    Sampling,
    concentrate_and_report,
)
from dsco_hf.concentration.concentrate import plan_units
from dsco_hf.costs.passes import Rehearsal, predict, stand_in_targets
from dsco_hf.costs.probe import probe_seconds
from dsco_hf.costs.tracing import pass_costs


# by name: (images per class by those of the command line, options)
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "default": (1, {}),
    "plain": (1, {"method": Plain()}),
    "guided": (1, {"guidance_scale": 4.0, "method": NOpt(start=0.5, lookahead="guided")}),
    "micro-batches": (1, {"batch_size": 16, "method": NOpt(start=0.0)}),
    "blocks": (3, {"method": NOpt(start=0.8)}),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Predicts and runs every setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--images_per_class", type=int, default=10)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--block_size", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="of each setting; the one of the middle is reported")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    pipe = digits_pipeline(options.num_classes)
    settings = {}
    for name, setting in SETTINGS.items():
        rounds = [compare(pipe, options, *setting) for _ in range(options.rounds)]
        rounds.sort(key=lambda found: found["predicted_over_measured"])
        settings[name] = rounds[len(rounds) // 2] | {
            "of_all_rounds": [found["predicted_over_measured"] for found in rounds],
            "calls_exact": all(found["calls_exact"] for found in rounds),
        }
    ratios = [found["predicted_over_measured"] for found in settings.values()]
    results = {
        "predicted_over_measured": max(ratios, key=lambda ratio: abs(math.log(ratio))),
        "calls_exact": int(all(found["calls_exact"] for found in settings.values())),
        "settings": settings,
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def digits_pipeline(num_classes: int) -> DsCoPipeline:
    """A DiT of 0.8 M parameters and a ConvNet for 8x8 pixels."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=1, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=num_classes, norm_elementwise_affine=False, activation_fn="gelu-approximate",
    )  # fmt: skip
    names = {index: str(index) for index in range(num_classes)}
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    config = ConvNetConfig(depth=2, width=32, image_size=8, num_channels=1, **labels)
    pipe = DsCoPipeline(
        transformer.eval(),
        DDIMScheduler(clip_sample=True),
        classifier=ConvNetForImageClassification(config).eval(),
        id2label=names,
    )
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def compare(pipe: DsCoPipeline, options: argparse.Namespace, factor: int, changes: dict[str, Any]) -> dict[str, Any]:
    """One setting: probe, prediction, run."""
    budget = options.images_per_class * factor
    call = {"guidance_scale": 1.0, "num_inference_steps": options.num_inference_steps, **changes}
    units = plan_units(options.num_classes, budget, block_size=options.block_size)
    images = max(unit.images for unit in units)
    rehearsal = Rehearsal(pipe, Sampling.of(**call))
    seconds = probe_seconds(rehearsal, images, images_per_class=options.block_size, repeats=5)
    found = predict(
        rehearsal, options.num_classes, budget, costs=pass_costs(pipe), seconds=seconds, block_size=options.block_size
    )
    targets = stand_in_targets(pipe, rehearsal.sampling.method)
    _, report = concentrate_and_report(pipe, targets, budget, block_size=options.block_size, progress=False, **call)
    counted = {name: getattr(report, name) for name in found.calls}
    return {
        "predicted_over_measured": round(found.seconds[1] / report.seconds, 3),
        "predicted_seconds": round(found.seconds[1], 3),
        "measured_seconds": round(report.seconds, 3),
        "calls_exact": found.calls == counted,
        "images": report.images,
        **counted,
    }


if __name__ == "__main__":
    main()
