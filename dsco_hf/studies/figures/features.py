"""The figure of features: what a small set is matched to, and what it reaches (figure 1 of arXiv 2603.27987)."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from safetensors import safe_open
from safetensors.torch import save_file

from ...concentration.methods import find_method
from ...evaluators import ImageSet, class_columns
from ...matching.discrepancy import embed_pixels
from ...matching.targets import MatchingTargets
from ...sampling.pipeline import DsCoPipeline
from ...utils.files import reading, whole
from .accuracy import FAINT, INK, save_figure, shorten


SHOWN_IMAGES = 5000
_PANEL_CLASSES = 4
_TITLE_WIDTH = 40  # characters that stand over a panel


@dataclass(frozen=True)
class Projection:
    """Features in the plane of their two principal axes: the means of all classes, or the images of one class.

    Attributes:
        names (`tuple[str, ...]`): the K classes.
        real (`torch.Tensor` of shape `(N, 2)`): real images.
        targets (`torch.Tensor` of shape `(K, 2)`): means of the real classes.
        sets (mapping of `str` to `torch.Tensor` of shape `(M, 2)`): by method, the means of the classes, NaN for one
            without an image, or, of one class, the images.
        shares (`tuple` of two `float`): of the variance, along the axes.
        numbers (mapping of `str` to `float`): MMD² to the class in the whole space, by method and for as many random
            real images; of all classes there are none.
    """

    names: tuple[str, ...]
    real: torch.Tensor
    targets: torch.Tensor
    sets: Mapping[str, torch.Tensor]
    shares: tuple[float, float]
    numbers: Mapping[str, float] = field(default_factory=dict)


def feature_figure(
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    classes: Sequence[int] | None = None,
    means: torch.Tensor | None = None,
) -> Path:
    """Draws target and surrogate features in the RKHS, projected to two dimensions by PCA of the real ones.

    On the left all classes with their means; on the right some classes alone, each with a PCA of its own. The numbers
    there are discrepancies in the whole space, of which a projection shows only a part. Beside the picture a
    safetensors file of its name keeps what is drawn, so that `recipes/figures.py` draws it again.

    Args:
        real (`tuple` of tensors `(N, D)` and `(N,)`): embedded features ψ(φ(x)) of real images, and their labels.
        sets (`dict` of such tuples): those of each small set, by method, for example `"plain"` and `"nopt"`.
        class_names (sequence of `str`): all classes, by label.
        path (`str` or `Path`): the PNG file to write.
        classes (sequence of `int`, *optional*): up to four labels to show alone; by default spread over those that
            occur in all sets.
        means (`torch.Tensor` of shape `(K, D)`, *optional*): of the classes, where `real` is a part of their images.

    Raises:
        ValueError: if a tensor has the wrong shape, or fewer than three real images are given.
    """
    projections = project_features(real, sets, class_names, classes=classes, means=means)
    save_projections(projections, Path(path).with_suffix(".safetensors"))
    return save_figure(draw_features(projections), path)


def project_features(
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    class_names: Sequence[str],
    *,
    classes: Sequence[int] | None = None,
    means: torch.Tensor | None = None,
) -> list[Projection]:
    """All classes, then some alone; features `(N, D)` with labels `(N,)`, arguments as for [`feature_figure`]."""
    _check_features(real, sets)
    common = set(real[1].tolist()).intersection(*(labels.tolist() for _, labels in sets.values()))
    if classes is None:
        present = sorted(common)
        picks = np.linspace(0, len(present) - 1, min(_PANEL_CLASSES, len(present))).round().astype(int)
        classes = [present[i] for i in dict.fromkeys(picks.tolist())]
    if means is None:
        each = (real[0][real[1] == label] for label in range(len(class_names)))
        means = torch.stack([own.mean(0) for own in each])  # NaN without an image
    alone = [_project_class(real, sets, label, class_names[label], means[label]) for label in classes[:_PANEL_CLASSES]]
    return [_project_all(real, sets, class_names, means), *alone]


def _project_all(
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    class_names: Sequence[str],
    targets: torch.Tensor,
) -> Projection:
    center, directions, shares = _projection(_subsample(real[0], 2000))
    labels = sorted(set(real[1].tolist()))

    def projected(features: torch.Tensor) -> torch.Tensor:
        return ((features - center) @ directions).cpu()

    shown = {
        method: projected(torch.stack([features[own == label].mean(0) for label in labels]))  # NaN without an image
        for method, (features, own) in sets.items()
    }
    names = tuple(shorten(class_names[label], 14) for label in labels)
    return Projection(names, projected(_subsample(real[0], 4000)), projected(targets[labels]), shown, shares)


def _project_class(
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    label: int,
    name: str,
    mean: torch.Tensor,
) -> Projection:
    features, numbers = real[0][real[1] == label], {}
    center, directions, shares = _projection(_subsample(features, 2000))
    points, target = (((one - center) @ directions).cpu() for one in (_subsample(features, 1500), mean[None]))
    chosen = {method: theirs[own == label] for method, (theirs, own) in sets.items()}
    for method, own in chosen.items():
        numbers[method] = float((own.mean(0) - mean).square().sum())
    counts = dict.fromkeys(len(own) for own in chosen.values())
    for count in counts:  # as many random real images beside them
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(label))[:count]
        told = f"random real{f' ({count})' if len(counts) > 1 else ''}"
        numbers[told] = float((features[order].mean(dim=0) - mean).square().sum())
    shown = {method: ((own - center) @ directions).cpu() for method, own in chosen.items()}
    return Projection((name,), points, target, shown, shares, numbers)


def save_projections(projections: Sequence[Projection], path: Path) -> None:
    """Writes a small safetensors file, whole or absent."""
    tensors: dict[str, torch.Tensor] = {}
    told = []
    for place, one in enumerate(projections):
        tensors |= {f"{place}/real": one.real, f"{place}/targets": one.targets}
        tensors |= {f"{place}/sets/{name}": points for name, points in one.sets.items()}
        told.append({"names": one.names, "shares": one.shares, "numbers": one.numbers, "sets": list(one.sets)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"told": json.dumps(told)})


def load_projections(path: Path) -> list[Projection]:
    """What [`save_projections`] wrote.

    Raises:
        FileNotFoundError: if it is not there.
        DamagedFileError: if it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the study again, which writes it.")
    found = []
    with reading(path, "Delete it, and run the study again."), safe_open(path, framework="pt") as file:
        for place, told in enumerate(json.loads((file.metadata() or {})["told"])):
            sets = {name: file.get_tensor(f"{place}/sets/{name}") for name in told["sets"]}
            real, targets = (file.get_tensor(f"{place}/{name}") for name in ("real", "targets"))
            found.append(Projection(tuple(told["names"]), real, targets, sets, told["shares"], told["numbers"]))
    return found


def draw_features(projections: Sequence[Projection]) -> Figure:
    """The figure of [`feature_figure`]: all classes, and beside them some alone."""
    figure = Figure(figsize=(11, 5.6), dpi=170, layout="constrained")
    grid = figure.add_gridspec(2, 4)
    _draw_all_classes(figure.add_subplot(grid[:, :2]), projections[0])
    for place, one in enumerate(projections[1:]):
        _draw_class(figure.add_subplot(grid[place // 2, 2 + place % 2]), one)
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return figure


def draw_study_features(
    train: ImageSet, sets: Mapping[str, ImageSet], pipe: DsCoPipeline, targets: MatchingTargets, path: str | Path
) -> Path:
    """Draws real images and small sets as the targets see them, see [`feature_figure`].

    Args:
        train (`ImageSet`): the real images, of which at most `SHOWN_IMAGES` are asked for; means are the targets'.
        sets (mapping of `str` to `ImageSet`): by method.
        pipe (`DsCoPipeline`): with the networks of the targets.
        targets (`MatchingTargets`): give the embedding.
        path (`str` or `Path`): the PNG file to write.
    """
    part = train.select(_subsample(torch.arange(len(train.labels)), SHOWN_IMAGES))
    real, *points = [(embed_pixels(own.pixels, pipe, targets), own.labels) for own in (part, *sets.values())]
    means = targets.embeddings[class_columns(train.names, targets.class_names, what="the targets")]
    return feature_figure(real, dict(zip(sets, points, strict=True)), train.names, path, means=means)


def _check_features(
    real: tuple[torch.Tensor, torch.Tensor], sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    if len(real[1]) < 3:
        raise ValueError(f"At least three real images are needed for a projection, got {len(real[1])}.")
    for name, (features, labels) in {"real": real, **sets}.items():
        if features.ndim != 2 or labels.shape != features.shape[:1] or features.shape[1] != real[0].shape[1]:
            raise ValueError(
                f"Features of {name!r} have shape {tuple(features.shape)} with labels {tuple(labels.shape)}; expected "
                f"(N, {real[0].shape[-1]}) and (N,)."
            )


def _projection(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """Mean, the two principal axes `(D, 2)` and their shares of the variance of features `(N, D)`.

    Signs are fixed, so that the pictures of two runs look alike.
    """
    center = features.mean(dim=0)
    _, deviations, axes = torch.linalg.svd((features - center).double(), full_matrices=False)
    shares = (deviations.square() / deviations.square().sum().clamp_min(1e-30))[:2].tolist()
    axes = axes[:2]
    if len(axes) < 2:  # a single image
        axes = torch.nn.functional.pad(axes, (0, 0, 0, 2 - len(axes)))
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    return center, (axes * torch.where(largest < 0, -1.0, 1.0)).T.to(features.dtype), (shares[0], [*shares, 0.0][1])


def _scatter(axes: Axes, points: torch.Tensor, **style: Any) -> None:
    """Points of shape (2,) or (n, 2)."""
    x, y = points.reshape(-1, 2).T.numpy()
    axes.scatter(x, y, **style)


def _draw_all_classes(axes: Axes, all_classes: Projection) -> None:
    _scatter(axes, all_classes.real, s=5, color=FAINT, linewidths=0, zorder=1)
    shown = []  # where points are that a name is not to hide
    for place, target in enumerate(all_classes.targets):
        for method, means in all_classes.sets.items():
            mean, style = means[place], find_method(method)
            if mean.isfinite().all():
                axes.plot(
                    *zip(target.tolist(), mean.tolist(), strict=True), color=style.color, linewidth=1.4, zorder=3
                )
                _scatter(axes, mean, s=46, marker=style.marker, color=style.color, edgecolors="white", zorder=4)
                shown.append(mean)
        _scatter(axes, target, s=52, marker="x", color=INK, linewidths=1.8, zorder=5)
    _bare(axes, all_classes.shares)
    _name_points(axes, dict(zip(all_classes.names, all_classes.targets, strict=True)), shown)
    axes.set_title("all classes: means of the small sets and of the real classes", loc="left", fontsize=10)


def _name_points(axes: Axes, named: Mapping[str, torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """Writes names beside points of shape (2,), each in the nearest place where it lies on no point and no name."""
    low, high = np.array(axes.get_xlim()), np.array(axes.get_ylim())
    box = axes.get_window_extent()
    scale = 72 / axes.figure.dpi * np.array([box.width / np.ptp(low), box.height / np.ptp(high)])  # data to points
    # Centres and half sizes of what is there already: marks, then names.
    taken = [(point.numpy() * scale, np.array([5.0, 5.0])) for point in (*named.values(), *others)]
    sides = [(math.cos(angle), math.sin(angle)) for angle in np.arange(0.25, 2.25, 0.25) * math.pi]
    for name, point in named.items():
        size = np.array([3.2 * len(name) + 1, 6.5])
        shifts = [np.multiply(side, size + 6) * ring for ring in (1.0, 1.7, 2.4) for side in sides]
        room = [
            min(float((np.abs(point.numpy() * scale + shift - center) - size - half).max()) for center, half in taken)
            for shift in shifts
        ]
        best = next((place for place, gap in enumerate(room) if gap >= 0), int(np.argmax(room)))
        taken.append((point.numpy() * scale + shifts[best], size))
        axes.annotate(
            name,
            (float(point[0]), float(point[1])),
            xytext=tuple(shifts[best].tolist()),
            ha="center",
            va="center",
            textcoords="offset points",
            fontsize=9,
            weight="bold",
            color=INK,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # a box would hide points
        )


def _draw_class(axes: Axes, one: Projection) -> None:
    _scatter(axes, one.real, s=9, color="#c4c4c4", linewidths=0, zorder=1, label="real images")
    for method, points in one.sets.items():
        style = find_method(method)
        _scatter(axes, points, s=26, marker=style.marker, color=style.color, edgecolors=INK, linewidths=0.4, zorder=3)
        _scatter(
            axes,
            points.mean(dim=0),
            s=110,
            marker=style.marker,
            color=style.color,
            edgecolors=INK,
            zorder=5,
            label=f"{style.label}, mean",
        )
    _scatter(axes, one.targets, s=90, marker="x", color=INK, linewidths=2.2, zorder=6, label="target: real mean")
    numbers = [f"{find_method(name).label} {value:.2g}" for name, value in one.numbers.items()]
    unbroken = [number.replace(" ", "\N{NO-BREAK SPACE}") for number in numbers]
    told = textwrap.fill(f"MMD²: {', '.join(unbroken)}", width=_TITLE_WIDTH)
    axes.set_title(f"class {shorten(one.names[0], 30)}\n{told}", loc="left", fontsize=8.5)
    _bare(axes, one.shares)


def _subsample(values: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` rows, evenly spread."""
    return values if len(values) <= count else values[torch.linspace(0, len(values) - 1, count).long()]


def _bare(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"first component, {100 * shares[0]:.0f} % of the variance", fontsize=8, color="#666666")
    axes.set_ylabel(f"second, {100 * shares[1]:.0f} %", fontsize=8, color="#666666")
    axes.margins(0.08)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
