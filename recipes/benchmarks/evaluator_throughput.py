"""Training images per second: this package's loop against a conventional one; same files, network and batch size.

    python recipes/benchmarks/evaluator_throughput.py --out throughput.json
    python recipes/benchmarks/evaluator_throughput.py --architecture resnet-18 --seconds 30

The conventional loop is what evaluation scripts of the field do: a `DataLoader` decodes each image from its file in
every epoch and augments it on its own on the CPU, one network is trained at a time with all cores in float32, and
loss and accuracy are read at every step. It gets the number of workers (none, or one for each core) that suits it
best; its networks have PyTorch's own group norm, as theirs do, which is the same function. Ours decodes once, augments
batches on the device and, on CPUs, trains one seed on each core. Both train with the augmentation of `minimax-hard`.

Prints one JSON object as its last line:

- `ratio`: our speed at the setting that this package recommends for long runs (`--mixed_precision bf16 --compile`) by
  that of the conventional loop;
- `ratio_same_precision`: our speed in float32 without compiling, which is what `train_evaluator` does when told
  nothing, by the same;
- `ratio_bf16`: our recommended setting by the conventional loop with bfloat16 autocast, which the field does not use;
- `overhead_share`: the share of our time that is spent outside of forward, backward and optimiser step, at the
  recommended setting; `overhead_share_same_precision`: likewise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import disable_progress_bars
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dsco_hf.concentration.additions.doping import select
from dsco_hf.data.datasets import load_image_dataset
from dsco_hf.evaluators import Execution, build_evaluator, get_protocol, load_image_set, train_evaluator
from dsco_hf.evaluators.augmentation import IMAGENET_MEAN, IMAGENET_STD, LUMA
from dsco_hf.evaluators.configurations import InstanceNorm
from dsco_hf.evaluators.training import fast_layout, make_optimizer, part_size
from dsco_hf.utils.configs import make_accelerator


NAMES = [str(digit) for digit in range(10)]
# What is measured: ours and the conventional loop in the same precision; only ours is compiled.
SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16", "compiled": True, "setting": "ours: bf16 autocast, torch.compile; theirs: autocast"},
    "fp32": {"precision": "no", "compiled": False, "setting": "both: float32, not compiled"},
}
PCA_VALUES = torch.tensor([0.2175, 0.0188, 0.0045])
PCA_VECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures both loops in turns and reports the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="convnet-3")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--images_per_class", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=int, default=torch.multiprocessing.cpu_count())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options)
        settings = {**vars(options), "folder": folder, "out": None}
        measured = [measure_round(settings) for _ in range(options.rounds)]
    medians = {name: statistics.median(values[name] for values in measured) for name in measured[0]}
    results: dict[str, Any] = {}
    if len(options.settings) == len(SETTINGS):
        results["ratio"] = round(medians["ours_bf16"] / medians["conventional_fp32"], 2)
    if "bf16" in options.settings:
        results["ratio_bf16"] = round(medians["ours_bf16"] / medians["conventional_bf16"], 2)
        results["overhead_share"] = round(medians["overhead_bf16"], 4)
    if "fp32" in options.settings:
        results["ratio_same_precision"] = round(medians["ours_fp32"] / medians["conventional_fp32"], 2)
        results["overhead_share_same_precision"] = round(medians["overhead_fp32"], 4)
    results |= {
        "compared": {name: SETTINGS[name]["setting"] for name in options.settings},
        "images_per_second": {name: round(value, 1) for name, value in medians.items() if "overhead" not in name},
        "measured": [{name: round(value, 3) for name, value in values.items()} for values in measured],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def measure_round(settings: dict[str, Any]) -> dict[str, float]:
    """Images per second of all loops, one after the other, and our share of overhead."""
    values = {}
    for name in settings["settings"]:
        setting = SETTINGS[name]
        ours = run_processes(measure_ours, {**settings, **setting})
        values[f"ours_{name}"] = sum(speed for speed, _ in ours)
        values[f"overhead_{name}"] = statistics.mean(share for _, share in ours)
        theirs = [
            run_processes(measure_conventional, {**settings, **setting, "workers": count}, processes=1)[0][0]
            for count in (0, settings["cores"])
        ]
        values[f"conventional_{name}"] = max(theirs)
    return values


def write_images(folder: Path, options: argparse.Namespace) -> None:
    """Real digits, enlarged, as one JPEG file each: what an image folder on disk looks like."""
    digits = load_image_dataset("digits", split="train")
    for place, row in enumerate(select(digits, "random", images_per_class=options.images_per_class)):
        path = folder / NAMES[row["label"]] / f"{place:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        size = (options.image_size,) * 2
        row["image"].convert("RGB").resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


def run_processes(
    measure: Callable[[int, dict[str, Any], Any], None], settings: dict[str, Any], *, processes: int | None = None
) -> list[tuple[float, float]]:
    """Runs a measurement in fresh processes at the same time; on a GPU ours is a single one too."""
    count = processes or (1 if torch.cuda.is_available() else settings["cores"])
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(measure, args=(settings, queue), nprocs=count, join=True)
    return [queue.get() for _ in range(count)]


def protocol_for(settings: dict[str, Any]) -> Any:
    """The protocol of both loops."""
    return get_protocol("minimax-hard", image_size=settings["image_size"], batch_size=settings["batch_size"])


def make_model(settings: dict[str, Any]) -> torch.nn.Module:
    """The network of both loops."""
    return build_evaluator(
        settings["architecture"],
        class_names=NAMES,
        image_size=settings["image_size"],
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


def conventional(model: torch.nn.Module) -> torch.nn.Module:
    """The network with `nn.GroupNorm` in place of our instance norm: weights and outputs stay the same."""
    for module in model.modules():
        if isinstance(module, InstanceNorm):
            module.__class__ = torch.nn.GroupNorm
    return model


def measure_ours(seed: int, settings: dict[str, Any], queue: Any) -> None:
    """Speed of `train_evaluator`, and the share of its time that is no forward, backward or optimiser step."""
    logging.disable(logging.WARNING)
    disable_progress_bars()
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)
    accelerator = make_accelerator(settings["precision"])  # as the recipes do
    protocol = protocol_for(settings)
    begin = time.perf_counter()
    train = load_image_set(load_image_dataset(settings["folder"], split="train"), protocol=protocol)
    loading = time.perf_counter() - begin
    model = make_model(settings)
    batches = math.ceil(len(train.labels) / settings["batch_size"])

    def run(epochs: int) -> float:
        changed = dataclasses.replace(protocol, epochs=epochs)
        begin = time.perf_counter()
        train_evaluator(
            model,
            train,
            protocol=changed,
            seed=seed,
            execution=Execution(accelerator, compiled=settings["compiled"]),
        )
        synchronize()
        return (time.perf_counter() - begin) / epochs

    epoch = run(2)
    shares, speeds = [], []
    for _ in range(2):  # core and loop in turns, so that both see the same machine
        epochs = max(2, round(settings["seconds"] / 4 / epoch))
        core = time_core(model, train, settings, accelerator, epochs * batches) / epochs
        epoch = run(epochs)
        shares.append(max(0.0, 1 - core / epoch))
        speeds.append(epoch)
    # An evaluation at this size has thousands of epochs: loading counts as over 1,000 of them.
    epoch = statistics.mean(speeds) + loading / 1000
    queue.put((len(train.labels) / epoch, statistics.mean(shares)))


def time_core(
    model: torch.nn.Module, train: Any, settings: dict[str, Any], accelerator: Accelerator, steps: int
) -> float:
    """Time of forward, backward and optimiser alone: what `train_evaluator` does, on batches that are ready."""
    layout = fast_layout(model, accelerator.device)
    model.to(accelerator.device, memory_format=layout).train()
    whole = accelerator.device.type != "cpu" or settings["architecture"].startswith("resnet-18")
    part = settings["batch_size"] if whole else part_size(settings["image_size"], settings["precision"])
    optimizer = make_optimizer(model, protocol_for(settings))
    network = torch.compile(model, dynamic=False) if settings["compiled"] else model
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((train.pixels / 2 + 0.5 - mean) / std).to(accelerator.device, memory_format=layout)
    labels = train.labels.to(accelerator.device)
    sizes = [len(b) for b in torch.arange(len(labels)).split(settings["batch_size"])]
    begin = 0.0
    for step in range(-len(sizes), steps):
        if step == 0:  # the network is compiled
            synchronize()
            begin = time.perf_counter()
        size = sizes[step % len(sizes)]
        for first in range(0, size, part):
            rows = slice(first, min(first + part, size))
            with accelerator.autocast():
                logits = network(pixels[rows]).logits.float()
            loss = 0.5 * F.cross_entropy(logits, labels[rows]) + 0.5 * F.cross_entropy(logits, labels[rows].flip(0))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class ImageFiles(Dataset):
    """Decodes and augments one image at a time, on the CPU."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(Path(folder).glob("*/*.jpg"))
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One augmented image `(3, H, W)` and its label."""
        path = self.paths[index]
        with Image.open(path) as file:
            array = np.asarray(file.convert("RGB"))
        x = torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous().float() / 255
        x = random_resized_crop(x)
        if torch.rand(()) < 0.5:
            x = x.flip(2)
        x = color_jitter(x)
        noise = torch.randn(3) * 0.1
        x = x + (PCA_VECTORS @ (noise * PCA_VALUES)).view(3, 1, 1)
        return (x - self.mean) / self.std, int(path.parent.name)


def random_resized_crop(x: torch.Tensor) -> torch.Tensor:
    """A crop of half of the area or more, at the size of `x` `(3, H, W)`."""
    size = x.shape[-1]
    for _ in range(10):
        area = size * size * float(torch.empty(()).uniform_(0.5, 1.0))
        ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            top, left = (int(torch.randint(0, size - n + 1, ())) for n in (height, width))
            crop = x[None, :, top : top + height, left : left + width]
            return F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True)[0]
    return x


def color_jitter(x: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation by factors in [0.6, 1.4], in random order."""
    luma = torch.tensor(LUMA).view(3, 1, 1)
    for step in torch.randperm(3).tolist():
        grey = (x * luma).sum(0, keepdim=True)
        other = (torch.zeros_like(x), grey.mean().expand_as(x), grey.expand_as(x))[step]
        x = x.lerp(other, float(torch.empty(()).uniform_(-0.4, 0.4)))
    return x


def cutmix(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """CutMix of a batch, in place."""
    size = x.shape[-1]
    partner = torch.randperm(len(x))
    side = int(size * math.sqrt(float(torch.rand(()))))
    row, column = torch.randint(size, (2,)).tolist()
    top, bottom = max(0, row - side // 2), min(size, row + side // 2)
    left, right = max(0, column - side // 2), min(size, column + side // 2)
    x[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    return x, partner, 1 - (bottom - top) * (right - left) / size**2


def measure_conventional(_: int, settings: dict[str, Any], queue: Any) -> None:
    """Speed of the conventional loop, with all cores for one network."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(settings["cores"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = ImageFiles(settings["folder"])
    loader = DataLoader(
        files,
        batch_size=settings["batch_size"],
        shuffle=True,
        num_workers=settings["workers"],
        persistent_workers=settings["workers"] > 0,
    )
    model = conventional(make_model(settings)).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    half = settings["precision"] == "bf16"
    images, begin = 0, 0.0
    for epoch, batches in enumerate(epochs_of(loader)):
        if epoch == 1:  # workers have started, memory is allocated
            begin = time.perf_counter()
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            x, partner, weight = cutmix(x)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = model(x).logits.float()
            loss = weight * F.cross_entropy(logits, y)
            loss = loss + (1 - weight) * F.cross_entropy(logits, y[partner.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item(), (logits.argmax(1) == y).float().mean().item()
            images += len(y) if epoch else 0
        if epoch and time.perf_counter() - begin > settings["seconds"]:
            break
    queue.put((images / (time.perf_counter() - begin), 0.0))


def epochs_of(loader: DataLoader) -> Iterator[DataLoader]:
    """The loader again and again."""
    while True:
        yield loader


if __name__ == "__main__":
    main()
