"""Figures and tables of a run, made from `results.json` and tensors and never typed.

Figures follow those of "Beyond Dataset Distillation" (arXiv 2603.27987): features in the RKHS (its figure 1), accuracy
against images per class (3), samples side by side (5). Colours and markers of the methods are those of
`dsco_hf.methods`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from .methods import find_method, find_methods, in_order


_INK, _FAINT = "#222222", "#d9d9d9"
_PANEL_CLASSES = 4


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


# --- samples


def sample_grid(
    rows: Mapping[str, torch.Tensor], class_names: Sequence[str], path: str | Path, *, cell_size: int = 48
) -> Path:
    """Draws images of every method and class side by side: a band per method, a column per class.

    Args:
        rows (`dict[str, torch.Tensor]`): for each method, named as in results.json or freely, images of shape
            `(K, n, C, H, W)` in [-1, 1]: n of each of the K classes. All with the same K; n may differ.
        class_names (sequence of K `str`): the columns' titles.
        path (`str` or `Path`): the PNG file to write.
        cell_size (`int`): smallest side of an image on paper, in points; small images are enlarged by a whole factor,
            pixel by pixel.

    Raises:
        ValueError: if there is nothing to draw, or shapes and names do not fit.
    """
    _check_rows(rows, class_names)
    side = next(iter(rows.values())).shape[-1]
    scale = max(1, math.ceil(cell_size / side))
    bands = {method: _band(images, scale) for method, images in rows.items()}
    gap, left, top = 14, 128, 30
    height = sum(band.shape[0] for band in bands.values()) + gap * (len(bands) - 1)
    width = next(iter(bands.values())).shape[1]
    canvas_width, canvas_height = left + width + 8, top + height + 8
    figure = Figure(figsize=(canvas_width / 100, canvas_height / 100), dpi=200, facecolor="white")
    offset = top
    for method, band in bands.items():
        box = (left, canvas_height - offset - band.shape[0], width, band.shape[0])
        unit = (canvas_width, canvas_height, canvas_width, canvas_height)
        axes = figure.add_axes(tuple(value / whole for value, whole in zip(box, unit, strict=True)))
        axes.imshow(band, interpolation="nearest", aspect="auto")
        axes.axis("off")
        middle = 1 - (offset + band.shape[0] / 2) / canvas_height
        text: dict[str, Any] = {"fontsize": 8.5, "color": _INK, "va": "center"}
        weight = "bold" if find_method(method).emphasis else "normal"
        figure.text(
            (left - 10) / canvas_width, middle, _wrap(find_method(method).label), ha="right", weight=weight, **text
        )
        offset += band.shape[0] + gap
    column = width / len(class_names)
    names = [_shorten(name, max(3, int(column / 5))) for name in class_names]
    # A character is about 0.6 as wide as its font is large; the longest name is to leave a gap beside it.
    size = min(8.5, column * 0.72 / (0.6 * (max(map(len, names)) + 1)))
    for index, name in enumerate(names):
        figure.text(
            (left + column * (index + 0.5)) / canvas_width,
            1 - (top - 12) / canvas_height,
            name,
            ha="center",
            va="center",
            fontsize=size,
            color=_INK,
        )
    return _save(figure, path)


def _check_rows(rows: Mapping[str, torch.Tensor], class_names: Sequence[str]) -> None:
    if not rows or not class_names:
        raise ValueError("There is nothing to draw: give at least one method and one class.")
    for method, images in rows.items():
        if images.ndim != 5 or images.shape[0] != len(class_names) or images.shape[2] not in (1, 3):
            raise ValueError(
                f"Images of {method!r} have shape {tuple(images.shape)}; expected (K, n, C, H, W) with "
                f"K = {len(class_names)}, the number of class names, and 1 or 3 channels."
            )
        if images.shape[1] == 0:
            raise ValueError(f"Images of {method!r}: there is no image per class to draw.")


def _band(images: torch.Tensor, scale: int) -> np.ndarray:
    """A method's images as one picture `(H, W, 3)` in [0, 1]: classes from left to right, images downwards."""
    images = images.detach().float().cpu().add(1).div(2).clamp(0, 1)
    images = images.expand(-1, -1, 3, -1, -1) if images.shape[2] == 1 else images
    images = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    images = torch.nn.functional.pad(images, (4, 4, 2, 2), value=1.0)  # white between neighbours
    classes, count, _, height, width = images.shape
    return images.permute(1, 3, 0, 4, 2).reshape(count * height, classes * width, 3).numpy()


def _shorten(name: str, length: int) -> str:
    first = name.split(",")[0].strip()
    return first if len(first) <= length else first[: length - 1].rstrip() + "…"


def _wrap(label: str) -> str:
    return label.replace(", ", ",\n") if len(label) > 16 else label


# --- accuracy


def accuracy_figure(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draws test accuracy against images per class for all methods, with the full-data line.

    The accuracy axis is spaced by the logarithm of the error, so that 99.5 and 99.8 % are as easy to tell apart as 95
    and 98 %. Error bars are one standard deviation over all runs of a row.

    Args:
        results (`dict`): content of results.json: `full`, and `rows` with `method`, `images_per_class`,
            `accuracy_mean` and `accuracy_std` (fractions).
        path (`str` or `Path`): the PNG file to write.

    Raises:
        ValueError: if `results` has no rows.
    """
    rows = _rows(results)
    methods = _methods(rows)
    figure = Figure(figsize=(7.2, 4.6), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    styles = find_methods(methods)
    for place, (method, style) in enumerate(styles.items()):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["images_per_class"])
        shift = 1.018 ** (place - (len(methods) - 1) / 2)  # keeps error bars of neighbours apart
        axes.errorbar(
            [row["images_per_class"] * shift for row in points],
            [row["accuracy_mean"] for row in points],
            yerr=[row.get("accuracy_std") or 0.0 for row in points],
            label=style.label,
            color=style.color,
            marker=style.marker,
            markersize={"*": 11, "P": 8, "X": 8}.get(style.marker, 6),
            markeredgecolor="white",
            markeredgewidth=0.7,
            linewidth=2.2 if style.emphasis else 1.3,
            linestyle="-" if style.emphasis else (0, (5, 1.5)),
            elinewidth=1.0,
            capsize=2.5,
            zorder=4 if style.emphasis else 3,
        )
    budgets = sorted({row["images_per_class"] for row in rows})
    _draw_full_line(axes, results.get("full"))
    axes.set_xscale("log")
    axes.set_xlim(budgets[0] / 1.25, budgets[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_major_formatter(FixedFormatter([str(budget) for budget in budgets]))
    axes.xaxis.set_minor_locator(NullLocator())
    _space_by_error(axes, [*rows, *([results["full"]] if results.get("full") else [])])
    axes.set_xlabel("images per class")
    axes.set_ylabel("test accuracy (%, spaced by error)")
    axes.set_title(
        f"{results.get('dataset', 'dataset')}: trained from scratch on the small set", loc="left", fontsize=10.5
    )
    containers: Any = axes.containers
    lines = [container.lines[0] for container in containers]  # without error bars
    labels = [style.label for style in styles.values()]
    axes.legend(lines, labels, loc="lower right", fontsize=8.5, framealpha=0.95, edgecolor=_FAINT, handlelength=3)
    _tidy(axes)
    return _save(figure, path)


def _draw_full_line(axes: Axes, full: Mapping[str, Any] | None) -> None:
    if not full:
        return
    mean, std = full["accuracy_mean"], full.get("accuracy_std") or 0.0
    axes.axhspan(mean - std, min(mean + std, 1.0), color=_INK, alpha=0.07, linewidth=0)
    images = f", {full['images']:,} images" if full.get("images") else ""
    axes.axhline(mean, color=_INK, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=2)
    axes.annotate(
        f"all data{images}: {100 * mean:.2f} %",
        (0.012, mean),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, -4),
        textcoords="offset points",
        va="top",
        fontsize=8.5,
        color=_INK,
    )


def _space_by_error(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Scales the axis by -log(1 - accuracy), cut off at the best accuracy that was seen."""
    best = max(row["accuracy_mean"] for row in rows)
    worst = min(row["accuracy_mean"] - (row.get("accuracy_std") or 0.0) for row in rows)
    floor = max((1 - best) / 1.7, 5e-4)  # the smallest error on the axis
    axes.set_yscale(
        "function", functions=(lambda a: -np.log(np.maximum(1 - np.asarray(a), floor / 4)), lambda t: 1 - np.exp(-t))
    )
    axes.set_ylim(max(0.0, 1 - (1 - worst) * 1.08), 1 - floor)
    ticks = [0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 99.5, 99.8, 99.9]
    low, high = (100 * limit for limit in axes.get_ylim())
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.yaxis.set_major_locator(FixedLocator([tick / 100 for tick in shown]))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in shown]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = list(results.get("rows") or [])
    if not rows:
        raise ValueError("The results have no rows: nothing has been evaluated yet.")
    return rows


def _methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return in_order(row["method"] for row in rows)


# --- features


def feature_figure(
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    class_names: Sequence[str],
    path: str | Path,
    *,
    classes: Sequence[int] | None = None,
) -> Path:
    """Draws target and surrogate features in the RKHS, projected to two dimensions by PCA of the real ones.

    On the left all classes with their means; on the right some classes alone, each with a PCA of its own. The numbers
    there are discrepancies in the whole space, of which a projection shows only a part.

    Args:
        real (`tuple` of tensors `(N, D)` and `(N,)`): embedded features ψ(φ(x)) of real images, and their labels.
        sets (`dict` of such tuples): those of each small set, by method, for example `"plain"` and `"nopt"`.
        class_names (sequence of `str`): all classes, by label.
        path (`str` or `Path`): the PNG file to write.
        classes (sequence of `int`, *optional*): up to four labels to show alone; by default spread over those that
            occur in all sets.

    Raises:
        ValueError: if a tensor has the wrong shape, or fewer than three real images are given.
    """
    _check_features(real, sets)
    common = set(real[1].tolist()).intersection(*(labels.tolist() for _, labels in sets.values()))
    if classes is None:
        present = sorted(common)
        picks = np.linspace(0, len(present) - 1, min(_PANEL_CLASSES, len(present))).round().astype(int)
        classes = [present[i] for i in dict.fromkeys(picks.tolist())]
    figure = Figure(figsize=(11, 5.6), dpi=170, layout="constrained")
    grid = figure.add_gridspec(2, 4)
    _draw_all_classes(figure.add_subplot(grid[:, :2]), real, sets, class_names)
    for place, label in enumerate(classes[:_PANEL_CLASSES]):
        axes = figure.add_subplot(grid[place // 2, 2 + place % 2])
        _draw_class(axes, real, sets, label, class_names[label])
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    return _save(figure, path)


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


def _projection(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
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
    return center, (axes * torch.where(largest < 0, -1.0, 1.0)).T.to(features.dtype), [*shares, 0.0][:2]


def _scatter(axes: Axes, points: torch.Tensor, **style: Any) -> None:
    """Points of shape (2,) or (n, 2)."""
    x, y = points.reshape(-1, 2).T.numpy()
    axes.scatter(x, y, **style)


def _draw_all_classes(
    axes: Axes,
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    class_names: Sequence[str],
) -> None:
    center, directions, shares = _projection(_subsample(real[0], 2000))
    points = ((real[0] - center) @ directions).cpu()
    labels = real[1].cpu()
    _scatter(axes, _subsample(points, 4000), s=5, color=_FAINT, linewidths=0, zorder=1)
    for label in sorted(set(labels.tolist())):
        target, drawn = points[labels == label].mean(dim=0), 0.0
        for method, (features, own) in sets.items():
            if (own == label).any():
                mean = ((features[own == label].mean(dim=0) - center) @ directions).cpu()
                style, drawn = find_method(method), drawn + float(mean[0] - target[0])
                axes.plot(
                    *zip(target.tolist(), mean.tolist(), strict=True), color=style.color, linewidth=1.4, zorder=3
                )
                _scatter(axes, mean, s=46, marker=style.marker, color=style.color, edgecolors="white", zorder=4)
        _scatter(axes, target, s=52, marker="x", color=_INK, linewidths=1.8, zorder=5)
        axes.annotate(
            _shorten(class_names[label], 14),
            (float(target[0]), float(target[1])),
            xytext=(-8 if drawn > 0 else 8, 7),  # on the side where fewer points are
            ha="right" if drawn > 0 else "left",
            textcoords="offset points",
            fontsize=9,
            weight="bold",
            color=_INK,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],  # a box would hide points
        )
    axes.set_title("all classes: means of the small sets and of the real classes", loc="left", fontsize=10)
    _bare(axes, shares)


def _draw_class(
    axes: Axes,
    real: tuple[torch.Tensor, torch.Tensor],
    sets: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    label: int,
    name: str,
) -> None:
    features = real[0][real[1] == label]
    center, directions, shares = _projection(_subsample(features, 2000))
    points = ((features - center) @ directions).cpu()
    _scatter(axes, _subsample(points, 1500), s=9, color="#c4c4c4", linewidths=0, zorder=1, label="real images")
    numbers = []
    for method, (theirs, own) in sets.items():
        style = find_method(method)
        chosen = theirs[own == label]
        discrepancy = float((chosen.mean(dim=0) - features.mean(dim=0)).square().sum())
        numbers.append(f"{style.label} {discrepancy:.2g}")
        projected = ((chosen - center) @ directions).cpu()
        mean = projected.mean(dim=0)
        _scatter(axes, projected, s=26, marker=style.marker, color=style.color, alpha=0.75, linewidths=0, zorder=3)
        _scatter(
            axes,
            mean,
            s=110,
            marker=style.marker,
            color=style.color,
            edgecolors=_INK,
            zorder=5,
            label=f"{style.label}, mean",
        )
    _scatter(
        axes, points.mean(dim=0), s=90, marker="x", color=_INK, linewidths=2.2, zorder=6, label="target: real mean"
    )
    axes.set_title(f"class {_shorten(name, 30)}\nMMD²: {', '.join(numbers)}", loc="left", fontsize=8.5)
    _bare(axes, shares)


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
        spine.set_color(_FAINT)


# --- tables


def results_table(results: Mapping[str, Any]) -> str:
    """A Markdown table of all methods and budgets: accuracy in percent (mean ± std), discrepancy in brackets, seconds.

    Args:
        results (`dict`): content of results.json.

    Raises:
        ValueError: if `results` has no rows.
    """
    rows = _rows(results)
    budgets = sorted({row["images_per_class"] for row in rows})
    lines = [
        "| method | " + " | ".join(f"{budget} per class" for budget in budgets) + " | synthesis |",
        "| --- |" + " --- |" * len(budgets) + " --- |",
    ]
    for method in _methods(rows):
        own = {row["images_per_class"]: row for row in rows if row["method"] == method}
        cells = [_cell(own[budget]) if budget in own else "–" for budget in budgets]
        label = find_method(method).label
        lines.append(
            f"| {f'**{label}**' if find_method(method).emphasis else label} | {' | '.join(cells)} | {_cost(own)} |"
        )
    if full := results.get("full"):
        spread = f" ± {100 * full['accuracy_std']:.2f}" if full.get("accuracy_std") is not None else ""
        images = f" ({full['images']:,} images)" if full.get("images") else ""
        lines += ["", f"All training data{images}: {100 * full['accuracy_mean']:.2f}{spread} %."]
    lines += [
        "",
        "Test accuracy in %, mean ± standard deviation over synthesis and training seeds, last epoch. In brackets: "
        "squared MMD to the real classes, lower is better. Synthesis: time at the largest budget that has one.",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any]) -> str:
    text = f"{100 * row['accuracy_mean']:.2f}"
    if row.get("accuracy_std") is not None:
        text += f" ± {100 * row['accuracy_std']:.2f}"
    if row.get("discrepancy") is not None:
        text += f" ({row['discrepancy']:.2g})"
    return text


def _cost(own: Mapping[int, Mapping[str, Any]]) -> str:
    timed = [budget for budget, row in own.items() if row.get("seconds")]
    if not timed:
        return "–"
    budget = max(timed)
    return f"{own[budget]['seconds']:.1f} s at {budget}"
