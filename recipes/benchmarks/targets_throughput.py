"""The pass over a dataset that makes targets, against the classifier's own forward pass on images in memory.

    python recipes/benchmarks/targets_throughput.py --out throughput.json
    python recipes/benchmarks/targets_throughput.py --dataset path/to/cifar10/train.parquet --seconds 60

Both sides run the classifier on batches of the same size with the same number of threads (`--threads`), and are
measured in turns. The pass reads PNG images from parquet files, decodes them in other threads (`--decode_threads`),
stores the features, and embeds them; its fixed costs, such as the bandwidth, are spread over the images that are seen
in `--seconds`. Without `--dataset`, the images are the digits of scikit-learn, enlarged to 32 px and coloured.

Prints one JSON object as its last line. `fraction`: images per second of the pass by those of the forward pass, the
smaller of the architectures; `memory_ratio`: peak memory of a process whose pass sees a stream of `--many` images by
that of one that sees `--few`; `memory_ratio_mapped`: the same for a dataset in an Arrow file, whose pages count as
memory of the process while they are mapped, although the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, disable_progress_bars
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dsco_hf import DsCoPipeline, MatchingTargets, load_image_dataset
from dsco_hf.data.datasets import class_names
from dsco_hf.data.pixels import default_threads, iterate_pixels
from dsco_hf.data.schema import find_columns
from dsco_hf.evaluators import build_evaluator
from dsco_hf.utils import progress as memory


SIZE = 32


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures throughput, then memory; everything in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="Hub id, folder or parquet file; enlarged digits if none")
    parser.add_argument("--split", default="train")
    parser.add_argument("--architectures", nargs="+", default=["convnet-3", "resnet-18"])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of the forward pass")
    parser.add_argument("--decode_threads", type=int, default=default_threads())
    parser.add_argument("--seconds", type=float, default=25.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--few", type=int, default=5_000, help="images")
    parser.add_argument("--many", type=int, default=50_000, help="images; 0 leaves memory out")
    parser.add_argument("--memory_width", type=int, default=32, help="of the ConvNet-3 that memory is measured with")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    settings = {**vars(options), "out": None}
    with tempfile.TemporaryDirectory() as folder:
        if options.dataset is None:
            settings["dataset"] = run(write_digits, folder, max(options.many, 1_000))
        speeds = {name: run(measure_speed, {**settings, "architecture": name}) for name in options.architectures}
        peaks = {
            name: [run(measure_memory, settings, count, name == "stream") for count in (options.few, options.many)]
            for name in ("stream", "mapped")
            if options.many
        }
    results = {
        "fraction": round(min(speed["fraction"] for speed in speeds.values()), 4),
        "memory_ratio": round(peaks["stream"][1] / peaks["stream"][0], 4) if peaks else None,
        "memory_ratio_mapped": round(peaks["mapped"][1] / peaks["mapped"][0], 4) if peaks else None,
        "by_architecture": speeds,
        "peak_mib": {name: [round(peak, 1) for peak in pair] for name, pair in peaks.items()},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cores": multiprocessing.cpu_count(),
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def run(function: Any, *arguments: Any) -> Any:
    """Calls a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(function, arguments)
        pool.close()
        pool.join()
        return result


def write_digits(folder: str, images: int) -> str:
    """Digits at 32 px, each in its own colours, as a folder of parquet files with PNG images."""
    digits = load_image_dataset("digits", split="train")
    rng = np.random.default_rng(0)
    features = Features({"image": Image(), "label": digits.features["label"]})
    big = [row["image"].resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC) for row in digits]
    for shard, first in enumerate(range(0, images, 10_000)):
        rows = range(first, min(first + 10_000, images))
        pixels = (
            np.asarray(big[row % len(big)])[..., None] * rng.uniform(0.3, 1.0, 3) + rng.normal(0, 6, (SIZE, SIZE, 3))
            for row in rows
        )
        columns = {
            "image": [PIL.Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in pixels],
            "label": [digits[row % len(big)]["label"] for row in rows],
        }
        Dataset.from_dict(columns, features=features).to_parquet(f"{folder}/data/train-{shard:05d}.parquet")
    return folder


def open_dataset(settings: dict[str, Any], images: int) -> Dataset:
    """The first rows of the dataset, repeated if it has fewer, with a `ClassLabel` column."""
    disable_progress_bars()
    dataset = load_image_dataset(settings["dataset"], split=settings["split"])
    for name, feature in list(dataset.features.items()):  # parquet files that were written without our types
        if isinstance(feature, Value) and name == "label":
            count = max(dataset[name]) + 1
            dataset = dataset.cast_column(name, ClassLabel(names=[str(index) for index in range(count)]))
    dataset = concatenate_datasets([dataset] * -(-images // len(dataset))) if images > len(dataset) else dataset
    return dataset.select(range(images))


def build(settings: dict[str, Any], dataset: Dataset, architecture: str, **overrides: Any) -> DsCoPipeline:
    """A pipeline with a classifier of random weights; the generator is not used."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    label_column = find_columns(dataset)[1]
    names = class_names(dataset, label_column=label_column)
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=3,
        num_layers=1,
        sample_size=SIZE,
        patch_size=8,
        num_embeds_ada_norm=len(names),
        norm_num_groups=1,
    )
    classifier = build_evaluator(architecture, class_names=names, image_size=SIZE, **overrides).eval()
    pipe = DsCoPipeline(transformer.eval(), DDIMScheduler(), classifier=classifier, id2label=dict(enumerate(names)))
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def measure_speed(settings: dict[str, Any]) -> dict[str, Any]:
    """Images per second of the forward pass alone and of the whole pass, in turns."""
    dataset = open_dataset(settings, 16 * settings["batch_size"])
    pipe = build(settings, dataset, settings["architecture"])
    batches = iterate_pixels(dataset, image_size=SIZE, batch_size=settings["batch_size"])
    in_memory = [next(batches).pixels for _ in range(16)]
    rate = forward_rate(pipe, in_memory, seconds=min(3.0, settings["seconds"]))
    images = max(settings["batch_size"], int(rate * settings["seconds"]))
    dataset = open_dataset(settings, images)
    forward, whole = [], []
    for _ in range(settings["rounds"]):
        forward.append(forward_rate(pipe, in_memory, seconds=settings["seconds"] / 2))
        whole.append(images / make_targets(pipe, dataset, settings))
        forward.append(forward_rate(pipe, in_memory, seconds=settings["seconds"] / 2))
    return {
        "fraction": round(statistics.mean(whole) / statistics.mean(forward), 4),
        "forward_images_per_second": [round(value, 1) for value in forward],
        "pass_images_per_second": [round(value, 1) for value in whole],
        "images": images,
    }


def forward_rate(pipe: DsCoPipeline, batches: list[torch.Tensor], *, seconds: float) -> float:
    """Images per second of the classifier on tensors in memory."""
    images, begin = 0, time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - begin < seconds:
            for batch in batches:
                pipe.classifier(batch.to(pipe.classifier.device)).logits.cpu()
                images += len(batch)
    return images / (time.perf_counter() - begin)


def make_targets(pipe: DsCoPipeline, dataset: Dataset, settings: dict[str, Any]) -> float:
    """Seconds that targets take."""
    begin = time.perf_counter()
    MatchingTargets.from_dataset(
        dataset,
        pipe,
        features={},  # the pass is held against the classifier's own throughput
        second_moment=False,
        batch_size=settings["batch_size"],
        decode_threads=settings["decode_threads"],
        progress=False,
    )
    return time.perf_counter() - begin


def measure_memory(settings: dict[str, Any], images: int, streaming: bool) -> float:
    """Peak memory of this process after a pass, in MiB."""
    dataset = open_dataset(settings, images)
    pipe = build(settings, dataset, "convnet-3", width=settings["memory_width"])
    if streaming:
        features = dataset.features
        dataset = load_image_dataset(settings["dataset"], split=settings["split"], streaming=True)
        dataset = dataset.cast(features).take(images)
    make_targets(pipe, dataset, settings)
    return memory.peak_bytes() / 2**20


if __name__ == "__main__":
    main()
