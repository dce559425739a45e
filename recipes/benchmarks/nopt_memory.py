"""Peak memory of noise optimisation at few and at many images per class, with the same micro-batch.

    python recipes/benchmarks/nopt_memory.py --out memory.json
    python recipes/benchmarks/nopt_memory.py --image_size 64 --many 400

Each measurement is a process of its own: a class-conditional transformer in the latents of an autoencoder, and a
ConvNet as the classifier, all with random weights; the digits, enlarged, are matched. `joint` optimises all images of
a class in one block, by micro-batches; `blocks` draws them in blocks of ten.

Prints one JSON object as its last line. `joint_ratio`, `blocks_ratio`: peak memory of the process at `--many` images
per class by that at `--few`; `joint_extra_ratio`, `blocks_extra_ratio`: the same without what the process held before
it drew the first image, null if the few images never reached above that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from dsco_hf import DsCoPipeline, MatchingTargets, Sampling, concentrate, load_image_dataset
from dsco_hf.evaluators import build_evaluator
from dsco_hf.utils import progress as memory


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures all cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=20, help="images per class")
    parser.add_argument("--many", type=int, default=200, help="images per class")
    parser.add_argument("--batch_size", type=int, default=20, help="images in a micro-batch")
    parser.add_argument("--block_size", type=int, default=10, help="images in a block, for `blocks`")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_inference_steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    measured: dict[str, dict[str, float]] = {}
    for name, count, block in (
        ("joint_few", options.few, options.few),
        ("joint_many", options.many, options.many),
        ("blocks_few", options.few, options.block_size),
        ("blocks_many", options.many, options.block_size),
    ):
        settings = {**vars(options), "images_per_class": count, "block": block, "out": None}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured[name] = pool.apply(measure, (settings,))
            pool.close()
            pool.join()
    results: dict[str, Any] = {}
    for kind in ("joint", "blocks"):
        few, many = measured[f"{kind}_few"], measured[f"{kind}_many"]
        results[f"{kind}_ratio"] = round(many["peak_mib"] / few["peak_mib"], 3)
        extra = {key: value["peak_mib"] - value["before_mib"] for key, value in (("few", few), ("many", many))}
        results[f"{kind}_extra_ratio"] = round(extra["many"] / extra["few"], 3) if extra["few"] > 0 else None
    results |= {
        "measured": measured,
        "device": "cpu",
        "threads": 1,
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Draws the images of one class; peak memory of this process in MiB, before and in the end."""
    torch.set_num_threads(1)
    pipe, targets = prepare(settings["image_size"])
    before = peak_mib()
    concentrate(
        pipe,
        targets,
        settings["images_per_class"],
        block_size=settings["block"],
        method=Sampling(batch_size=settings["batch_size"]),
        objective="rkhs",  # there is one class only
        images_per_call=1,  # one class a call
        num_inference_steps=settings["num_inference_steps"],
        guidance_scale=1.5,
        progress=False,
    )
    return {"before_mib": round(before, 1), "peak_mib": round(peak_mib(), 1)}


def prepare(image_size: int) -> tuple[DsCoPipeline, MatchingTargets]:
    """A small pipeline of latents with random weights, and the targets of one digit."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=image_size // 4,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=image_size,
    )
    names = [str(digit) for digit in range(10)]
    classifier = build_evaluator("convnet-3", class_names=names, image_size=image_size)
    pipe = DsCoPipeline(
        transformer.eval(),
        DDIMScheduler(clip_sample=False),
        vae=vae.eval(),
        classifier=classifier.eval(),
        id2label=dict(enumerate(names)),
    )
    return pipe, MatchingTargets.from_dataset(one_class(), pipe, batch_size=16, progress=False)


def one_class() -> Dataset:
    """Forty zeros."""
    digits = load_image_dataset("digits", split="train")
    zeros = digits.filter(lambda label: label == 0, input_columns="label", load_from_cache_file=False)
    features = digits.features.copy()
    features["label"] = type(features["label"])(names=["0"])
    return zeros.select(range(40)).cast(features)


def peak_mib() -> float:
    """The most memory that this process has held so far."""
    return memory.peak_bytes() / 2**20


if __name__ == "__main__":
    main()
