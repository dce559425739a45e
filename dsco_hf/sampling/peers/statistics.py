"""What peers know of the real images of each class: a few tensors a class, made in one pass, kept in two files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from sklearn.cluster import KMeans

from ...data.datasets import class_names, dataset_fingerprint, iterate_pixels, present_classes
from ...data.labels import Mapped, class_mapping, label_set_classes, label_set_named
from ...data.pixels import PixelBatch
from ...data.schema import image_seed
from ...matching.files import SAVE_AGAIN, find_targets, read_config, read_tensors, write_targets
from ...matching.objectives import check_kind
from ...matching.population import mix_keys, refuse_empty_classes, rows_of_labels
from ...matching.targets import source_of
from ...utils.files import DamagedFileError
from ...utils.values import check_whole, plain_arguments
from ..call import Call, Population, Sampling


MOST_IMAGES = 1000  # of a class, that are kept in memory
_FIELDS = ("kind", "class_names", "class_labels", "provenance")


@dataclasses.dataclass
class ClassStatistics:
    """Tensors that describe the real images of each class.

    Attributes:
        kind (`str`): what they are, such as "centroids"; "names" if there are none.
        class_names (`list[str]`), class_labels (`list[int]`): as in [`MatchingTargets`].
        tensors (`dict[str, torch.Tensor]`): each `(C, ...)`, by name.
        shared (`dict[str, torch.Tensor]`, *optional*): what is of no class, such as a network's weights, by name.
        provenance (`dict`): how they were made; `images` is the number of images that were read, `passes` of those
            that passed through each network.
    """

    kind: str
    class_names: list[str]
    class_labels: list[int]
    tensors: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    shared: dict[str, torch.Tensor] | None = None

    def rows_of(self, generator_labels: Sequence[int]) -> torch.Tensor:
        """Row `(n,)` for each of the generator's classes, see [`MatchingTargets.rows_of`]."""
        return rows_of_labels(self.class_labels, generator_labels)

    def of_call(self, call: Call, name: str) -> torch.Tensor:
        """One of the tensors `(B, ...)` for each image of a call, where its latents are."""
        return self.tensors[name][self.rows_of(call.ids)].to(call.labels.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `targets.safetensors` and `targets.json` into a folder, which is made if it is not there."""
        fields = {name: getattr(self, name) for name in _FIELDS} | {"tensors": sorted(self.tensors)}
        fields |= {} if self.shared is None else {"shared": sorted(self.shared)}
        write_targets(Path(folder), fields, {**self.tensors, **(self.shared or {})})

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> ClassStatistics:
        """Loads what `save_pretrained` wrote, from a folder or a model repository on the Hub.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file is damaged, or the two do not belong together.
        """
        config, weights = find_targets(
            name_or_path, revision=revision, subfolder=subfolder, token=token, cache_dir=cache_dir
        )
        fields = read_config(config, (*_FIELDS, "tensors")) | read_config(config, ("shared",), optional=True)
        names, shared = fields.pop("tensors"), fields.pop("shared", None)
        stored = read_tensors(weights, [*names, *(shared or [])])
        tensors, classes = {name: stored[name] for name in names}, len(fields["class_names"])
        if wrong := [name for name, tensor in tensors.items() if tensor.shape[:1] != (classes,)]:
            raise DamagedFileError(f"{weights}: {wrong} are not of {classes} classes. {SAVE_AGAIN}")
        return cls(
            tensors=tensors, shared=None if shared is None else {name: stored[name] for name in shared}, **fields
        )


class Sample:
    """Of each class the images whose keys, mixed with a seed, are smallest: the same whatever the batches.

    Args:
        classes (`int`): C.
        most (`int`): images of a class.
        seed (`int`): of the choice.
    """

    def __init__(self, classes: int, most: int, seed: int) -> None:
        self.most, self.seed = most, seed
        self._keys = [torch.empty(0, dtype=torch.int64) for _ in range(classes)]
        self._values: list[torch.Tensor | None] = [None] * classes

    def may_stay(self, labels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which images of a batch, labels and keys `(B,)`, could be among them: a mask `(B,)`."""
        full = [int(own[-1]) if len(own) == self.most else 2**63 - 1 for own in self._keys]
        return mix_keys(keys, self.seed) < torch.tensor(full)[labels]

    def add(self, values: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> None:
        """Considers images: values `(B, ...)`, labels and keys `(B,)`."""
        mixed = mix_keys(keys, self.seed)
        for row in labels.unique().tolist():
            mine, before = labels == row, self._values[row]
            found = torch.cat([self._keys[row], mixed[mine]])
            together = values[mine] if before is None else torch.cat([before, values[mine]])
            order = found.argsort(stable=True)[: self.most]
            self._keys[row], self._values[row] = found[order], together[order]

    @property
    def values(self) -> list[torch.Tensor]:
        """Those of each class `(n_c, ...)`; none of a class without an image."""
        return [torch.empty(0) if one is None else one for one in self._values]


@plain_arguments(batch_size=1)
def stream_classes(
    dataset: Dataset | IterableDataset,
    pipe: DiffusionPipeline,
    *,
    mapping: Mapped = None,
    image_column: str | None = None,
    label_column: str | None = None,
    on_error: str = "raise",
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
    **_: object,
) -> tuple[ClassStatistics, Iterator[PixelBatch]]:
    """One pass over a dataset: where its images are from, and the images as they come.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split.
        pipe (`DsCoPipeline`): gives image size and the generator's classes.
        mapping (*optional*): see [`MatchingTargets.from_dataset`], like the next three.
        image_column (`str`, *optional*): likewise.
        label_column (`str`, *optional*): likewise.
        on_error (`str`): likewise.
        batch_size (`int`): images per batch.
        seed (`int`): noted.
        progress (`bool`): show a progress bar.

    Returns:
        `tuple`: statistics without tensors, and batches with labels by their classes.

    Raises:
        ValueError: as [`MatchingTargets.from_dataset`] does.
    """
    names = present_classes(dataset, label_column=label_column)
    known = class_names(dataset, label_column=label_column)
    labels = class_mapping(known, pipe.id2label, pipe.num_classes, mapping=mapping, present=names)
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    mapped = isinstance(dataset, Dataset)
    provenance = {
        "population": "data",
        "dataset": source_of(dataset),
        "fingerprint": dataset_fingerprint(dataset, **columns) if mapped else None,
        "seed": seed,
    }
    batches = iterate_pixels(
        dataset, image_size=pipe.image_size, num_channels=pipe.num_channels, classes=names, on_error=on_error,
        batch_size=batch_size, progress=progress, **columns,
    )  # fmt: skip
    return ClassStatistics("names", names, labels, provenance=provenance), batches


@plain_arguments(most=1)
@torch.no_grad()
def sample_classes(
    dataset: Dataset | IterableDataset,
    pipe: DiffusionPipeline,
    *,
    most: int = MOST_IMAGES,
    seed: int = 0,
    **options: Any,
) -> tuple[ClassStatistics, list[torch.Tensor]]:
    """Reads a dataset once, and keeps the latents of up to `most` images of each class: 4 bytes for each value.

    Latents are the mode of the VAE's posterior, or the pixels where there is no VAE.

    Args:
        dataset (`Dataset` or `IterableDataset`): one split.
        pipe (`DsCoPipeline`): encodes.
        most (`int`): images of a class; of more, a part that depends on `seed` alone.
        seed (`int`): of the choice.
        options: of [`stream_classes`].

    Returns:
        `tuple`: statistics without tensors, which say where the images are from, and of each class `(n_c, C, h, w)`.

    Raises:
        ValueError: as [`stream_classes`] does, and for a class without an image among others.
    """
    found, batches = stream_classes(dataset, pipe, seed=seed, **options)
    sample, images, encoded = Sample(len(found.class_names), most, seed), 0, 0
    for batch in batches:
        images += len(batch.labels)
        stays = sample.may_stay(batch.labels, batch.keys)
        if stays.any():
            latents = pipe.encode_pixels(batch.pixels[stays], sample_posterior=False).cpu()
            encoded += len(latents) * (pipe.vae is not None)
            sample.add(latents.float(), batch.labels[stays], batch.keys[stays])
    refuse_empty_classes([len(one) for one in sample.values], found.class_names)
    found.provenance |= {"images": images, "passes": {"encoder": encoded}}
    return found, sample.values


def stand_in(pipe: DiffusionPipeline, kind: str, tensors: Mapping[str, torch.Tensor]) -> ClassStatistics:
    """Statistics of all classes of a pipeline with these tensors, each `(C, ...)`."""
    classes = range(pipe.num_classes)
    names = [pipe.id2label.get(index, str(index)) for index in classes]
    return ClassStatistics(kind, names, list(classes), dict(tensors))


def names_only(
    pipe: DiffusionPipeline, given: Population, *, label_column: str | None = None, mapping: Mapped = None, **_: object
) -> ClassStatistics:
    """The classes of what is given and nothing else: no image of a dataset is read.

    Args:
        pipe (`DsCoPipeline`): gives the generator's classes.
        given: a dataset, a label set's name or a list of the generator's classes.
        label_column (`str`, *optional*): of a dataset, see [`MatchingTargets.from_dataset`].
        mapping (*optional*): likewise.
    """
    if isinstance(given, Dataset | IterableDataset):
        names = present_classes(given, label_column=label_column)
        known = class_names(given, label_column=label_column)
        labels = class_mapping(known, pipe.id2label, pipe.num_classes, mapping=mapping, present=names)
    elif preset := label_set_named(given):
        names, labels = label_set_classes(preset, pipe.id2label, pipe.num_classes)
    else:
        labels = pipe.get_label_ids(given)
        names = [pipe.id2label.get(label, str(label)) for label in labels]
    return ClassStatistics("names", names, labels, provenance={"population": "none", "images": 0})


def check_statistics(method: str, kind: str, targets: object, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Raises ValueError for anything but the statistics that a method takes.

    Args:
        method (`str`): its name.
        kind (`str`): of the statistics.
        targets: what it was given.
        shapes: of the tensors of one class, by name; None stands for any size.
    """
    if targets is None:
        raise ValueError(
            f"method={method!r} takes real images: pass a dataset, `concentrate(pipe, dataset, ...)`. Data-free there "
            "are 'nopt', 'uag', 'best-of-n' and 'plain'."
        )
    known = check_kind(f"method={method!r}", ClassStatistics, targets)
    if known.kind != kind:
        raise ValueError(
            f"method={method!r} takes {kind} of real images, and these targets are {known.kind}: pass the dataset, "
            "and they are made."
        )
    for name, shape in shapes.items():
        found = tuple(known.tensors[name].shape[1:])
        if len(found) != len(shape) or any(want not in (None, got) for want, got in zip(shape, found, strict=True)):
            raise ValueError(
                f"The {name} of these targets have shape {found} a class, and the generator needs "
                f"{tuple('any' if size is None else size for size in shape)}: make them with this pipeline."
            )


def refuse_without_images(method: str, given: object) -> None:
    """Raises ValueError for classes without images, which is how a data-free run names them."""
    if not isinstance(given, Dataset | IterableDataset):
        raise ValueError(
            f"method={method!r} reads real images, and {given!r} names classes only: pass a dataset, or a method that "
            "is data-free, such as 'nopt' or 'uag'."
        )


class NeedsNames:
    """What data-free methods share: classes are all that their targets say."""

    targets_class: ClassVar[type | None] = ClassStatistics
    statistics: ClassVar[str] = "names"
    takes_targets: ClassVar[bool] = False

    def make_targets(
        self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, **options: Any
    ) -> ClassStatistics:
        """The classes alone, see [`names_only`]."""
        return names_only(pipe, given, **options)


class FromCentroids:
    """What methods share that take k-means centroids of a class's latents; their field `clusters` says how many.

    With `clusters=None` there are as many as images of the class will be drawn, as published. Image i takes centroid
    i, counted from the largest cell, and begins anew after the last.
    """

    targets_class: ClassVar[type | None] = ClassStatistics
    statistics: ClassVar[str] = "centroids"
    name: ClassVar[str]
    clusters: int | None

    @property
    def by_budget(self) -> bool:
        """Unless their number is fixed."""
        return self.clusters is None

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError for anything but centroids of the generator's size."""
        check_statistics(self.name, "centroids", targets, {"centroids": (None, *pipe.latent_shape), "shares": (None,)})

    def stand_in_targets(self, pipe: DiffusionPipeline) -> ClassStatistics:
        """Two zeros a class."""
        centres = torch.zeros(pipe.num_classes, 2, *pipe.latent_shape)
        return stand_in(pipe, "centroids", {"centroids": centres, "shares": torch.full(centres.shape[:2], 0.5)})

    def make_targets(
        self,
        pipe: DiffusionPipeline,
        given: Population,
        sampling: Sampling,
        *,
        images_per_class: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> ClassStatistics:
        """Centroids of the latents of real images; arguments as of [`SamplingMethod.make_targets`].

        Raises:
            ValueError: for classes without images, no number of centroids, or a class of fewer images.
        """
        refuse_without_images(self.name, given)
        clusters = self.clusters or images_per_class
        if clusters is None:
            raise ValueError(
                f"How many centroids? Pass `images_per_class=`, or set it: `{type(self).__name__}(clusters=10)`."
            )
        statistics, latents = sample_classes(given, pipe, seed=seed, **options)
        statistics.kind = "centroids"
        statistics.tensors = centroids(latents, statistics.class_names, clusters, seed)
        return statistics


def centroids(
    latents: Sequence[torch.Tensor], names: Sequence[str], clusters: int, seed: int
) -> dict[str, torch.Tensor]:
    """Centroids of each class `(C, K, ...)` by k-means (Lloyd, k-means++), and the share of its images in each cell.

    The largest cells come first: fewer images than centroids then stand for most of the class.

    Args:
        latents (sequence of `torch.Tensor` of shape `(n_c, ...)`): of each class.
        names (sequence of `str`): of the classes.
        clusters (`int`): K.
        seed (`int`): of the first centroids.

    Returns:
        `dict`: `centroids` `(C, K, ...)` and `shares` `(C, K)`, whose rows sum to 1.

    Raises:
        ValueError: for a class of fewer images than centroids.
    """
    check_whole("clusters", clusters, 1)
    few = [f"{name!r} has {len(one)}" for name, one in zip(names, latents, strict=True) if len(one) < clusters]
    if few:
        raise ValueError(
            f"{clusters} centroids need as many images of every class, but {', '.join(few[:10])}: ask for fewer "
            "images per class, or set `clusters=`."
        )
    found = []
    for row, one in enumerate(latents):
        flat = one.flatten(1).double().numpy()
        means = KMeans(clusters, n_init=1, random_state=image_seed(seed, row, 0, "centroids") % 2**32).fit(flat)
        shares = torch.bincount(torch.from_numpy(means.labels_).long(), minlength=clusters) / len(one)
        order = shares.argsort(descending=True, stable=True)
        centres = torch.from_numpy(means.cluster_centers_)[order].float()
        found.append((centres.view(clusters, *one.shape[1:]), shares[order]))
    return {"centroids": torch.stack([one for one, _ in found]), "shares": torch.stack([one for _, one in found])}


def own_of_slots(call: Call, name: str) -> torch.Tensor:
    """For each image of a call the entry of a tensor `(C, K, ...)` that its place in the class says, `(B, ...)`."""
    values = call.targets.of_call(call, name)
    places = torch.tensor([index % values.shape[1] for index in call.indices], device=values.device)
    return values[torch.arange(len(values), device=values.device), places]
