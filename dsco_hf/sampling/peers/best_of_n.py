"""Best of N by the teacher: of several times as many plain samples the classifier's surest stay."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline

from ...matching.features import features_and_logits
from ..call import Call, SamplingMethod
from .statistics import NeedsNames


@dataclasses.dataclass(frozen=True)
class BestOfN(NeedsNames, SamplingMethod):
    """The first stage of CaO2 (Wang et al., ICCV 2025), and the control for what a classifier alone buys.

    N times as many images are drawn; of each class those stay that the classifier takes for that class and is surest
    of. It is data-free: a dataset that is given names the classes, and none of its images is read.

    As published but for this: images are chosen among those of one block, as sets grow by blocks; where fewer are
    right than wanted, the wrong ones of the highest probability fill up; N is 4 for all datasets (theirs differs: 2
    for ImageNette; on ImageNet-100 the *least* sure stay); their second stage, which refines latents, is left out.

    Attributes:
        candidates (`int`): N.
    """

    name: ClassVar[str] = "best-of-n"
    sentence: ClassVar[str] = (
        "The synthetic images are those of several plain samples of a class-conditional diffusion model that a "
        "classifier was surest of."
    )
    candidates: int = 4
    field_limits = {"candidates": 1}

    @property
    def uses_classifier(self) -> bool:
        """It is the teacher."""
        return True

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError without a teacher; targets only name classes."""
        need_teacher(self.name, pipe)

    def prepare(self, call: Call) -> None:
        """Finds the classifier's label of each image, `(B,)`; ValueError if it was trained on other classes."""
        call.state = torch.tensor(call.pipe.classifier_labels(call.ids))

    def choose(self, call: Call, latents: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The classifier's surest of each class, `(N,)`; see [`surest`]."""
        logits = []
        for part in pixels.split(call.batch_size):
            call.passed("classifier", len(part))
            logits.append(features_and_logits(call.pipe.classifier, part)[1].cpu())
        return surest(torch.cat(logits), call.state, torch.tensor(call.ids), torch.tensor(call.wanted))


def need_teacher(method: str, pipe: DiffusionPipeline) -> None:
    """Raises ValueError for a pipeline without a classifier."""
    if pipe.classifier is None:
        raise ValueError(
            f"method={method!r} asks a classifier, and the pipeline has none: pass `classifier=` to "
            "`DsCoPipeline.from_pretrained`."
        )


def surest(logits: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each class as many images as are wanted: the right ones first, of the highest probability.

    Args:
        logits (`torch.Tensor` of shape `(B, K)`): of the images.
        labels (`torch.Tensor` of shape `(B,)`): the classifier's label of each.
        ids (`torch.Tensor` of shape `(B,)`): the class of each.
        wanted (`torch.Tensor` of shape `(n,)`): the classes of the images that stay.

    Returns:
        `torch.Tensor` of shape `(n,)`: their indices, of the classes `wanted`, the surest first.
    """
    own = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    score = own + (logits.argmax(dim=1) == labels)  # a probability is at most 1: no wrong one is before a right one
    chosen = torch.empty_like(wanted)
    for one in wanted.unique():
        places, drawn = (wanted == one).nonzero()[:, 0], (ids == one).nonzero()[:, 0]
        chosen[places] = drawn[score[drawn].argsort(descending=True, stable=True)[: len(places)]]
    return chosen
