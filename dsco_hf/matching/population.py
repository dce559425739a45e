"""A population of images as a classifier sees it: features on disk, moments and embeddings in constant memory.

Several processes may take part, each with its share of the images. Work is divided into units, which do not depend on
the number of processes and are stored one by one, so that a killed pass continues.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import PreTrainedModel

from ..data.labels import class_mapping
from ..data.pixels import PixelBatch, iterate_pixels
from ..utils.processes import Team
from ..utils.values import LARGEST_SET, check_choice, check_whole
from .feature_spec import layer_weights
from .files import FeatureFolder, TemporaryFeatures
from .kernels import draw_frequencies, fourier_embedding, median_bandwidth, single_precision


BANDWIDTH_IMAGES = 2000  # the median of all pairwise distances of so many
LEAST_SHARE = 0.01  # probability of a class below which a sample does not count for it
_UNIT_IMAGES = 512  # as many wait in memory before they are stored
_PART_IMAGES = 256  # converted to float64 or embedded at a time: few enough for a CPU's cache


class Moments(NamedTuple):
    """Sum of weights W, weighted mean `(d,)` and weighted squared deviations from it `(d,)`, in float64."""

    total: float
    mean: torch.Tensor
    squares: torch.Tensor


def moments_of(features: torch.Tensor, weights: torch.Tensor) -> Moments | None:
    """Moments of features `(B, d)` with weights `(B,)`; None if there is no weight."""
    x, w = features.double(), weights.double()
    total = w.sum().item()
    if total == 0:
        return None
    mean = w @ x / total
    return Moments(total, mean, w @ (x - mean).square_())


def merge_moments(a: Moments | None, b: Moments | None) -> Moments | None:
    """Moments of both together, without loss of digits (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    if a is None or b is None:
        return a or b
    delta, total = b.mean - a.mean, a.total + b.total
    mean = a.mean + delta * (b.total / total)
    return Moments(total, mean, a.squares + b.squares + delta.square() * (a.total * b.total / total))


class Population:
    """Features of a population, which wait on disk until their mean, spread and bandwidth are known.

    Mean and spread are found in one stable pass: moments of batches in float64, merged within a process and then over
    processes. The embeddings are a second pass over the stored features, whose sums are float64 too. So the number of
    processes only changes the order of float64 sums: results agree to about 1e-7, the precision of float32.

    The bandwidth comes from the `BANDWIDTH_IMAGES` images whose keys, mixed with the seed, are smallest: the same
    images for any number of processes and any order.

    Args:
        names (sequence of `str`): the classes.
        seed (`int`): of the random Fourier features and of the sample behind the bandwidth.
        accelerator (`Accelerator` or `PartialState`, *optional*): the processes that share the work; all of them must
            make the same calls. One alone if None.
        work_dir (`str` or `Path`, *optional*): a folder for the features, 4·d bytes an image, which a later pass
            continues; a temporary file without a name if None.
        identity (`dict`, *optional*): what fixes the features, for `work_dir`; JSON values.
        device (`str` or `torch.device`): where embeddings are computed.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        seed: int = 0,
        accelerator: Accelerator | PartialState | None = None,
        work_dir: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.names, self.seed, self.device = list(names), seed, device
        self.team = Team(accelerator)
        self._mine: list[str] = []  # units of this process
        self._unit: tuple[str, dict[str, list[torch.Tensor]]] | None = None  # that is being filled
        self._added = self._images = 0
        self._weight = torch.zeros(len(names), dtype=torch.float64)
        self._moments: Moments | None = None
        self._sample = _Sample(seed)
        self._work_dir, self._identity = work_dir, dict(identity or {})
        self._store: FeatureFolder | TemporaryFeatures

    def __enter__(self) -> Population:
        self.team.__enter__()
        if self._work_dir is None:
            self._store = TemporaryFeatures()
        else:
            self._store = FeatureFolder(self._work_dir, self._identity, self.team)
        return self

    def __exit__(self, *error: object) -> None:
        self._store.close()
        self.team.__exit__(*error)

    @property
    def images(self) -> int:
        """Images in this process's finished units so far."""
        return self._images

    @property
    def finished(self) -> tuple[str, ...]:
        """Units that an earlier pass has finished; the same on all processes."""
        return self._store.names

    def resume(self, units: Iterable[str]) -> None:
        """Takes over those of the finished units; the others are removed. Each process takes its share."""
        units = set(units)
        share = self.finished[self.team.rank :: self.team.world]
        self._store.remove([name for name in share if name not in units])
        for name in share:
            if name in units:
                self._take(name, self._store.read(name))

    def share(self, units: Sequence[str]) -> list[str]:
        """The units among these that this process has to make: its part of those that are not finished."""
        finished = set(self.finished)
        pending = [name for name in units if name not in finished]
        start, stop = (len(pending) * (self.team.rank + i) // self.team.world for i in (0, 1))
        return pending[start:stop]

    def add(
        self,
        features: torch.Tensor,
        rows: torch.Tensor,
        weights: torch.Tensor | None = None,
        *,
        keys: torch.Tensor | None = None,
        unit: str | None = None,
    ) -> None:
        """Takes a batch.

        Args:
            features (`torch.Tensor` of shape `(B, d)`): of the images.
            rows (`torch.Tensor` of shape `(B,)`): their classes.
            weights (`torch.Tensor` of shape `(B,)`, *optional*): their weights; 1 if None.
            keys (`torch.Tensor` of shape `(B,)`, int64, *optional*): what an image is sampled by, at least 0; its
                number if None.
            unit (`str`, *optional*): to which they belong; a unit is stored when the next one begins.
        """
        first, self._added = self._added, self._added + len(rows)
        batch = {
            "features": features.detach().float().cpu(),
            "rows": rows.cpu(),
            "weights": torch.ones(len(rows)) if weights is None else weights.float().cpu(),
            "keys": torch.arange(first, first + len(rows)) if keys is None else keys.cpu(),
        }
        unit = f"{first // _UNIT_IMAGES:08d}" if unit is None else unit
        if self._unit is None or self._unit[0] != unit:
            self._finish_unit()
            self._unit = (unit, {name: [] for name in batch})
        for name, tensor in batch.items():
            self._unit[1][name].append(tensor)

    def _finish_unit(self) -> None:
        if self._unit is None:
            return
        name, parts = self._unit
        self._unit = None
        tensors = {key: torch.cat(values) for key, values in parts.items()}
        self._store.write(name, tensors)
        self._take(name, tensors)

    def _take(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Counts a stored unit in."""
        features, weights = tensors["features"], tensors["weights"]
        self._mine.append(name)
        self._images += len(features)
        self._weight.index_add_(0, tensors["rows"], weights.double())
        for part in torch.arange(len(features)).split(_PART_IMAGES):
            self._moments = merge_moments(self._moments, moments_of(features[part], weights[part]))
        self._sample.offer(features[weights > 0], tensors["keys"][weights > 0])

    def embed(
        self,
        *,
        embedding_dim: int,
        bandwidth: float | None,
        layer_sizes: Sequence[int] = (),
        second_moment: bool = False,
    ) -> dict[str, Any]:
        """Standardises, chooses the bandwidth, embeds, and averages per class; the same on all processes.

        Features of several layers, of the given sizes, are weighted so that each layer counts alike.

        Returns:
            `dict`: `embeddings`, `counts`, `feature_mean`, `feature_std`, `frequencies`, `bandwidth` and
            `second_moment` (None unless asked for), as in `MatchingTargets`, and `images`, the number
            of images.
        """
        self._finish_unit()
        weight = self.team.sum(self._weight)
        refuse_empty_classes(weight.tolist(), self.names)
        moments = functools.reduce(merge_moments, self.team.gather(self._moments))
        assert moments is not None
        mean = single_precision(moments.mean)
        std = single_precision((moments.squares / moments.total).sqrt())
        std = torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))  # constant dimensions
        if len(layer_sizes) > 1:
            std = std / layer_weights(layer_sizes)
        if bandwidth is None:
            sample = self._sample.over(self.team)
            bandwidth = self.team.from_main(lambda: median_bandwidth((sample - mean) / std), "choosing the bandwidth")
        frequencies = draw_frequencies(
            len(mean), embedding_dim, bandwidth, generator=torch.Generator().manual_seed(self.seed)
        )
        # of a class, whatever its size, the images weigh 1 / C together
        sums, moment = self._embedding_sums(mean, std, frequencies, 1 / (weight * len(weight)), second_moment)
        return {
            "embeddings": single_precision(self.team.sum(sums) / weight[:, None]),
            "second_moment": None if moment is None else single_precision(self.team.sum(moment)),
            "counts": weight.float(),
            "feature_mean": mean,
            "feature_std": std,
            "frequencies": frequencies,
            "bandwidth": float(bandwidth),
            "images": sum(self.team.gather(self._images)),
        }

    def _embedding_sums(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        frequencies: torch.Tensor,
        class_scales: torch.Tensor,
        second_moment: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weighted sums over the images of this process, in float64: of ψ per class, and of ψψᵀ if wanted.

        `(C, D)` and `(D, D)`; the latter with the scale of each image's class, `class_scales` `(C,)`.
        """
        dim = 2 * frequencies.shape[1]
        sums = torch.zeros(len(self.names), dim, dtype=torch.float64, device=self.device)
        moment = torch.zeros(dim, dim, dtype=torch.float64, device=self.device) if second_moment else None
        mean, std, frequencies, scales = (x.to(self.device) for x in (mean, std, frequencies, class_scales))
        for name in self._mine:
            unit = self._store.read(name)
            for part in torch.arange(len(unit["rows"])).split(_PART_IMAGES):
                features, rows, weights = (unit[key][part].to(self.device) for key in ("features", "rows", "weights"))
                psi = fourier_embedding((features - mean) / std, frequencies)
                sums.index_add_(0, rows, psi.double() * weights[:, None].double())
                if moment is not None:
                    scaled = psi * (weights * scales[rows].float()).sqrt()[:, None]
                    moment += scaled.T @ scaled
        return sums, moment


class _Sample:
    """The features of the images whose keys, mixed with a seed, are smallest."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys: torch.Tensor | None = None
        self.features: torch.Tensor | None = None

    def offer(self, features: torch.Tensor, keys: torch.Tensor) -> None:
        """Considers images, features `(B, d)` and keys `(B,)`."""
        keys = mix_keys(keys, self.seed)
        if self.keys is not None and self.features is not None:
            if len(self.keys) == BANDWIDTH_IMAGES:  # most batches change little
                better = keys < self.keys[-1]
                keys, features = keys[better], features[better]
            keys, features = torch.cat([self.keys, keys]), torch.cat([self.features, features])
        order = keys.argsort(stable=True)[:BANDWIDTH_IMAGES]
        self.keys, self.features = keys[order], features[order]

    def over(self, team: Team) -> torch.Tensor:
        """The sample over all processes, `(n, d)`."""
        keys = [part for part in team.gather(self.keys) if part is not None]
        limit = torch.cat(keys).sort().values[:BANDWIDTH_IMAGES][-1]
        chosen = None
        if self.keys is not None and self.features is not None:
            chosen = (self.keys[self.keys <= limit], self.features[self.keys <= limit])
        whole = _Sample(self.seed)
        parts = [part for part in team.gather(chosen) if part is not None]
        whole.keys, whole.features = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return whole.features[whole.keys.argsort(stable=True)[:BANDWIDTH_IMAGES]]


def mix_keys(keys: torch.Tensor, seed: int) -> torch.Tensor:
    """Keys `(B,)` as pseudo-random numbers in [0, 2^63) that depend on the seed (SplitMix64, Steele et al. 2014)."""
    z = keys.numpy().astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


def shared_batches(
    dataset: Dataset | IterableDataset, population: Population, *, batch_size: int, **options: Any
) -> Iterator[tuple[str, PixelBatch]]:
    """This process's share of a dataset that is not finished, in batches with the name of their unit.

    The rows of a `Dataset` are divided into units that do not depend on the number of processes. A stream is divided
    by `split_dataset_by_node`; so it has to be continued by the same number of processes.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split.
        population (`Population`): tells what is finished, and takes it over.
        batch_size (`int`): images per batch.
        options: of [`iterate_pixels`].
    """
    team = population.team
    if isinstance(dataset, Dataset):
        units = dataset_units(len(dataset), batch_size)
        population.resume(population.finished)
        rows = [units[name] for name in population.share(list(units))]
        size = len(next(iter(units.values()))) if units else 1
        for batch in iterate_pixels(
            dataset, batch_size=batch_size, rows=rows, allow_empty=len(dataset) > 0, **options
        ):
            yield f"{int(batch.indices[0]) // size:08d}", batch
        return
    size, finished, usable = batch_size * max(1, _UNIT_IMAGES // batch_size), set(population.finished), set()
    starts = []
    for rank in range(team.world):  # what was finished without a gap: a stream cannot go back
        number = 0
        while (name := f"{rank:05d}-{number:08d}") in finished:
            usable.add(name)
            number += 1
        starts.append(number * size)
    population.resume(usable)
    if team.world > 1:
        dataset = split_dataset_by_node(dataset, team.rank, team.world)
    start = starts[team.rank]
    try:
        for batch in iterate_pixels(
            dataset, batch_size=batch_size, start=start, allow_empty=team.world > 1 or start > 0, **options
        ):
            yield f"{team.rank:05d}-{int(batch.indices[0]) // size:08d}", batch
    except ValueError as error:
        if team.world > 1:
            error.add_note(f"Rows are counted within part {team.rank} of {team.world} of the stream.")
        raise


def template_units(num_classes: int, samples_per_class: int, batch_size: int) -> dict[str, tuple[int, range]]:
    """Divides template samples into units: (class row, sample indices), at most one batch of one class each."""
    check_whole("samples_per_class", samples_per_class, 1, LARGEST_SET // num_classes)
    return {
        f"{row:05d}-{first:08d}": (row, range(first, min(first + batch_size, samples_per_class)))
        for row in range(num_classes)
        for first in range(0, samples_per_class, batch_size)
    }


def dataset_units(rows: int, batch_size: int) -> dict[str, range]:
    """Divides rows into units of whole batches: about 64 of them, but of 512 rows at most (or of one batch)."""
    size = batch_size * max(1, min(rows // (64 * batch_size), _UNIT_IMAGES // batch_size))
    return {f"{first // size:08d}": range(first, min(first + size, rows)) for first in range(0, rows, size)}


class Weighting:
    """Of which classes a template sample is an image, and how much, by what the classifier says of it."""

    def __init__(
        self,
        kind: str,
        classifier: PreTrainedModel | None,
        names: Sequence[str],
        own_labels: Sequence[int] | None = None,
    ) -> None:
        check_choice("weighting", kind, ("confidence", "agreement", "posterior", "none"))
        self.kind = kind
        self.labels: list[int] = []
        if kind != "none":
            if classifier is None:
                raise ValueError(
                    f"`weighting={kind!r}` asks the pipeline's classifier, and there is none: pass `weighting='none'`."
                )
            try:
                self.labels = class_mapping(
                    names,
                    classifier.config.id2label,
                    classifier.config.num_labels,
                    own_labels=own_labels,
                    owner="classifier",
                )
            except ValueError as error:
                raise ValueError(
                    f"`weighting={kind!r}` asks the classifier for the generator's classes, but it was trained on "
                    f"others: {error} Or pass `weighting='none'`, which uses its features only."
                ) from error

    def __call__(self, logits: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Samples that count for a class, from the classifier's logits `(B, K)` of samples drawn for class `row`.

        Returns:
            `tuple`: samples, their classes and weights, each `(n,)`. "posterior" has an entry for every class that the
                classifier gives a sample a probability of 1 % or more; the others have one for every sample.
        """
        if self.kind == "posterior":
            shares = logits.softmax(dim=1)[:, self.labels]  # (B, C)
            samples, rows = (shares >= LEAST_SHARE).nonzero(as_tuple=True)
            return samples, rows, shares[samples, rows]
        everything, rows = torch.arange(len(logits)), torch.full((len(logits),), row)
        if self.kind == "none":
            return everything, rows, torch.ones(len(logits))
        if self.kind == "agreement":
            return everything, rows, (logits.argmax(dim=1) == self.labels[row]).float()
        return everything, rows, logits.softmax(dim=1)[:, self.labels[row]]


def refuse_empty_classes(weights: Iterable[float], names: Sequence[str]) -> None:
    """Raises ValueError for classes without an image or with no weight at all."""
    empty = [name for name, weight in zip(names, weights, strict=True) if not weight > 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(names)} classes have no image to learn a target from: {empty[:10]}. Give each "
            "class at least one image, or leave it out: of a dataset that is not streamed such classes are left out "
            "by themselves, of samples by `class_labels`."
        )


def rows_of_labels(class_labels: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
    """Position in `class_labels` of each of n wanted classes, `(n,)`; ValueError names those that are not there."""
    rows = {label: row for row, label in reversed(list(enumerate(class_labels)))}
    missing = sorted({int(label) for label in wanted} - set(rows))
    if missing:
        raise ValueError(
            f"There are no targets for class(es) {missing[:10]} of the generator; there are for "
            f"{sorted(rows)[:20]}{' …' if len(rows) > 20 else ''}. Make targets that include them."
        )
    return torch.tensor([rows[int(label)] for label in wanted], dtype=torch.int64)
