"""Targets of what is given in their place: a dataset, a label set or classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from diffusers import DiffusionPipeline

from ..matching.targets import MatchingTargets
from .released import QuantileTargets


Targets = MatchingTargets | QuantileTargets
"""What a set of images is held against."""

_OF_GENERATOR = ("num_inference_steps", "guidance_scale", "eta")  # samples are drawn as the set is


def check_targets(targets: Any) -> None:
    """Raises TypeError for anything but targets or None."""
    if targets is not None and not isinstance(targets, Targets):
        raise TypeError(
            f"`targets` must be targets or None, got {type(targets).__name__}. Make them of real images with "
            "`MatchingTargets.from_dataset(dataset, pipe)`, data-free with `MatchingTargets.from_generator(pipe)`."
        )


def make_targets(
    pipe: DiffusionPipeline,
    given: Targets | Dataset | IterableDataset | str | Sequence[int | str] | None,
    options: Mapping[str, Any],
    *,
    seed: int = 0,
    progress: bool = True,
) -> Targets | None:
    """The targets that are given, or those of what is given in their place.

    Args:
        pipe: the pipeline that is to draw.
        given: targets or None, which come back as they are; a dataset of real images; or, data-free, a label set's
            name or the generator's classes.
        options: of the pipeline's call. The objective says what the targets must hold.
        seed: of the samples that stand for the generator's classes.
        progress: show a progress bar.

    Raises:
        TypeError: for anything else.
        ValueError: for what `MatchingTargets` refuses to be made of, or an objective that matches nothing.
    """
    if given is None or isinstance(given, Targets):
        return given
    objective = options.get("objective", "rkhs")
    if isinstance(given, DatasetDict | IterableDatasetDict):
        raise TypeError(f"Got all splits, {list(given)}; choose one, for example `dataset[{next(iter(given))!r}]`.")
    real = isinstance(given, Dataset | IterableDataset)
    if not real and not isinstance(given, str | list | tuple):
        check_targets(given)
    if objective == "classifier":
        raise ValueError("The 'classifier' objective matches nothing: pass None, and classes as `class_labels=`.")
    if objective == "quantile":
        if not real:
            raise ValueError("The 'quantile' objective matches real images: pass a dataset, or another objective.")
        return QuantileTargets.from_dataset(given, pipe, progress=progress)
    second_moment = objective == "ridge"
    if real:
        return MatchingTargets.from_dataset(given, pipe, second_moment=second_moment, progress=progress)
    drawn = {name: options[name] for name in _OF_GENERATOR if name in options}
    shared: dict[str, Any] = {"second_moment": second_moment, "seed": seed, "progress": progress}
    return MatchingTargets.from_generator(pipe, given, **shared, **drawn)
