"""Tables of a run, made from `results.json` and never typed; its figures are in `figures` and `feature_figures`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..concentration.methods import chance_level, find_method, in_order
from .feature_figures import feature_figure
from .figures import accuracy_figure, sample_grid


__all__ = ["accuracy_figure", "feature_figure", "results_table", "sample_grid"]


def results_table(results: Mapping[str, Any]) -> str:
    """A Markdown table of all methods and budgets: accuracy in percent (mean ± std), discrepancy in brackets, seconds.

    Args:
        results (`dict`): content of results.json.

    Raises:
        ValueError: if `results` has no rows.
    """
    rows = results.get("rows") or []
    if not rows:
        raise ValueError("The results have no rows: nothing has been evaluated yet.")
    budgets = sorted({row["images_per_class"] for row in rows})
    lines = [
        "| method | " + " | ".join(f"{budget} per class" for budget in budgets) + " | synthesis |",
        "| --- |" + " --- |" * len(budgets) + " --- |",
    ]
    told = {
        row["images_per_class"] for row in rows if row["method"] == "random" and row.get("discrepancy") is not None
    }
    beside = {row["images_per_class"] for row in rows if row.get("random_discrepancy") is not None} - told
    for method in in_order(row["method"] for row in rows):
        own = {row["images_per_class"]: row for row in rows if row["method"] == method}
        cells = [_cell(own[budget], beside) if budget in own else "–" for budget in budgets]
        label = find_method(method).label
        lines.append(
            f"| {f'**{label}**' if find_method(method).emphasis else label} | {' | '.join(cells)} | {_cost(own)} |"
        )
    references = []
    if full := results.get("full"):
        spread = f" ± {100 * full['accuracy_std']:.2f}" if full.get("accuracy_std") is not None else ""
        images = f" ({full['images']:,} images)" if full.get("images") else ""
        references.append(f"All training data{images}: {100 * full['accuracy_mean']:.2f}{spread} %.")
    if chance := chance_level(results):
        references.append(f"Chance: {100 * chance:.3g} %.")
    lines += ["", " ".join(references)] if references else []
    lines += [
        "",
        "Test accuracy in %, mean ± standard deviation over synthesis and training seeds, last epoch; whether "
        "differences are significant was not tested. In brackets: squared MMD to the real classes, lower is better. "
        "Synthesis: time at the largest budget that has one.",
    ]
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any], beside: Collection[int]) -> str:
    """Accuracy and discrepancy; that of random real images with it, where no row of its own tells it."""
    text = f"{100 * row['accuracy_mean']:.2f}"
    if row.get("accuracy_std") is not None:
        text += f" ± {100 * row['accuracy_std']:.2f}"
    if row.get("discrepancy") is not None:
        random = f", random {row['random_discrepancy']:.2g}" if row["images_per_class"] in beside else ""
        text += f" ({row['discrepancy']:.2g}{random})"
    return text


def _cost(own: Mapping[int, Mapping[str, Any]]) -> str:
    timed = [budget for budget, row in own.items() if row.get("seconds")]
    if not timed:
        return "–"
    budget = max(timed)
    return f"{own[budget]['seconds']:.1f} s at {budget}"
