"""What a search refuses before and after its reference is trained, each with what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ...evaluators import ImageSet, Protocol, check_same_classes
from ...evaluators.batches import check_images, check_label_source
from ...utils.files import read_json, write_json
from ...utils.origins import differences, in_words
from ...utils.values import check_real, check_whole, plain
from .noninferiority import images_needed
from .search import SearchPlan


def check_plan(plan: SearchPlan, synthetic: int, real: int) -> SearchPlan:
    """The plan, with a smallest size that holds the synthetic images.

    Raises:
        ValueError: for a margin or confidence out of range, too few trainings, or as many synthetic images as real.
    """
    check_real("margin", plan.margin, 0, 0.5, open_low=True)
    check_real("confidence", plan.confidence, 0.5, 0.9999)
    check_whole("reference_seeds", plan.reference_seeds, 2)
    check_whole("trainings", plan.trainings, len(plan.first_shares) + 2)
    check_whole("looks", plan.looks, 1, 2)
    if synthetic >= real:
        raise ValueError(
            f"There are {synthetic} synthetic images and {real} real ones: a search looks for fewer images than all "
            "real ones, so give fewer synthetic ones."
        )
    return dataclasses.replace(plan, smallest=max(plan.smallest, synthetic))


def check_trainable(
    network: PreTrainedModel,
    protocol: Protocol,
    teacher: PreTrainedModel | None,
    real: ImageSet,
    test: ImageSet,
    small: ImageSet | None,
) -> None:
    """Checks that a network can be trained and tested on these images, before any is.

    Raises:
        ValueError: for classes of images, network or teacher that do not fit, missing labels, or a teacher that is
            missing or not asked for.
    """
    if protocol.label_type in ("stored", "learned"):
        raise ValueError(
            "A search trains on real images, which have no stored soft labels: set the protocol's label_type='hard', "
            "or 'teacher' and pass `teacher=`."
        )
    check_same_classes(real.names, test.names, what="the test set")
    if small is not None:
        check_same_classes(real.names, small.names, what="the synthetic set")
        if (own := tuple(small.pixels.shape[1:])) != (shape := tuple(real.pixels.shape[1:])):
            raise ValueError(
                f"The synthetic images are {own} and the real ones {shape} (channels, height, width): read both with "
                f"the same `num_channels` and `protocol=get_protocol(..., image_size={shape[-1]})`."
            )
    if missing := int((test.labels < 0).sum()):
        raise ValueError(
            f"{missing} of {len(test.labels)} test images have no label, so that nothing can be tested on them: take "
            "a split that is labelled, or leave them out."
        )
    if network.config.num_labels != len(real.names):
        raise ValueError(
            f"The network has {network.config.num_labels} classes, and the images have {len(real.names)}: leave "
            "`num_labels` out of its options, which follows from the images."
        )
    for what, images in (("training", real), ("test", test)):
        check_images(images.pixels, images.labels, len(real.names), what=what)
    check_label_source(network, protocol, len(real.labels), teacher, None)


def check_reference(full: NDArray[np.bool_], labels: torch.Tensor, plan: SearchPlan) -> None:
    """Checks what trainings on all data have right.

    Args:
        full (array of shape `(R, M)`): of M test images, by R trainings.
        labels (`torch.Tensor` of shape `(M,)`): theirs.
        plan ([`SearchPlan`]): with the margin.

    Raises:
        ValueError: where they are no better than chance, or too few test images for the margin.
    """
    accuracy, chance = full.mean(1), float(torch.bincount(labels).max()) / len(labels)
    error = float(np.sqrt(chance * (1 - chance) / len(labels)))
    if accuracy.mean() <= chance + 3 * error:
        raise ValueError(
            f"Trainings on all data reach {100 * accuracy.mean():.1f} %, and always naming the most frequent class "
            f"reaches {100 * chance:.1f} %: nothing can be lost. Train longer, or with another learning rate."
        )
    needed = images_needed(full, plan.margin, 1 - plan.confidence)
    if needed > full.shape[1]:
        raise ValueError(
            f"A margin of {100 * plan.margin:g} points cannot be resolved with {full.shape[1]:,} test images: about "
            f"{needed:,} would be needed. Use a wider margin, or more test images."
        )


def rising(full: NDArray[np.bool_], half: NDArray[np.bool_]) -> float:
    """What the second half of the length of the reference's trainings is worth, in accuracy.

    More than the margin means that all data have not been trained to the end: fewer images may then seem as good only
    because nothing is.

    Args:
        full (array of shape `(R, M)`): what the trainings have right.
        half (array of shape `(S, M)`): what trainings of half the steps or epochs have right.
    """
    return float(full.mean() - half.mean())


def begin(folder: Path, stated: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Writes down what is stated before the first training; a search that goes on must state the same.

    Args:
        folder (`Path`): of the search, seen by all processes.
        stated (mapping): margin, number of trainings and all else, as JSON values.
        accelerator (`Accelerator`): of the launch.

    Raises:
        ValueError: if the folder's search was begun otherwise.
    """
    path, stated = folder / "search.json", plain(dict(stated))
    if path.exists():
        remedy = "Remove it if the options are those that the search was begun with."
        if changed := differences(read_json(path, remedy), stated):
            raise ValueError(
                f"The search in {folder} was begun otherwise ({in_words(changed)}), and what counts as no loss is "
                "stated before the first training: set the options as they were, or search in another folder."
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, stated)
    accelerator.wait_for_everyone()
