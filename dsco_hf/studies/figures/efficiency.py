"""Figures of what images are worth and what they cost, from results files alone; readable in gray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ...concentration.methods import Method, dataset_title, find_methods, in_order
from .accuracy import INK, line_style, space_by_budget, tidy


# By measure of a row: the axis and the title
_MEASURES = {
    "discrepancy": ("squared MMD to the real classes", "what is left of the difference (dotted: its floor)"),
    "unexplained": ("share of the labels' variance", "what a ridge regression does not learn"),
}


def draw_efficiency(report: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
    """The exchange rate against images per class; beside it, where known, discrepancy and error of a ridge regression.

    The floor of the discrepancy, the generator's own bias, is dotted.

    Args:
        report (`dict`): of [`~dsco_hf.studies.lossless.efficiency.efficiency`].
        results (`dict`): content of results.json, of which it was made.
    """
    rows = [row for row in results["rows"] if row.get("discrepancy")]
    known = [measure for measure in _MEASURES if any(row.get(measure) for row in rows)]
    width = (6.4, 5.5, 5.0)[len(known)] * (1 + len(known))
    figure = Figure(figsize=(width, 4.6), dpi=200, layout="constrained")
    left, *others = figure.subplots(1, 1 + len(known), squeeze=False)[0]
    methods = {name: own for name, own in report["methods"].items() if own["rates"] and name != "random"}
    for name, style in find_methods(methods).items():
        _draw_rates(left, methods[name]["rates"], style)
    left.axhline(1, color=INK, linewidth=1.1, linestyle=(0, (1, 1.5)))
    left.annotate("one real image", (0, 1), xycoords=left.get_yaxis_transform(), xytext=(4, -4), va="top",
                  textcoords="offset points", fontsize=8.5, color=INK)  # fmt: skip
    left.set_yscale("log")
    left.set_ylim(*_limits([rate["rate"] for own in methods.values() for rate in own["rates"]]))
    _name_ticks(left.yaxis)
    left.set_ylabel("real images that one image is worth")
    left.set_title(f"{dataset_title(results)}: the exchange rate", loc="left", fontsize=10.5)
    for axes, measure in zip(others, known, strict=True):
        _draw_measure(axes, measure, rows, report)
    _finish(figure, results, rows)
    return figure


def draw_cost(results: Mapping[str, Any], *, cost: str = "seconds") -> Figure:
    """Synthesis cost against images per class (figure 4 of arXiv 2603.27987), and accuracy against that cost.

    A method that was not run at the largest budget is drawn on to it with dashes, in proportion to its images.

    Args:
        results (`dict`): content of results.json, with `seconds` or calls in its rows.
        cost (`str`): which of their numbers, such as "seconds" or "denoiser_calls".

    Raises:
        ValueError: if no row has that number.
    """
    rows = [row for row in results["rows"] if row.get(cost)]
    if not rows:
        raise ValueError(f"No row of the results has {cost!r}: only sets that were drawn cost something.")
    figure = Figure(figsize=(11, 4.6), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    largest = max(row["images_per_class"] for row in rows)
    for name, style in find_methods(row["method"] for row in rows).items():
        own = sorted(
            (row["images_per_class"], row[cost], row["accuracy_mean"]) for row in rows if row["method"] == name
        )
        budgets, costs, accuracies = zip(*own, strict=True)
        left.plot(budgets, costs, **line_style(style))
        if budgets[-1] < largest:
            further = costs[-1] * largest / budgets[-1]
            left.plot([budgets[-1], largest], [costs[-1], further], color=style.color, linestyle=(0, (1, 2)), lw=1.3)
        right.plot(costs, [100 * accuracy for accuracy in accuracies], **line_style(style))
        for budget, x, y in own:
            right.annotate(
                f"{budget:g}", (x, 100 * y), xytext=(-5, 5), ha="right", textcoords="offset points", fontsize=7.5
            )
    front = pareto_front([(row[cost], row["accuracy_mean"]) for row in rows])
    places = [(x, 100 * y) for x, y in front]
    right.plot(*zip(*places, strict=True), color=INK, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
    right.plot(*zip(*places, strict=True), linestyle="", marker="o", markersize=14, markerfacecolor="none",
               markeredgecolor=INK, markeredgewidth=0.9, zorder=5)  # fmt: skip
    named = cost.replace("_", " ")
    left.set_yscale("log")
    right.set_xscale("log")
    for axis in (left.yaxis, right.xaxis):
        _name_ticks(axis)
    left.set_ylabel(f"synthesis: {named}")
    left.set_title(f"{dataset_title(results)}: what sets cost (dotted: extrapolated)", loc="left", fontsize=10.5)
    right.set_xlabel(f"synthesis: {named} (beside the points: images per class)")
    right.set_ylabel("test accuracy (%)")
    right.set_title("and what they bring (ringed: nothing cheaper is better)", loc="left", fontsize=10.5)
    _finish(figure, results, rows, budget_axes=[left])
    return figure


def _name_ticks(axis: Axis) -> None:
    """Numbers at 1, 2 and 5 of every decade of a logarithmic axis: those between would overlap."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points `(cost, accuracy)` than which none costs as little and is as accurate, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def _limits(rates: list[float]) -> tuple[float, float]:
    """Of the axis: the rates and 1 with some room; bands may leave it."""
    return min([1.0, *rates]) / 1.5, max([1.0, *rates]) * 1.7


def _draw_rates(axes: Axes, rates: list[Mapping[str, Any]], style: Method) -> None:
    """One method's exchange rates; hollow where they lie outside of the real images that were trained on."""
    budgets, middle = [rate["images_per_class"] for rate in rates], [rate["rate"] for rate in rates]
    axes.plot(budgets, middle, **line_style(style))
    low = [rate["low"] or rate["rate"] for rate in rates]
    high = [rate["high"] or rate["rate"] for rate in rates]
    axes.fill_between(budgets, low, high, color=style.color, alpha=0.12, linewidth=0)
    hollow = [(rate["images_per_class"], rate["rate"]) for rate in rates if rate["extrapolated"]]
    if hollow:
        axes.plot(*zip(*hollow, strict=True), linestyle="", marker=style.marker, markersize=7, color=style.color,
                  markerfacecolor="white", zorder=6)  # fmt: skip


def _draw_measure(axes: Axes, measure: str, rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """What sets of each method are measured to be without training, and a floor where one is known."""
    label, title = _MEASURES[measure]
    for name, style in find_methods(row["method"] for row in rows).items():
        points = sorted(
            (row["images_per_class"], float(np.mean(row[measure])))
            for row in rows
            if row["method"] == name and row.get(measure)
        )
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), **line_style(style))
        bias = (report["methods"].get(name, {}).get("floor") or {}).get(measure)
        if bias and name not in ("random", "herding"):
            axes.axhline(bias, color=style.color, linewidth=1.0, linestyle=(0, (1, 1.5)))
    axes.set_yscale("log" if measure == "discrepancy" else "linear")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=10.5)


def _finish(
    figure: Figure,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    budget_axes: list[Axes] | None = None,
) -> None:
    """Axes of budgets, a grid, and one legend below for all methods, in their order."""
    budgets = sorted({row["images_per_class"] for row in rows or results["rows"]})
    for axes in figure.axes if budget_axes is None else budget_axes:
        space_by_budget(axes, budgets)
        axes.set_xlabel("images per class")
    for axes in figure.axes:
        tidy(axes)
    found = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    order = [style.label for style in find_methods(in_order(row["method"] for row in results["rows"])).values()]
    labels = [label for label in order if label in found]
    columns = min(len(labels), 5 if len(figure.axes) > 1 else 3)
    figure.legend([found[label] for label in labels], labels, loc="outside lower center", ncols=columns,
                  fontsize=8.5, frameon=False, handlelength=3)  # fmt: skip
