"""How right and how sharp the search for the lossless size is: simulated learning curves with known truth.

    python recipes/benchmarks/lossless_calibration.py --out calibration.json

Nothing is trained. Trainings are drawn: each test image has a difficulty, a part of it that changes with the size of
the training set and is the same for all seeds, and chance that each training has for itself; each training has luck
over all images. The searches are those of `find_lossless_budget`, with its defaults: margin 0.5 points, 95 %
confidence, at most 20 trainings beyond the reference; 10,000 test images.

Each search has a curve of its own, drawn around one of those of published and own measurements (`MEASURED`), with a
deviation over seeds of 0.1 to 0.4 points. A second grid (`HARD`) is what the search is not made for: small lossless
shares on flat curves, and curves that have not the form which is fitted.

The search was chosen with curves and trainings of `--root 1`; what is recorded is of the default root, which was
drawn once, when nothing was left to choose.

Prints one JSON object as its last line:

- `wrong_share`: of the searches, those whose accepted size is worse than all data by more than the margin;
- `mean_excess`: mean of accepted size / smallest true size; all images where nothing was shown; `mean_excess_error`
  is its standard error;
- `not_shown_share`, `mean_trainings`, and all of these `by_curve`, `by_std`, and for the `hard` grid.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy import optimize, special, stats

from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.studies.lossless.search import Search, SearchPlan


WHOLE, TEST_IMAGES = 50_000, 10_000
ROOT = 20_261_127  # of the recorded draws
STDS = (0.001, 0.002, 0.003, 0.004)  # over seeds
PERSISTENT = 0.05  # of an image's difficulty, what changes with the size of the training set
# name → accuracy with all data, exponent, and share of the data that is 0.5 points worse, as fitted to accuracies of:
MEASURED = {
    "CIFAR-10 at 16 px, random, same steps": (0.790, 0.5, 0.795),  # own: 42 / 77.3 / 79.0 at 1 / 50 / 100 %
    "CIFAR-10 at 16 px, random, same epochs": (0.790, 0.16, 0.92),  # own: 42 / 74.9 / 79.0
    "CIFAR-10, ResNet-18, random": (0.956, 1.0, 0.82),  # 90.2 / 93.3 / 94.6 / 95.6 at 30 / 50 / 70 / 100 %
    "CIFAR-10, ResNet-18, forgetting": (0.956, 2.6, 0.58),  # 34.0 / 95.4 / 95.6 at 10 / 70 / 100 %
    "ImageNet, ResNet-50, random": (0.764, 0.1, 0.958),  # 69.1 / 72.2 / 76.4 at 50 / 70 / 100 %
    "ImageNet, ResNet-50, forgetting": (0.764, 1.8, 0.87),  # 72.0 / 74.8 / 76.4 at 50 / 70 / 100 %
    "ImageNet, Swin-T, Dyn-Unc": (0.796, 2.0, 0.70),  # 77.6 / 78.5 / 79.1 / 79.6 at 50 / 60 / 70 / 100 %
    "digits, random": (0.9935, 1.0, 0.41),  # own: 93.5 / 98.6 / 99.4 at 10 / 43 / 143 per class
    "digits, herded": (0.9935, 2.0, 0.25),  # own: 96.6 / 99.35 / 99.35
}
HARD = {
    "flat, 10 % do": (0.9, 0.5, 0.1),
    "flat, 20 % do": (0.9, 0.5, 0.2),
    "flat, 35 % do": (0.9, 0.5, 0.35),
    "steep, 20 % do": (0.9, 1.0, 0.2),
    "cliff below 50 %": (0.9, None, 0.5),
    "cliff below 25 %": (0.9, None, 0.25),
}
MARGIN = SearchPlan().margin
Curve = tuple[float, float | None, float]  # accuracy with all images, exponent, lossless share


@dataclass
class Truth:
    """A learning curve and the trainings that follow it.

    Attributes:
        top: accuracy with all images.
        exponent: of the power law; None for one that falls 10 points per e-fold below `share` and 0.25 points from
            all images to there.
        share: of the images, the least that falls behind by the margin at most.
        std: of accuracy over seeds; up to half of its variance is the chance of single images.
        random: of all draws.
    """

    top: float
    exponent: float | None
    share: float
    std: float
    random: np.random.Generator

    def __post_init__(self) -> None:
        """Draws the test images."""
        quantile = stats.norm.ppf(self.top)
        wanted = min(0.5 * self.std**2 * TEST_IMAGES, 0.5 * _chance(quantile, 0.9))  # mean of p (1 - p) over images
        self.own = optimize.brentq(lambda own: _chance(quantile, own) - wanted, 1e-7, 0.9)
        self.luck = np.sqrt(self.std**2 - wanted / TEST_IMAGES) / stats.norm.pdf(quantile)
        parts = self.random.standard_normal((3, TEST_IMAGES))
        self.difficulty = np.sqrt(max(1 - self.own - PERSISTENT, 0.0)) * parts[0]
        self.turning = np.sqrt(PERSISTENT) * parts[1:]

    def accuracy(self, images: int) -> float:
        """The true one."""
        share = images / WHOLE
        if self.exponent is None:
            edge = 0.5 * MARGIN * np.log(1 / share) / np.log(1 / self.share)
            return float(self.top - (edge if share >= self.share else 0.5 * MARGIN + 0.1 * np.log(self.share / share)))
        drop = MARGIN / (self.share**-self.exponent - 1)
        return float(max(self.top - drop * (share**-self.exponent - 1), 0.05))

    @property
    def smallest(self) -> int:
        """The smallest size that is lossless."""
        found = optimize.brentq(lambda n: self.accuracy(n) - self.top + MARGIN, 1, WHOLE - 1)
        return int(np.ceil(found))

    def train(self, sizes: Sequence[int], seeds: Sequence[int]) -> list[NDArray[np.bool_]]:
        """Which test images trainings have right, `(S, M)` for each size."""
        return [self.right(images, seeds) for images in sizes]

    def right(self, images: int, seeds: Sequence[int]) -> NDArray[np.bool_]:
        """Those on one size, `(S, M)`."""
        angle = 0.7 * np.log(images / WHOLE)
        known = self.difficulty + np.cos(angle) * self.turning[0] + np.sin(angle) * self.turning[1]
        level = stats.norm.ppf(self.accuracy(images)) + self.luck * self.random.standard_normal((len(seeds), 1))
        chance = np.sqrt(self.own) * self.random.standard_normal((len(seeds), TEST_IMAGES), dtype=np.float32)
        right: NDArray[np.bool_] = level + known + chance > 0
        return right


def _chance(quantile: float, own: float) -> float:
    """Mean of p (1 - p) where two trainings' scores of an image correlate by 1 - own."""
    return float(2 * special.owens_t(quantile, np.sqrt(own / (2 - own))))


def varied(curve: Curve, random: np.random.Generator) -> Curve:
    """A curve like this one: error and exponent differ by a fifth or so, the odds of the lossless share by a third."""
    top, exponent, share = curve
    error, form, odds = np.exp(np.array([0.2, 0.2, 0.3]) * random.standard_normal(3))
    return (
        1 - (1 - top) * float(error),
        None if exponent is None else float(np.clip(exponent * form, 0.05, 3)),
        float(special.expit(special.logit(share) + np.log(odds))),
    )


def simulate(
    curves: dict[str, Curve], runs: int, plan: SearchPlan, root: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Searches on curves like these and all deviations, `runs` of them in all."""
    cases = list(itertools.product(curves, STDS))
    rows = []
    for run in range(runs):
        name, std = cases[run % len(cases)]
        random = np.random.default_rng([root, len(curves), run])
        truth = Truth(*varied(curves[name], random), std, random)
        search = Search(WHOLE, plan, truth.train)
        search.run()
        found, smallest = search.accepted or WHOLE, truth.smallest
        trainings = sum(len(own) for size, own in search.measured.items() if size != WHOLE)
        rows.append((name, std, found < smallest, found / smallest, search.accepted is None, trainings))
        if run % 100 == 99:
            tell(f"{run + 1} of {runs} searches")
    return {
        **_summary(rows),
        "mean_excess_error": round(float(np.std([row[3] for row in rows]) / np.sqrt(len(rows))), 4),
        "by_curve": {name: _summary([row for row in rows if row[0] == name]) for name in curves},
        "by_std": {f"{100 * std:g}": _summary([row for row in rows if row[1] == std]) for std in STDS},
    }


def _summary(rows: list[tuple[Any, ...]]) -> dict[str, float]:
    names = ("wrong_share", "mean_excess", "not_shown_share", "mean_trainings")
    return {name: round(float(np.mean([row[2 + at] for row in rows])), 4) for at, name in enumerate(names)}


def main(arguments: list[str] | None = None) -> None:
    """Runs the simulated searches and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="searches on curves like the measured ones")
    parser.add_argument("--hard_runs", type=int, default=240, help="searches on curves like those of the hard grid")
    parser.add_argument("--root", type=int, default=ROOT, help="seed of all draws")
    parser.add_argument("--out", type=Path, help="file for the JSON that is printed")
    given = parser.parse_args(arguments)
    plan = SearchPlan()
    found = simulate(MEASURED, given.runs, plan, given.root, print)
    found["hard"] = simulate(HARD, given.hard_runs, plan, given.root, print) if given.hard_runs else {}
    told = {
        "runs": given.runs,
        "root": given.root,
        "plan": dataclasses.asdict(plan),
        **found,
        "environment": run_environment(Accelerator(cpu=True)),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    if given.out:
        given.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
