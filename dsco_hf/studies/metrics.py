"""Metrics of small datasets as `evaluate` modules: offline, no script from the Hub.

    from dsco_hf.studies.metrics import Retention
    Retention().compute(predictions=[0, 1], full_predictions=[0, 0], references=[0, 0])

or by path, where the configuration names the metric: `evaluate.load("dsco_hf/studies/metrics.py", "retention")`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import datasets
import evaluate
import numpy as np
import torch
from scipy import stats

# absolute, as `evaluate.load` runs a copy of this file elsewhere
from dsco_hf.data.schema import nearest
from dsco_hf.matching.kernels import draw_frequencies, fourier_embedding, median_bandwidth, mmd2
from dsco_hf.utils.values import check_real, check_whole, plain


# Rows that the bandwidth is estimated from, and rows of distances that are held at once.
BANDWIDTH_ROWS = 1000
CHUNK_ROWS = 1024
LEAST_SEEDS = 3  # below, no significance is claimed
_NUMBER, _CLASS = datasets.Value("float64"), datasets.Value("int64")
_VECTOR = datasets.Sequence(datasets.Value("float32"))
Numbers: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | torch.Tensor


class SmallDatasetMetric(evaluate.Metric):
    """Base of the metrics; called by its own name it becomes the metric that `config_name` says.

    Args:
        config_name (`str`, *optional*): a key of `METRICS`; `"accuracy"` by default.
        **kwargs: of `evaluate.Metric`.

    Raises:
        ValueError: for an unknown name; names the nearest.
    """

    columns: dict[str, Any] = {}

    def __new__(cls, config_name: str | None = None, **kwargs: object) -> SmallDatasetMetric:
        """Lets `evaluate.load(path, config_name)`, which takes the first class of a file, reach all of them."""
        if cls is not SmallDatasetMetric:
            return super().__new__(cls)
        name = config_name or "accuracy"
        if name not in METRICS:
            raise ValueError(f"Unknown metric {name!r}.{nearest(name, METRICS)} Allowed: {', '.join(METRICS)}.")
        return super().__new__(METRICS[name])

    def _info(self) -> evaluate.MetricInfo:
        description, section, inputs = (inspect.getdoc(self) or "").partition("Args:")
        return evaluate.MetricInfo(
            description=description.strip(),
            citation="",
            inputs_description=section + inputs,
            features=datasets.Features(self.columns),
        )


class Accuracy(SmallDatasetMetric):
    """Share of images whose label is among the k classes of highest score, in [0, 1]; higher is better.

    Args:
        predictions: one row of scores (logits or probabilities) per image.
        references: labels.
        k: classes counted by `top_k`, at most the number of classes.

    Returns:
        `accuracy` and `top_k`.
    """

    columns = {"predictions": _VECTOR, "references": _CLASS}

    def _compute(self, predictions: Numbers, references: Numbers, k: int = 5) -> dict[str, float]:
        scores, labels, k = _tensor(predictions), _tensor(references), check_whole("k", k, 1)
        if k > scores.shape[1]:
            raise ValueError(
                f"top_k needs k between 1 and the {scores.shape[1]} classes, got {k}: pass a smaller `k=`."
            )
        hits = scores.topk(k, dim=1).indices == labels[:, None]  # (B, k), the best first
        return {"accuracy": hits[:, 0].double().mean().item(), "top_k": hits.any(1).double().mean().item()}


class Retention(SmallDatasetMetric):
    """How much of the full data's accuracy a small dataset keeps.

    The accuracy of a model trained on a small dataset divided by that of the same model trained on all data, on the
    same test images; 1 is lossless, higher is better.

    Args:
        predictions: classes predicted by the model trained on the small dataset.
        full_predictions: classes predicted by the model trained on the full dataset.
        references: labels.

    Returns:
        `retention`, `accuracy` and `full_accuracy`.
    """

    columns = dict.fromkeys(("predictions", "full_predictions", "references"), _CLASS)

    def _compute(self, predictions: Numbers, full_predictions: Numbers, references: Numbers) -> dict[str, float]:
        small, full = (float(np.mean(np.equal(p, references))) for p in (predictions, full_predictions))
        if not full > 0:
            raise ValueError(f"The accuracy on the full data is {full}; retention needs one above 0.")
        return {"retention": small / full, "accuracy": small, "full_accuracy": full}


class Discrepancy(SmallDatasetMetric):
    """MMD² between the features of a small dataset and of the real one; at least 0, lower is better.

    The squared maximum mean discrepancy of two sets of features (Gretton et al. 2012), Gaussian kernel of the median
    bandwidth by random Fourier features, on features standardised by the real ones.

    Args:
        predictions: features of the small dataset, one row per image.
        real_features: features of the real dataset, of any number of rows.
        labels: optional, class of each row of `predictions`; with `real_labels` the mean over the classes is taken.
        real_labels: optional, class of each row of `real_features`.
        embedding_dim: number of Fourier features, even.
        seed: of the Fourier features, and of the rows that the bandwidth is taken from.

    Returns:
        `discrepancy`.
    """

    columns = {"predictions": _VECTOR}

    def _compute(
        self,
        predictions: Numbers,
        real_features: Numbers | None = None,
        labels: Numbers | None = None,
        real_labels: Numbers | None = None,
        embedding_dim: int = 2048,
        seed: int = 0,
    ) -> dict[str, float]:
        small, real = _feature_sets(predictions, real_features)
        std = real.std(0, correction=0)
        small, real = ((x - real.mean(0)) / torch.where(std > 0, std, 1.0) for x in (small, real))
        generator = torch.Generator().manual_seed(check_whole("seed", seed))
        rows = torch.randperm(len(real), generator=generator)[:BANDWIDTH_ROWS]
        frequencies = draw_frequencies(
            real.shape[1], check_whole("embedding_dim", embedding_dim, 2), median_bandwidth(real[rows]),
            generator=generator,
        )  # fmt: skip
        ours, theirs = (fourier_embedding(x, frequencies) for x in (small, real))
        if labels is None or real_labels is None:
            return {"discrepancy": mmd2(ours.mean(0), theirs.mean(0)).item()}
        own, other, values = _tensor(labels), _tensor(real_labels), []
        for label in own.unique():
            if not (other == label).any():
                raise ValueError(f"Class {int(label)} of the small dataset has no image in the real one.")
            values.append(mmd2(ours[own == label].mean(0), theirs[other == label].mean(0)))
        return {"discrepancy": torch.stack(values).mean().item()}


class Coverage(SmallDatasetMetric):
    """Density (fidelity, may exceed 1) and coverage (diversity, in [0, 1]) in feature space; higher is better.

    Around each real image lies a ball that reaches to its k-th real neighbour. Density counts the balls that the small
    images lie in, by k; coverage is the share of balls that hold a small image (Naeem et al. 2020, arXiv 2002.09797).

    Args:
        predictions: features of the small dataset, one row per image.
        real_features: features of the real dataset; more than `k` rows.
        k: neighbours that span a ball around each real image.

    Returns:
        `density` and `coverage`.
    """

    columns = {"predictions": _VECTOR}

    def _compute(self, predictions: Numbers, real_features: Numbers | None = None, k: int = 5) -> dict[str, float]:
        small, real = _feature_sets(predictions, real_features)
        if check_whole("k", k, 1) >= len(real):
            raise ValueError(f"Coverage needs k < {len(real)} real images, got k={k}.")
        inside, covered = 0, 0
        for rows in real.split(CHUNK_ROWS):
            radius = torch.cdist(rows, real).kthvalue(int(k) + 1, dim=1).values  # the nearest one is the image itself
            within = torch.cdist(rows, small) < radius[:, None]  # (rows, n)
            inside += int(within.sum())
            covered += int(within.any(1).sum())
        return {"density": inside / (int(k) * len(small)), "coverage": covered / len(real)}


class LabelRobustScore(SmallDatasetMetric):
    """Label Robust Score of DD-Ranking (github.com/NUS-HPC-AI-Lab/DD-Ranking), in [0, 1]; higher is better.

    Its code exponentiates accuracies in percent, which leaves [0, 1]; here accuracies are fractions.

    Args:
        predictions: accuracies in [0, 1] of the small dataset by its own recipe, one per evaluation.
        random: likewise of random real images, same size and recipe.
        hard: likewise of the small dataset with hard labels.
        full: likewise of the full dataset with hard labels.
        weight: of the improvement over random against the loss to the full data, in [0, 1].

    Returns:
        `lrs`, and the means `improvement_over_random` and `hard_label_recovery` (a gap: lower is better).
    """

    columns = dict.fromkeys(("predictions", "random", "hard", "full"), _NUMBER)

    def _compute(
        self, predictions: Numbers, random: Numbers, hard: Numbers, full: Numbers, weight: float = 0.5
    ) -> dict[str, float]:
        mean = _means(predictions=predictions, random=random, hard=hard, full=full)
        improvement, recovery = mean["predictions"] - mean["random"], mean["full"] - mean["hard"]
        score = _robust_score(improvement, -recovery, weight)
        return {"lrs": score, "improvement_over_random": improvement, "hard_label_recovery": recovery}


class AugmentationRobustScore(SmallDatasetMetric):
    """Augmentation Robust Score of DD-Ranking (github.com/NUS-HPC-AI-Lab/DD-Ranking), in [0, 1]; higher is better.

    Its code exponentiates accuracies in percent, which leaves [0, 1]; here accuracies are fractions.

    Args:
        predictions: accuracies in [0, 1] of the small dataset with augmentation, one per evaluation.
        random: likewise of random real images of the same size.
        predictions_plain: likewise of the small dataset without augmentation.
        random_plain: likewise of random real images without augmentation.
        weight: of the gap with augmentation against the one without, in [0, 1].

    Returns:
        `ars`, and the mean gaps `with_augmentation` and `without_augmentation`.
    """

    columns = dict.fromkeys(("predictions", "random", "predictions_plain", "random_plain"), _NUMBER)

    def _compute(
        self,
        predictions: Numbers,
        random: Numbers,
        predictions_plain: Numbers,
        random_plain: Numbers,
        weight: float = 0.5,
    ) -> dict[str, float]:
        mean = _means(
            predictions=predictions, random=random, predictions_plain=predictions_plain, random_plain=random_plain
        )
        augmented, plain_gap = mean["predictions"] - mean["random"], mean["predictions_plain"] - mean["random_plain"]
        score = _robust_score(augmented, plain_gap, weight)
        return {"ars": score, "with_augmentation": augmented, "without_augmentation": plain_gap}


METRICS: dict[str, type[SmallDatasetMetric]] = {
    "accuracy": Accuracy,
    "retention": Retention,
    "discrepancy": Discrepancy,
    "coverage": Coverage,
    "lrs": LabelRobustScore,
    "ars": AugmentationRobustScore,
}


def _robust_score(first: float, second: float, weight: float) -> float:
    """How DD-Ranking maps a weighted mean α of gaps in [-1, 1] to [0, 1]: (exp(α) - exp(-1)) / (exp(1) - exp(-1))."""
    weight = check_real("weight", weight, 0, 1)
    alpha = weight * first + (1 - weight) * second
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def paired_difference(accuracies: Sequence[float], others: Sequence[float]) -> dict[str, float | None]:
    """Difference of two methods over the same seeds, with its 95 % interval and the p-value of a paired t-test.

    Args:
        accuracies (`Sequence[float]`): of the one method, by seed.
        others (`Sequence[float]`): of the other, for the same seeds in the same order.

    Returns:
        `dict`: `mean` (above 0 where the first is better), `low`, `high` and `p`; the last three are None for fewer
        than three seeds, whose spread says nothing, and for differences that are all the same.

    Raises:
        ValueError: for different numbers of seeds, or none, and for accuracies that are no finite numbers.
    """
    accuracies = [check_real("accuracies", value) for value in plain(accuracies)]
    others = [check_real("others", value) for value in plain(others)]
    if len(accuracies) != len(others) or not accuracies:
        raise ValueError(f"A paired test needs the same seeds, got {len(accuracies)} and {len(others)} accuracies.")
    differences = np.subtract(accuracies, others)
    mean, count = float(differences.mean()), len(differences)
    if count < LEAST_SEEDS or np.ptp(differences) < 1e-12:
        return {"mean": mean, "low": None, "high": None, "p": None}
    test = stats.ttest_rel(accuracies, others)
    interval = test.confidence_interval(0.95)
    return {"mean": mean, "low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}


def _feature_sets(predictions: Numbers, real_features: Numbers | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both feature sets as float32 tensors of shapes `(n, d)` and `(N, d)`, checked."""
    if real_features is None:
        raise ValueError("Pass the features of the real dataset as `real_features`.")
    small, real = (_tensor(values).float() for values in (predictions, real_features))
    for name, values in (("predictions", small), ("real_features", real)):
        if values.ndim != 2 or not len(values):
            raise ValueError(f"`{name}` must be features of shape (images, d), got shape {tuple(values.shape)}.")
        if not values.isfinite().all():
            raise ValueError(f"`{name}` contain NaN or infinite values; check the classifier that made them.")
    if small.shape[1] != real.shape[1]:
        raise ValueError(
            f"The features have {small.shape[1]} and {real.shape[1]} dimensions; use one classifier for both."
        )
    return small, real


def _tensor(values: Numbers) -> torch.Tensor:
    return values.detach().cpu() if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))


def _means(**accuracies: Numbers) -> dict[str, float]:
    """Means of accuracies, which are fractions."""
    found = {name: plain(values) for name, values in accuracies.items()}
    for name, values in found.items():
        if not all(0 <= check_real(name, value) <= 1 for value in values):
            raise ValueError(f"`{name}` must be accuracies in [0, 1], not percent; got {values[:5]}.")
    return {name: float(np.mean(values)) for name, values in found.items()}
