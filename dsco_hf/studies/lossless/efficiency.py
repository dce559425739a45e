"""The efficiency limit: how many real images a synthetic one is worth, and where synthesis stops paying.

Read off the rows of a study (results.json), with no further training. The limit is Proposition 2 of "Beyond Dataset
Distillation" (arXiv 2603.27987); the exchange rate is our way to see it: r(n) = real images per class that reach the
same accuracy, divided by n.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...utils.files import read_json
from ...utils.values import check_choice
from .curves import LEAST_STD, Floats, fit_curves


logger = logging.getLogger(__name__)

REAL = "random"  # what the exchange rate counts in
LEVEL = 0.95  # of all intervals
DRAWS = 2000
MEASURES = ("discrepancy", "unexplained")  # of a set, without training on it; the lower, the better
FURTHEST = 10  # times the last budget: further, a slope between two budgets says nothing


def efficiency(results: Mapping[str, Any], *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Exchange rates, crossings, ceilings and floors of all methods of a study.

    Intervals (95 %) come from drawing the mean accuracy of every row again as a normal deviate, with the deviation of
    its trainings by the root of their number: trainings of one set count as independent.

    Args:
        results (mapping): content of results.json: `rows` with `method`, `images_per_class`, `accuracies` and, where
            known, `discrepancy`, `discrepancies` and `unexplained` (of each set), `redundancy`; `full`, if all data
            were trained on.
        draws (`int`): B, of the bootstrap.
        seed (`int`): of the draws.

    Returns:
        `dict`: for each method `rates` (a list of `images_per_class`, `rate`, `low`, `high` and `extrapolated`, true
        where the accuracy lies outside of those of real images), `crossing` (images per class where the rate falls to
        1), `doping` (where the *next* synthetic image is worth one real image, which is when doping should begin),
        `ceiling` (accuracy with any number of images as a - b·n^(-c) has it, from three budgets on; None where these
        budgets do not show one), `floor` (of the discrepancy, the generator's own bias, from two budgets on) and
        `redundancy` (mean over pairs of blocks at the largest budget, see
        [`~dsco_hf.matching.discrepancy.redundancy`]).
        Crossing, doping and ceiling have `low` and `high`, None where there is no bound; the first two are None where
        no moment is within `FURTHEST` times the last budget, and `extrapolated` past that budget.
        `rank_correlation`: by measure ("discrepancy", "unexplained") and budget, Spearman's with accuracy over sets.

    Raises:
        ValueError: with fewer than two budgets of random real images.
    """
    rows = [row for row in results["rows"] if row.get("accuracies")]
    real = sorted((row for row in rows if row["method"] == REAL), key=lambda row: row["images_per_class"])
    if len(real) < 2:
        raise ValueError(
            f"An exchange rate needs random real images at two budgets or more, got {len(real)}: "
            "their rows are called 'random'."
        )
    if full := results.get("full"):
        count = real[0]["images"] / real[0]["images_per_class"]  # classes
        real.append({**full, "images_per_class": full["images"] / count})
    random = np.random.default_rng(seed)
    sizes = np.array([row["images_per_class"] for row in real], dtype=float)
    accuracy = np.stack([draw_means(row["accuracies"], draws, random) for row in real], 1)  # (B, K)
    methods: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["images_per_class"])
        methods[method] = method_efficiency(own, sizes, accuracy, random)
    return {"methods": methods, "rank_correlation": rank_correlations(rows), "draws": draws, "level": LEVEL}


def recommended_doping(report: Mapping[str, Any] | str | Path, method: str = "nopt") -> float:
    """Images per class at which doping should begin, for [`~dsco_hf.concentration.additions.doping.dope`].

        dope(small, real, pipe, images_per_class="auto", begin_doping=recommended_doping("figures/efficiency.json"))

    Args:
        report (mapping, `str` or `Path`): of [`efficiency`], or the efficiency.json that `recipes/figures.py` writes.
        method (`str`): how the set was drawn, as the study calls it.

    Raises:
        ValueError: for a method that the study did not draw, or one whose images it saw no end of.
        DamagedFileError: for a file that cannot be read.
    """
    if not isinstance(report, Mapping):
        report = read_json(Path(report), "Write it again: `python recipes/figures.py STUDY`.")
    check_choice("method", method, list(report["methods"]))
    moment = report["methods"][method].get("doping")
    if moment is None:
        raise ValueError(
            f"The study saw no moment from which on a real image is worth more than the next of {method!r}: evaluate "
            "sets at two budgets or more and at larger ones, or pass `images_per_class` as a number."
        )
    if moment["extrapolated"]:
        logger.warning(
            "Doping should begin at %g images per class, which is extrapolated.", moment["images_per_class"]
        )
    return float(moment["images_per_class"])


def method_efficiency(
    rows: Sequence[Mapping[str, Any]], sizes: Floats, real: Floats, random: np.random.Generator
) -> dict[str, Any]:
    """What [`efficiency`] says of one method, from its rows by rising budget; real images as in [`needed_images`]."""
    budgets = np.array([row["images_per_class"] for row in rows], dtype=float)
    accuracy = np.stack([draw_means(row["accuracies"], len(real), random) for row in rows], 1)  # (B, M)
    needed, outside = zip(*(needed_images(accuracy[:, i], sizes, real) for i in range(len(rows))), strict=True)
    rates = np.stack(needed, 1) / budgets  # (B, M)
    if rows[0]["method"] == REAL:  # against itself, drawn twice
        rates = np.ones_like(rates)
    told = [
        {"images_per_class": row["images_per_class"], **_rounded(rates[:, i], "rate"),
         "extrapolated": bool(outside[i].mean() > 0.5)}
        for i, row in enumerate(rows)
    ]  # fmt: skip
    several = rows[0]["method"] != REAL and len(rows) > 1
    ceiling = None
    if len(rows) > 2:
        curves = fit_curves(budgets, accuracy, np.maximum(accuracy.std(0), LEAST_STD))
        ceiling = curves.top + curves.drop
    known = [(1 / row["images_per_class"], row["discrepancy"]) for row in rows if row.get("discrepancy") is not None]
    return {
        "rates": told,
        "crossing": _moment(crossing(budgets, rates), budgets[-1]) if several else None,
        "doping": _moment(doping_moment(budgets, rates), budgets[-1]) if several else None,
        "ceiling": None if ceiling is None or np.median(ceiling) >= 1 else _rounded(ceiling, "accuracy"),
        "floor": floor(*np.array(known).T) if len(known) > 1 else None,
        "redundancy": _mean_redundancy(rows[-1].get("redundancy")),
    }


def draw_means(accuracies: Sequence[float], draws: int, random: np.random.Generator) -> Floats:
    """Means `(B,)` as other trainings might have given them; one training has no deviation."""
    count = len(accuracies)
    std = np.std(accuracies, ddof=1) if count > 1 else 0.0
    return np.asarray(np.mean(accuracies) + random.standard_normal(draws) * std / np.sqrt(count))


def needed_images(accuracy: Floats, sizes: Floats, real: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Real images per class that reach an accuracy: interpolated linearly in log n, between the budgets measured.

    Args:
        accuracy (array of shape `(B,)`): to be reached, in [0, 1].
        sizes (array of shape `(K,)`): rising numbers of real images per class, K at least 2.
        real (array of shape `(B, K)`): accuracies with them; made to rise with n before they are read.

    Returns:
        Images `(B,)`, and whether they lie outside of `sizes` and follow from the slope at that end.
    """
    rising = np.maximum.accumulate(real, axis=1) + 1e-9 * np.arange(len(sizes))
    place = np.clip((accuracy[:, None] > rising).sum(1), 1, len(sizes) - 1)  # the segment that it ends
    each = np.arange(len(accuracy))
    low, high = rising[each, place - 1], rising[each, place]
    start, end = np.log(sizes)[place - 1], np.log(sizes)[place]
    slope = np.maximum(high - low, 1e-6) / (end - start)
    images = np.exp(np.clip(start + (accuracy - low) / slope, -20, 40))
    return images, (accuracy < rising[:, 0]) | (accuracy > rising[:, -1])


def crossing(budgets: Floats, rates: Floats) -> Floats:
    """Images per class `(B,)` where the rate `(B, M)` falls to 1, linear in logarithms.

    Past the last budget by the slope of the last two; infinite where it does not fall. Where no rate is above 1, 0.
    """
    height, place = np.log(rates), np.log(budgets)
    found = np.full(len(rates), np.inf)
    found[height[:, 0] <= 0] = 0.0
    last = len(budgets) - 2
    for i in range(last + 1):
        fall = (height[:, i] - height[:, i + 1]) / (place[i + 1] - place[i])
        with np.errstate(divide="ignore", invalid="ignore"):
            at = place[i] + height[:, i] / fall
        here = np.isinf(found) & (height[:, i] > 0) & (fall > 0) & ((at <= place[i + 1]) | (i == last))
        found[here] = np.exp(np.minimum(at[here], 40))
    return found


def doping_moment(budgets: Floats, rates: Floats) -> Floats:
    """Images per class `(B,)` from where on the next synthetic image is worth less than one real image.

    With N(n) = n·r(n) the real images that n synthetic ones are worth, N'(n) = 1. N is a power of n between two
    budgets (as in [`needed_images`]), so N' = p·r(n) there, with p the slope of log N in log n.
    """
    worth = np.maximum.accumulate(budgets * rates, axis=1)
    found = np.full(len(rates), np.inf)
    last = len(budgets) - 2
    for i in range(last + 1):
        power = np.log(worth[:, i + 1] / worth[:, i]) / np.log(budgets[i + 1] / budgets[i])
        rate = worth[:, i] / budgets[i]
        with np.errstate(divide="ignore"):  # p·r·(n/b)^(p-1) = 1
            logarithm = np.log(power * rate) / np.maximum(1 - power, 1e-3)
        at = np.where(power < 1, budgets[i] * np.exp(np.clip(logarithm, 0, 40)), np.inf)
        here = np.isinf(found) & ((at <= budgets[i + 1]) | (i == last))
        found[here] = np.maximum(at[here], 0.0 if i == 0 else budgets[i])
    return found


def floor(inverse: Floats, discrepancy: Floats) -> dict[str, float]:
    """The part of the discrepancy that no number of images removes: of d = floor + s / n, by least squares, ≥ 0.

    For independent images the mean of a squared MMD is exactly of this form: bias² of the generator, and variance / n.
    The error of a regression is not: it falls like a smaller power of 1 / n, and shows no floor at a few budgets.

    Args:
        inverse (array of shape `(M,)`): 1 / n.
        discrepancy (array of shape `(M,)`): squared MMD to the real classes.
    """
    weight = 1 / np.maximum(discrepancy, 1e-12) ** 2  # errors are about proportional
    weight = weight / weight.sum()
    centred = inverse - weight @ inverse
    slope = max(float((weight * centred) @ discrepancy / ((weight * centred) @ centred)), 0.0)
    return {"discrepancy": max(float(weight @ discrepancy - slope * (weight @ inverse)), 0.0), "per_image": slope}


def rank_correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Spearman's ρ of each of `MEASURES` and accuracy, over the sets of each budget that has three or more.

    -1 where a measure orders sets as test accuracy does: the smaller, the better. An accuracy is the mean over the
    trainings of a set; rows that tell only means count as one set.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for measure, budget in itertools.product(MEASURES, sorted({row["images_per_class"] for row in rows})):
        own = [sets_of(row, measure) for row in rows if row["images_per_class"] == budget]
        values = [value for measured, _ in own for value in measured]
        accuracies = [value for _, reached in own for value in reached]
        if len(values) > 2:
            answer = stats.spearmanr(values, accuracies)
            told = {"rho": float(answer.statistic), "p": float(answer.pvalue), "sets": len(values)}
            found.setdefault(measure, {})[f"{budget:g}"] = told
    return found


def sets_of(row: Mapping[str, Any], measure: str) -> tuple[list[float], list[float]]:
    """A measure of each set of a row, and its mean accuracy over trainings; nothing where it was not measured."""
    each = row.get({"discrepancy": "discrepancies"}.get(measure, measure))
    if each is None or len(each) * row.get("training_seeds", 0) != len(row["accuracies"]):
        mean = row.get(measure)
        return ([], []) if mean is None or each is not None else ([mean], [row["accuracy_mean"]])
    accuracies = np.reshape(row["accuracies"], (row["training_seeds"], len(each))).mean(0)  # sets of a seed together
    return list(each), accuracies.tolist()


def _mean_redundancy(square: Sequence[Sequence[float | None]] | None) -> float | None:
    told = [value for row in square or [] for value in row if value is not None]
    return float(np.mean(told)) if told else None


def _moment(draws: Floats, last: float) -> dict[str, Any] | None:
    """A number of images per class, with its interval, if it lies where something can be said of it."""
    told = _rounded(np.where(draws > FURTHEST * last, np.inf, draws), "images_per_class")
    middle = told["images_per_class"]
    return None if middle is None else {**told, "extrapolated": bool(middle > last)}


def _rounded(draws: Floats, name: str) -> dict[str, float | None]:
    """Median and interval of draws; None for what is infinite or without bound."""
    ends = np.quantile(draws, [0.5, (1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    shown = [float(f"{end:.4g}") if np.isfinite(end) and end < 1e9 else None for end in ends]
    return dict(zip((name, "low", "high"), shown, strict=True))
