"""S³: several sets are drawn of each class, and those stay that are like the real classes and unlike each other."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline

from ...matching.features import feature_dim, features_and_logits
from ...matching.population import refuse_empty_classes
from ..call import Call, Population, Sampling, SamplingMethod
from .best_of_n import need_teacher
from .statistics import ClassStatistics, check_statistics, refuse_without_images, stand_in, stream_classes


LEAST_DISTANCE = 1e-6
MOST_SWEEPS = 100


@dataclasses.dataclass(frozen=True)
class S3(SamplingMethod):
    """Sample, score and select of IMS³ (CVPR 2026): a choice among whole sets.

    G sets are drawn of every class. With c_g the mean feature of a set, r_c that of the real class and d = 1 - cos,
    the choice g_c of all classes maximises α·Σ_c -log d(c_{g_c}, r_c) + β·Σ_{i<j} log d(c_{g_i}, c_{g_j}), one class
    after another until nothing changes.

    As published but for this: features are those of the pipeline's classifier; real means are of all images, not of
    up to 200; the choice is made for one block and for the classes of one call, as sets are drawn by these.

    Attributes:
        candidates (`int`): G.
        alpha (`float`): α, of being like the real class.
        beta (`float`): β, of being unlike other classes.
    """

    sentence: ClassVar[str] = (
        "Of several sets of plain samples of a class-conditional diffusion model those stayed that are most like the "
        "real classes, and least like each other, to a classifier."
    )
    targets_class: ClassVar[type | None] = ClassStatistics
    statistics: ClassVar[str] = "features"
    candidates: int = 5
    alpha: float = 0.4
    beta: float = 0.9

    field_limits = {"candidates": 1, "alpha": 0, "beta": 0}

    @property
    def uses_classifier(self) -> bool:
        """Its features are compared."""
        return True

    def check(self, pipe: DiffusionPipeline, targets: object) -> None:
        """Raises ValueError without a classifier, or for anything but means of its features."""
        need_teacher(self.name, pipe)
        check_statistics(self.name, "features", targets, {"means": (feature_dim(pipe.classifier),)})

    def stand_in_targets(self, pipe: DiffusionPipeline) -> ClassStatistics:
        """Ones."""
        return stand_in(pipe, "features", {"means": torch.ones(pipe.num_classes, feature_dim(pipe.classifier))})

    def make_targets(
        self, pipe: DiffusionPipeline, given: Population, sampling: Sampling, **options: Any
    ) -> ClassStatistics:
        """Mean features of the real classes, `means` `(C, d)`; arguments as of [`SamplingMethod.make_targets`].

        Raises:
            ValueError: for classes without images, or a pipeline without a classifier.
        """
        refuse_without_images(self.name, given)
        need_teacher(self.name, pipe)
        return mean_features(given, pipe, **options)

    def choose(self, call: Call, latents: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The chosen set of each class, `(N,)`, in the order of `call.wanted`."""
        features = []
        for part in pixels.split(call.batch_size):
            call.passed("classifier", len(part))
            features.append(features_and_logits(call.pipe.classifier, part)[0].cpu())
        wanted = torch.tensor(call.wanted)
        present, index = wanted.unique(return_inverse=True)
        sets = torch.cat(features).view(self.candidates, len(wanted), -1)
        sums = torch.zeros(self.candidates, len(present), sets.shape[2]).index_add_(1, index, sets)
        means = sums / index.bincount()[:, None]
        real = call.targets.tensors["means"][call.targets.rows_of(present.tolist())]
        chosen = coordinate_ascent(means, real, self.alpha, self.beta)
        return chosen[index] * len(wanted) + torch.arange(len(wanted))


@torch.no_grad()
def mean_features(given: Dataset | IterableDataset, pipe: DiffusionPipeline, **options: Any) -> ClassStatistics:
    """Means `(C, d)` of the classifier's features over the real images of each class, in one pass, summed in float64.

    Arguments are those of [`~dsco_hf.sampling.peers.statistics.stream_classes`].
    """
    found, batches = stream_classes(given, pipe, **options)
    sums = torch.zeros(len(found.class_names), feature_dim(pipe.classifier), dtype=torch.float64)
    counts = torch.zeros(len(sums), dtype=torch.float64)
    for batch in batches:
        seen = features_and_logits(pipe.classifier, batch.pixels.to(pipe._execution_device))[0].cpu()
        sums.index_add_(0, batch.labels, seen.double())
        counts += batch.labels.bincount(minlength=len(counts))
    refuse_empty_classes(counts.tolist(), found.class_names)
    found.provenance |= {"images": int(counts.sum()), "passes": {"classifier": int(counts.sum())}}
    return dataclasses.replace(found, kind="features", tensors={"means": (sums / counts[:, None]).float()})


def distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 - cos of the last dimension, `(..., d)` and `(..., d)` → `(...)`, at least a millionth."""
    return (1 - torch.cosine_similarity(one, other, dim=-1)).clamp_min(LEAST_DISTANCE)


def coordinate_ascent(means: torch.Tensor, real: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The choice of a set for each class: one class after another takes its best, until nothing changes.

    Args:
        means (`torch.Tensor` of shape `(G, C, d)`): mean features of the sets.
        real (`torch.Tensor` of shape `(C, d)`): those of the real classes.
        alpha (`float`): of -log d to the real class.
        beta (`float`): of log d to the chosen sets of all other classes.

    Returns:
        `torch.Tensor` of shape `(C,)`: a number of a set for each class; of equal ones the first.
    """
    groups, classes, _ = means.shape
    alike = -alpha * distances(means, real[None]).log()  # (G, C)
    chosen = torch.zeros(classes, dtype=torch.int64)
    for _ in range(MOST_SWEEPS):
        before = chosen.clone()
        for row in range(classes):
            others = torch.arange(classes)[torch.arange(classes) != row]
            apart = distances(means[:, row, None], means[chosen[others], others][None]).log().sum(dim=1)  # (G,)
            chosen[row] = (alike[:, row] + beta * apart).argmax()
        if torch.equal(before, chosen):
            break
    return chosen
