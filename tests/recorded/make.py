"""What stands in this folder, made at 5276f27: a tiny pipeline of the digits, and all that is kept or published of it.

    PYTHONPATH=. python tests/recorded/make.py DIR

It is not run again: `tests/test_recorded.py` holds later versions against what that one wrote.
"""

import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    QuantileTargets,
    build_evaluator,
    concentrate_and_report,
    concentrate_to_folder,
    concentration_record,
    load_digits_dataset,
    save_dataset_folder,
    train_evaluator,
)
from dsco_hf.data.datasets import load_pixels
from dsco_hf.generators.denoisers import GeneratorTrainingConfig, build_scheduler
from dsco_hf.generators.training import train_generator


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    digits = load_digits_dataset()["train"]
    names = digits.features["label"].names
    pixels, labels, _ = load_pixels(digits, num_channels=1)
    config = GeneratorTrainingConfig(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, train_steps=600, batch_size=64, learning_rate=3e-3
    )
    trained = train_generator(
        pixels, labels, config, num_classes=10, accelerator=Accelerator(cpu=True), progress=False
    )
    small = {"class_names": names, "image_size": 8, "num_channels": 1, "width": 8}
    classifier = train_evaluator(
        lambda: build_evaluator("convnet-2", norm="batch", **small),
        pixels,
        labels,
        protocol=quick(),
        seed=0,
        progress=False,
    ).model
    pipe = DsCoPipeline(
        trained.denoiser.eval(), build_scheduler(config, latents=False), id2label=dict(enumerate(names))
    )
    pipe.register_modules(
        classifier=classifier.eval(), classifier_2=build_evaluator("convnet-2", seed=1000, **small).eval()
    )
    pipe.save_pretrained(out / "pipeline")
    pipe = DsCoPipeline.from_pretrained(out / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    both = [{}, {"network": "classifier_2"}]
    targets = MatchingTargets.from_dataset(
        digits, pipe, features=both, second_moment=True, embedding_dim=96, progress=False
    )
    targets.save_pretrained(out / "targets")
    free = MatchingTargets.from_generator(
        pipe,
        embedding_dim=64,
        samples_per_class=8,
        num_inference_steps=6,
        guidance_scale=1.0,
        second_moment=True,
        weighting="posterior",
        progress=False,
    )
    free.save_pretrained(out / "targets_data_free")
    quantile = QuantileTargets.from_dataset(digits, pipe, progress=False)
    shared = {"num_inference_steps": 6, "guidance_scale": 1.0, "seed": 3, "progress": False}
    optimised = {**shared, "optimize_from": 0.0, "block_size": 2}
    calls = {
        "plain": (None, {**shared}),
        "rkhs": (targets, {**optimised}),
        "rkhs-contrast": (targets, {**optimised, "contrast": 4.0, "optimize_from": 0.5}),
        "ridge": (targets, {**optimised, "objective": "ridge"}),
        "data-free": (free, {**optimised, "objective": "ridge", "guidance_scale": 1.5}),
        "quantile": (quantile, {**shared, "objective": "quantile", "optimization_steps": 5}),
        "classifier": (None, {**shared, "objective": "classifier", "optimize_from": 0.5}),
    }
    arrays, facts = {}, {}
    for name, (matched, options) in calls.items():
        rows, report = concentrate_and_report(pipe, matched, 3, **options)
        arrays[name] = np.stack([np.asarray(image) for image in rows["image"]])  # (30, 8, 8)
        facts[name] = {
            "sha256": hashlib.sha256(arrays[name].tobytes()).hexdigest(),
            "options": options,
            "discrepancy": report.discrepancy,
            "calls": [report.denoiser_calls, report.decoder_calls, report.classifier_calls],
        }
    np.savez_compressed(out / "images.npz", **arrays)
    run = {key: value for key, value in optimised.items()}
    result = concentrate_to_folder(pipe, targets, 2, out / "run", images_per_call=10, **run)
    record = concentration_record(
        pipe,
        targets,
        result.report,
        method="nopt",
        seed=3,
        parameters={
            "images_per_class": 2,
            "images_per_call": 10,
            **{k: v for k, v in run.items() if k not in ("seed", "progress")},
        },
        source={"dataset": "digits"},
    )
    save_dataset_folder({"ipc2": result.dataset()}, out / "dataset", concentration=record, targets=targets)
    environment = {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "commit": "5276f27",
    }
    (out / "facts.json").write_text(json.dumps({"environment": environment, "sets": facts}, indent=1) + "\n")


def quick():
    from dsco_hf import get_protocol

    return get_protocol("quick", image_size=8, epochs=None, steps=300, batch_size=64)


if __name__ == "__main__":
    main()
