"""Concentration: pipeline + targets + plan → a small `datasets.Dataset`, by blocks of images per class."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from tqdm.auto import tqdm

from .checks import check_whole
from .data import images_from_pixels
from .features import features_and_logits
from .kernels import mmd2
from .objectives import class_means
from .pipeline import DsCoPipeline, DsCoPipelineOutput
from .quantile import QuantileTargets
from .seeds import image_seed
from .targets import MatchingTargets


SOURCES = ("synthetic", "real")


def row_features(class_names: Sequence[str]) -> Features:
    """Columns of a concentrated dataset: the image, its label, and where it comes from."""
    return Features(
        {
            "image": Image(),
            "label": ClassLabel(names=list(class_names)),
            "source": ClassLabel(names=list(SOURCES)),
            "seed": Value("int64"),
            "block": Value("int32"),
            "real_index": Value("int64"),
        }
    )


@dataclasses.dataclass
class ConcentrationReport:
    """What a concentration cost and reached.

    Attributes:
        images (`int`): images drawn.
        seconds (`float`): wall time of sampling, without loading or targets.
        denoiser_calls, decoder_calls, classifier_calls (`int`): images that passed through each model.
        discrepancy (`float`, *optional*): MMD² of the finished images, mean over classes; None without targets to
            measure by.
        discrepancy_by_class (`dict[str, float]`): the same per class.
    """

    images: int = 0
    seconds: float = 0.0
    denoiser_calls: int = 0
    decoder_calls: int = 0
    classifier_calls: int = 0
    discrepancy: float | None = None
    discrepancy_by_class: dict[str, float] = dataclasses.field(default_factory=dict)


def concentrate(
    pipe: DsCoPipeline, targets: MatchingTargets | QuantileTargets | None, images_per_class: int, **options: Any
) -> Dataset:
    """Draws a small dataset whose class means match the targets: [`concentrate_and_report`] without its report."""
    return concentrate_and_report(pipe, targets, images_per_class, **options)[0]


def concentrate_and_report(
    pipe: DsCoPipeline,
    targets: MatchingTargets | QuantileTargets | None,
    images_per_class: int,
    *,
    seed: int = 0,
    class_labels: Sequence[int | str] | None = None,
    block_size: int = 10,
    images_per_call: int = 128,
    measure_by: MatchingTargets | None = None,
    progress: bool = True,
    **options: Any,
) -> tuple[Dataset, ConcentrationReport]:
    """Draws a small dataset whose class means match the targets.

    The images of a class are drawn in blocks; a block is optimised jointly, and matches what the finished blocks of
    its class leave unmatched. So the first k blocks are a good smaller set, and a set can be extended. Block and seed
    fix an image: with the same `block_size` and `images_per_call` on the same kind of device, a run gives the same
    images.

    Args:
        pipe (`DsCoPipeline`): the generator, and the classifier that the targets were made with.
        targets (`MatchingTargets`, `QuantileTargets` or None): what to match; None draws plain samples, or optimises
            `objective="classifier"`.
        images_per_class (`int`): at least 1.
        seed (`int`): with the class and the index it fixes an image's noise.
        class_labels (sequence of `int` or `str`, *optional*): without targets, the generator's classes to draw; all if
            None.
        block_size (`int`): images of a class that are optimised jointly.
        images_per_call (`int`): several small classes are drawn in one call of about this many images.
        measure_by (`MatchingTargets`, *optional*): targets to measure the discrepancy by; `targets` if None.
        progress (`bool`): show a progress bar.
        options: of [`DsCoPipeline.__call__`], such as `guidance_scale`, `num_inference_steps`, `objective`.

    Returns:
        `tuple[Dataset, ConcentrationReport]`: rows by class and index; columns `image`, `label`, `source`, `seed`,
            `block`, `real_index` (-1).

    Raises:
        ValueError: for a number of images below 1, or anything that the pipeline refuses.
    """
    for name, value in (
        ("images_per_class", images_per_class), ("block_size", block_size), ("images_per_call", images_per_call)
    ):  # fmt: skip
        check_whole(name, value, 1)
    labels, names = _classes(pipe, targets, class_labels)
    judge = measure_by or (targets if isinstance(targets, MatchingTargets) else None)
    matched = targets if isinstance(targets, MatchingTargets) and options.get("objective", "rkhs") == "rkhs" else None
    finished: list[dict[str, Any]] = []
    report = ConcentrationReport()
    previous = PreviousBlocks(matched) if matched is not None and images_per_class > block_size else None
    start = time.perf_counter()
    with tqdm(total=images_per_class * len(labels), desc="Concentrating", unit="img", disable=not progress) as bar:
        for block, first in enumerate(range(0, images_per_class, block_size)):
            indices = range(first, min(first + block_size, images_per_class))
            group = max(1, images_per_call // len(indices))
            for rows in torch.arange(len(labels)).split(group):
                batch = [(row, index) for row in rows.tolist() for index in indices]
                seeds = [image_seed(seed, labels[row], index) for row, index in batch]
                if previous is not None:
                    options["previous"] = previous.statistics
                output = pipe.sample([labels[row] for row, _ in batch], targets, seeds=seeds, **options)
                images = images_from_pixels(output.images * 2 - 1)
                _count(report, output)
                if previous is not None:
                    previous.add(images, [row for row, _ in batch], pipe)
                for (row, index), drawn_from, image in zip(batch, seeds, images, strict=True):
                    finished.append({"image": image, "label": row, "seed": drawn_from, "block": block, "index": index})
                bar.update(len(batch))
    report.seconds = time.perf_counter() - start
    finished.sort(key=lambda row: (row["label"], row["index"]))
    dataset = _to_dataset(finished, names)
    if judge is not None:
        pixels, rows = pixels_from_images([row["image"] for row in finished]), [row["label"] for row in finished]
        report.discrepancy_by_class = measure_discrepancy(pixels, torch.tensor(rows), pipe, judge)
        report.discrepancy = statistics.fmean(report.discrepancy_by_class.values())
    return dataset, report


class PreviousBlocks:
    """Embedding sums and counts of the images that are finished, by row of the targets."""

    def __init__(self, targets: MatchingTargets) -> None:
        self.targets = targets
        self.sums = torch.zeros_like(targets.embeddings)
        self.counts = torch.zeros(targets.num_classes, device=targets.embeddings.device)

    @property
    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums `(C, D)` and counts `(C,)`."""
        return self.sums.clone(), self.counts.clone()

    def add(self, images: Sequence[PIL.Image.Image], rows: Sequence[int], pipe: DsCoPipeline) -> None:
        """Takes finished images as they are stored, so that a run can go on from stored images."""
        psi = embed_pixels(pixels_from_images(images), pipe, self.targets)
        index = torch.tensor(rows, device=psi.device)
        self.sums.index_add_(0, index, psi)
        self.counts.index_add_(0, index, torch.ones_like(index, dtype=self.counts.dtype))


@torch.no_grad()
def embed_pixels(pixels: torch.Tensor, pipe: DsCoPipeline, targets: MatchingTargets) -> torch.Tensor:
    """ψ(φ(x)) `(B, D)` of pixels `(B, C, H, W)` in [-1, 1], on the device of the targets."""
    device = targets.embeddings.device
    return torch.cat(
        [
            targets.embed(features_and_logits(pipe.classifier, part.to(pipe.classifier.device))[0].to(device))
            for part in pixels.split(256)
        ]
    )


def measure_discrepancy(
    pixels: torch.Tensor, rows: torch.Tensor, pipe: DsCoPipeline, targets: MatchingTargets
) -> dict[str, float]:
    """MMD² of a set of images from the targets, per class name. Lower is better.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, range [-1, 1]): the images.
        rows (`torch.Tensor` of shape `(N,)`): their row of the targets; every class that occurs is measured.
        pipe (`DsCoPipeline`): has the classifier that the targets were made with.
        targets (`MatchingTargets`): the class means.
    """
    targets.check_classifier(pipe.classifier)
    psi = embed_pixels(pixels, pipe, targets)
    present, index = rows.to(psi.device).unique(return_inverse=True)
    values = mmd2(class_means(psi, index, len(present)), targets.embeddings[present])
    return {targets.class_names[row]: value for row, value in zip(present.tolist(), values.tolist(), strict=True)}


def pixels_from_images(images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """Equally large gray or RGB images as pixels `(B, C, H, W)` in [-1, 1]; the inverse of `images_from_pixels`."""
    arrays = np.stack([np.asarray(image) for image in images])
    arrays = arrays[..., None] if arrays.ndim == 3 else arrays
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def _classes(
    pipe: DsCoPipeline,
    targets: MatchingTargets | QuantileTargets | None,
    class_labels: Sequence[int | str] | None,
) -> tuple[list[int], list[str]]:
    """The generator's classes to draw, and their names in the dataset."""
    if targets is None:
        labels = pipe.get_label_ids(range(pipe.num_classes) if class_labels is None else class_labels)
        return labels, [pipe.id2label.get(label, str(label)) for label in labels]
    if class_labels is not None:
        raise ValueError("The targets name the classes: leave `class_labels` out, or make targets of those classes.")
    labels = list(targets.class_labels)
    if shared := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"Several classes would be drawn from the same class(es) {shared[:10]} of the generator, with the same "
            "noise and target: give each dataset class a generator class of its own (`mapping=`), or merge them first."
        )
    return labels, list(targets.class_names)


def _count(report: ConcentrationReport, output: DsCoPipelineOutput) -> None:
    report.images += len(output.class_labels)
    report.denoiser_calls += output.denoiser_calls
    report.decoder_calls += output.decoder_calls
    report.classifier_calls += output.classifier_calls


def _to_dataset(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in ("image", "label", "seed", "block")}
    columns |= {"source": [SOURCES.index("synthetic")] * len(rows), "real_index": [-1] * len(rows)}
    features = row_features(names)
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)
