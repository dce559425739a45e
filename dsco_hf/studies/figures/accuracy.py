"""Figures of a run, made from `results.json` and tensors and never typed.

Figures follow those of "Beyond Dataset Distillation" (arXiv 2603.27987): accuracy against images per class (its figure
3) and samples side by side (5); features in the RKHS (1) are in `features`. Colours and markers of the
methods are those of `dsco_hf.concentration.methods`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike
from safetensors import safe_open
from safetensors.torch import save_file

from ...concentration.methods import (
    Method,
    chance_level,
    dataset_title,
    find_method,
    find_methods,
    in_order,
    network_title,
)
from ...data.images import from_levels, to_levels, to_unit
from ...evaluators import ImageSet
from ...sampling.peers import PEERS
from ...utils.files import reading, whole
from ...utils.markdown import format_number


INK, FAINT = "#222222", "#d9d9d9"
SAMPLE_SIDE = 128  # px, of images that are kept for a figure
# How far an error bar may reach downwards and upwards: an accuracy lies in [0, 1].
_ROOM = (lambda row: row["accuracy_mean"], lambda row: 1 - row["accuracy_mean"])


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a PNG or, if it is called so, a PDF file that is the same each time; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    kind = "pdf" if path.suffix == ".pdf" else "png"
    figure.savefig(path, format=kind, metadata={"CreationDate": None} if kind == "pdf" else {"Software": None})
    return path


# --- tables as text


def _finite(value: object) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def accuracy_table(results: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The rows of the accuracy table, as text, from the content of a `results.json`.

    It has `rows` with `method`, `images_per_class`, `images`, `accuracy_mean`, `accuracy_std`, `synthesis_seeds`,
    `training_seeds`, `discrepancy`, `seconds`, and `full`, the same of all data. Accuracies are fractions in [0, 1].

    Raises:
        ValueError: If an accuracy is not a fraction.
    """
    if not results:
        return []
    full = results.get("full") or {}
    rows = results.get("rows") or []
    order = in_order(str(row.get("method")) for row in rows)
    place = {name: number for number, name in enumerate(order)}
    rows = sorted(
        rows, key=lambda row: [row.get("images_per_class") or 0, row.get("images") or 0, place[str(row.get("method"))]]
    )
    if full:
        rows = [*rows, {"method": "all real data", "training_seeds": full.get("seeds"), **full}]
    table = []
    for row in rows:
        mean, reference = _finite(row.get("accuracy_mean")), _finite(full.get("accuracy_mean"))
        if mean is not None and not 0 <= mean <= 1:
            raise ValueError(
                f"accuracy_mean of method {row.get('method')!r} is {mean}, but accuracies in results are fractions "
                "in [0, 1]. Divide percentages by 100."
            )
        kept = mean / reference if mean is not None and reference else None
        runs = (row.get("synthesis_seeds") or 1) * (row.get("training_seeds") or 0)
        table.append(
            {
                "method": find_method(str(row.get("method"))).label,
                "images_per_class": format_number(row.get("images_per_class")),
                "images": format_number(row.get("images")),
                "accuracy": f"{format_number(mean, scale=100)} ± {format_number(row.get('accuracy_std'), scale=100)}",
                "retention": format_number(kept, digits=1, scale=100),
                "discrepancy": format_number(row.get("discrepancy"), digits=4),
                "random_discrepancy": format_number(_random_beside(row, rows), digits=4),
                "seconds": format_number(row.get("seconds") or None, digits=1),  # real images are not drawn
                "runs": format_number(runs) if runs else "–",
            }
        )
    return table


def _random_beside(row: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The discrepancy of as many random real images: of the row itself, or of the row of those."""
    if row.get("discrepancy") is None or row.get("random_discrepancy") is not None:
        return row.get("random_discrepancy")
    same = (other for other in rows if other.get("images_per_class") == row.get("images_per_class"))
    return next((other.get("discrepancy") for other in same if other.get("method") == "random"), None)


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
    return save_figure(draw_samples(rows, class_names, cell_size=cell_size), path)


def draw_samples(rows: Mapping[str, torch.Tensor], class_names: Sequence[str], *, cell_size: int = 48) -> Figure:
    """The figure of [`sample_grid`]; images `(K, n, C, H, W)` and other arguments as there."""
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
        text: dict[str, Any] = {"fontsize": 8.5, "color": INK, "va": "center"}
        weight = "bold" if find_method(method).emphasis else "normal"
        figure.text(
            (left - 10) / canvas_width, middle, _wrap(find_method(method).label), ha="right", weight=weight, **text
        )
        offset += band.shape[0] + gap
    column = width / len(class_names)
    names = [shorten(name, max(3, int(column / 5))) for name in class_names]
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
            color=INK,
        )
    return figure


def draw_study_samples(sets: Mapping[str, ImageSet], images_per_class: int, path: str | Path) -> Path:
    """Draws real, plain, concentrated and data-free images of up to ten classes side by side, and those of peers.

    Of the first seed; four of a class, or two where there are peers.

    Beside the picture a safetensors file of its name keeps the images, large ones at `SAMPLE_SIDE` pixels, so that
    `recipes/figures.py` draws them again.

    Args:
        sets (mapping of `str` to [`~dsco_hf.evaluators.ImageSet`]): by [`~dsco_hf.studies.plans.set_name`]; those
            that are there are shown.
        images_per_class (`int`): of the sets to show.
        path (`str` or `Path`): the PNG file to write.
    """
    methods = {"real": "random", "plain": "plain", "nopt": "nopt", "nopt-data-free": "nopt-data-free"}
    methods |= {peer: peer for peer in PEERS}
    found = {title: sets.get(f"{method}-ipc{images_per_class}-seed0") for title, method in methods.items()}
    there = {title: images for title, images in found.items() if images is not None}
    names = next(iter(there.values())).names[:10]
    count = 2 if there.keys() & PEERS.keys() else 4
    grid = {title: images.first_of(range(len(names)), count) for title, images in there.items()}
    save_samples(grid, names, Path(path).with_suffix(".safetensors"))
    return sample_grid(grid, names, path)


def save_samples(rows: Mapping[str, torch.Tensor], class_names: Sequence[str], path: Path) -> None:
    """Writes images `(K, n, C, H, W)` in [-1, 1] by method, as uint8, to a small safetensors file, whole or absent."""
    tensors = {}
    for name, images in rows.items():
        if images.shape[-1] > SAMPLE_SIDE:
            small = torch.nn.functional.interpolate(images.flatten(0, 1), size=SAMPLE_SIDE, mode="area")
            images = small.unflatten(0, images.shape[:2])
        tensors[name] = to_levels(images).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file(tensors, partial, {"told": json.dumps({"methods": list(rows), "classes": list(class_names)})})


def load_samples(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What [`save_samples`] wrote: images `(K, n, C, H, W)` in [-1, 1] by method, and the classes.

    Raises:
        FileNotFoundError: if it is not there.
        DamagedFileError: if it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the study again, which writes it.")
    with reading(path, "Delete it, and run the study again."), safe_open(path, framework="pt") as file:
        told = json.loads((file.metadata() or {})["told"])
        return {name: from_levels(file.get_tensor(name)) for name in told["methods"]}, told["classes"]


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
    images = to_unit(images.detach().float().cpu()).clamp(0, 1)
    images = images.expand(-1, -1, 3, -1, -1) if images.shape[2] == 1 else images
    images = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    images = torch.nn.functional.pad(images, (4, 4, 2, 2), value=1.0)  # white between neighbours
    classes, count, _, height, width = images.shape
    return images.permute(1, 3, 0, 4, 2).reshape(count * height, classes * width, 3).numpy()


def shorten(name: str, length: int) -> str:
    """The first of several names of a class, cut to a length."""
    first = name.split(",")[0].strip()
    return first if len(first) <= length else first[: length - 1].rstrip() + "…"


def _wrap(label: str) -> str:
    return label.replace(", ", ",\n") if len(label) > 16 else label


# --- accuracy


def accuracy_figure(results: Mapping[str, Any], path: str | Path) -> Path:
    """Draws test accuracy against images per class for all methods, with lines for all data and for chance.

    The accuracy axis is spaced by the logarithm of the error, so that 99.5 and 99.8 % are as easy to tell apart as 95
    and 98 %. Error bars are one standard deviation over all runs of a row.

    Args:
        results (`dict`): content of results.json: `full`, and `rows` with `method`, `images_per_class`,
            `accuracy_mean` and `accuracy_std` (fractions); the chance level follows from `classes`, or from `images`
            of the rows.
        path (`str` or `Path`): the PNG file to write.

    Raises:
        ValueError: if `results` has no rows.
    """
    return save_figure(draw_accuracy(results), path)


def line_style(style: Method) -> dict[str, Any]:
    """How all figures draw a method's line: ours bold and whole, others dashed."""
    return {
        "label": style.label, "color": style.color, "marker": style.marker, "markeredgecolor": "white",
        "markeredgewidth": 0.7, "markersize": {"*": 11, "P": 8, "X": 8}.get(style.marker, 6),
        "linewidth": 2.2 if style.emphasis else 1.3, "linestyle": "-" if style.emphasis else (0, (5, 1.5)),
        "zorder": 4 if style.emphasis else 3,
    }  # fmt: skip


def draw_accuracy(results: Mapping[str, Any]) -> Figure:
    """The figure that `accuracy_figure` writes; its legend and the names of its lines stand outside of the axes."""
    rows = list(results.get("rows") or [])
    if not rows:
        raise ValueError("The results have no rows: nothing has been evaluated yet.")
    styles = find_methods(row["method"] for row in rows)
    figure = Figure(figsize=(7.2, 5.0), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    for place, (method, style) in enumerate(styles.items()):
        points = sorted((row for row in rows if row["method"] == method), key=lambda row: row["images_per_class"])
        shift = 1.018 ** (place - (len(styles) - 1) / 2)  # keeps error bars of neighbours apart
        axes.errorbar(
            [row["images_per_class"] * shift for row in points],
            [row["accuracy_mean"] for row in points],
            yerr=[[min(row.get("accuracy_std") or 0.0, end(row)) for row in points] for end in _ROOM],
            **line_style(style),
            elinewidth=1.0,
            capsize=2.5,
        )
    chance, full = chance_level(results), results.get("full")
    _space_by_error(axes, [*rows, *([full] if full else []), *([{"accuracy_mean": chance}] if chance else [])])
    _draw_levels(axes, full, chance)
    space_by_budget(axes, sorted({row["images_per_class"] for row in rows}))
    axes.set_xlabel("images per class")
    axes.set_ylabel("test accuracy (%, spaced by error)")
    shared = str((results.get("config") or {}).get("architecture") or "")
    networks = {str(row.get("architecture") or shared) for row in rows}
    network = network_title(networks.pop() if len(networks) == 1 else "") or "networks"
    axes.set_title(
        f"{dataset_title(results)}: {network} trained from scratch on small sets", loc="left", fontsize=10.5
    )
    lines = [bars.lines[0] for bars in axes.containers if isinstance(bars, ErrorbarContainer)]  # without their bars
    labels = [style.label for style in styles.values()]
    figure.legend(
        lines,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4),
        fontsize=8.5,
        frameon=False,
        handlelength=3,
    )
    tidy(axes)
    return figure


def _draw_levels(axes: Axes, full: Mapping[str, Any] | None, chance: float | None) -> None:
    """Lines of all data and of chance, named in the right margin, where no points are."""
    levels = {}
    if full:
        mean, std = full["accuracy_mean"], full.get("accuracy_std") or 0.0
        axes.axhspan(mean - std, min(mean + std, 1.0), color=INK, alpha=0.07, linewidth=0)
        images = f"\n{full['images']:,} images" if full.get("images") else ""
        levels["all data"] = (mean, f"all data{images}\n{100 * mean:.2f} %")
    if chance:
        levels["chance"] = (chance, f"chance\n{100 * chance:.3g} %")
    places = [_height(axes, mean) for mean, _ in levels.values()]
    apart = len(places) < 2 or abs(places[0] - places[1]) > 0.15
    for name, (mean, text) in levels.items():
        axes.axhline(mean, color=INK, linewidth=1.1, linestyle=(0, (1, 1.5)), zorder=2, label=name)
        axes.annotate(
            text,
            (1.0, mean),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center" if apart else "top" if _height(axes, mean) == min(places) else "bottom",
            fontsize=8.5,
            color=INK,
        )


def _height(axes: Axes, accuracy: float) -> float:
    """Where an accuracy stands on the axis, as a share of its length."""
    return float((axes.transData + axes.transAxes.inverted()).transform((1.0, accuracy))[1])


def _apart(values: Sequence[float], places: Sequence[float], least: float) -> list[float]:
    """Those of rising values, the last ones first, whose places on an axis are as far apart as their names need."""
    chosen: list[tuple[float, float]] = []
    for value, place in sorted(zip(values, places, strict=True), reverse=True):
        if not chosen or chosen[-1][1] - place > least:
            chosen.append((value, place))
    return [value for value, _ in chosen]


def space_by_budget(axes: Axes, budgets: Sequence[float]) -> None:
    """A logarithmic axis with a tick at every budget, named where names do not run into each other."""
    axes.set_xscale("log")
    low, high = budgets[0] / 1.25, budgets[-1] * 1.25
    axes.set_xlim(low, high)
    named = _apart(budgets, [math.log(budget) / math.log(high / low) for budget in budgets], 0.045)
    axes.xaxis.set_major_locator(FixedLocator(budgets))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{budget:g}" if budget in named else "" for budget in budgets]))
    axes.xaxis.set_minor_locator(NullLocator())


def _space_by_error(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Scales the axis by -log(error), where 0.05 % is added to the error so that an accuracy of 100 % has a place."""
    best, worst = (
        pick(row["accuracy_mean"] + sign * (row.get("accuracy_std") or 0.0) for row in rows)
        for pick, sign in ((max, 1), (min, -1))
    )
    least = 5e-4

    def height(accuracy: ArrayLike) -> np.ndarray:
        return -np.log(np.maximum(1 - np.asarray(accuracy) + least, least / 10))

    axes.set_yscale("function", functions=(height, lambda place: 1 + least - np.exp(-place)))
    axes.set_ylim(1 - (1 - worst) * 1.08, 1 + least - (1 - min(best, 1.0) + least) / 1.3)
    ticks = [0, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 93, 95, 97, 98, 99, 99.5, 99.8, 99.9, 100]
    low, high = (100 * limit for limit in axes.get_ylim())
    shown = [tick for tick in ticks if low <= tick <= high]
    shown = sorted(_apart(shown, [_height(axes, tick / 100) for tick in shown], 0.045))
    axes.yaxis.set_major_locator(FixedLocator([tick / 100 for tick in shown]))
    axes.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in shown]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """Takes away what says nothing, and draws a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
