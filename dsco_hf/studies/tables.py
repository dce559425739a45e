"""Tables of a run, made from `results.json` and never typed; its figures are in `figures`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..concentration.methods import chance_level, dataset_title, find_method, in_order, network_title
from ..evaluators import ImageSet
from ..utils.files import write_atomically, write_json
from .figures.accuracy import accuracy_figure, draw_study_samples, sample_grid
from .figures.features import feature_figure
from .metrics import LEAST_SEEDS, paired_difference


__all__ = ["accuracy_figure", "feature_figure", "results_table", "sample_grid"]


def write_results(
    results: Mapping[str, Any], folder: str | Path, *, sets: Mapping[str, ImageSet] | None = None
) -> str:
    """Writes results.json, table.md and accuracy.png of a study, and of its sets samples.png; returns the table."""
    table = results_table(results)
    if sets is not None:
        largest = max(
            row["images_per_class"]
            for row in results["rows"]
            if row["method"] not in ("herding", "random", "nopt+doping")
        )
        draw_study_samples(sets, largest, Path(folder) / "samples.png")
    write_json(Path(folder) / "results.json", results)
    write_atomically(Path(folder) / "table.md", (table + "\n").encode())
    accuracy_figure(results, Path(folder) / "accuracy.png")
    return table


def against_baselines(rows: Sequence[dict[str, Any]], baselines: Sequence[str] = ("random", "herding")) -> None:
    """Adds `against_<baseline>` to rows of a study: what they differ by from that method's, training by training."""
    found = {(row["method"], row["images_per_class"], row["architecture"]): row["accuracies"] for row in rows}
    for row in rows:
        for method in baselines:
            other = found.get((method, row["images_per_class"], row["architecture"]))
            if method != row["method"] and other is not None:
                row[f"against_{method}"] = paired_difference(row["accuracies"], other)


def write_comparison(results: Mapping[str, Any], folder: str | Path) -> str:
    """Writes results.json, table.md, table.tex and a figure for each network of a study; returns the table."""
    against_baselines(results["rows"])
    folder, table = Path(folder), comparison_table(results)
    write_json(folder / "results.json", results)
    write_atomically(folder / "table.md", table.encode())
    write_atomically(folder / "table.tex", latex_table(results).encode())
    for index, network in enumerate(dict.fromkeys(row["architecture"] for row in results["rows"])):
        rows = [row for row in results["rows"] if row["architecture"] == network]
        name = "accuracy.png" if index == 0 else f"accuracy-{network.replace('/', '_')}.png"
        accuracy_figure({**results, "rows": rows, "full": results.get("full") if index == 0 else None}, folder / name)
    return table


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


def _cells(results: Mapping[str, Any], plus_minus: str) -> tuple[list[int], list[list[str]]]:
    """Budgets, and a line of texts for each method and network: method, network, one accuracy for each budget."""
    budgets = sorted({row["images_per_class"] for row in results["rows"]})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in results["rows"]:
        text = f"{100 * row['accuracy_mean']:.1f}"
        if row["accuracy_std"] is not None:
            text += f"{plus_minus}{100 * row['accuracy_std']:.1f}"
        text += "*" if is_significant(row) else ""
        lines.setdefault((row["method"], row["architecture"]), {})[row["images_per_class"]] = text
    return budgets, [
        [find_method(method).label, network_title(network), *(own.get(budget, "–") for budget in budgets)]
        for (method, network), own in lines.items()
    ]


def _caption(results: Mapping[str, Any]) -> str:
    """What the numbers of the table are."""
    seeds, size = results["rows"][0]["training_seeds"], results["protocol"].get("image_size")
    text = (
        f"Test accuracy in percent on {dataset_title(results)}, last epoch, protocol {results['protocol']['name']}"
        f"{f', all images at {size} px' if size else ''}, mean and standard deviation over {seeds} seeds."
    )
    if seeds < LEAST_SEEDS:
        text += f" Significance is not tested with fewer than {LEAST_SEEDS} seeds."
    elif any(is_significant(row) for row in results["rows"]):
        text += " * differs from random real: p < 0.05, paired t-test over seeds, each cell tested on its own."
    else:
        text += " No difference from random real is significant (p < 0.05, paired t-test over seeds)."
    if chance := chance_level(results):
        text += f" Chance: {100 * chance:.3g}."
    if full := results.get("full"):
        network = network_title(full["architecture"])
        text += f" All {full['images']:,} training images ({network}): {100 * full['accuracy_mean']:.1f}."
    return text


def is_significant(row: Mapping[str, Any]) -> bool:
    """Whether a row gets the mark: a paired t-test over at least three seeds tells it from random real images."""
    p = row.get("against_random", {}).get("p")
    return p is not None and p < 0.05 and len(row["accuracies"]) >= LEAST_SEEDS


def comparison_table(results: Mapping[str, Any]) -> str:
    """The comparison in Markdown."""
    budgets, lines = _cells(results, " ± ")
    head = ["method", "network", *(f"{budget} per class" for budget in budgets)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{_caption(results)}\n"


def latex_table(results: Mapping[str, Any]) -> str:
    """The comparison in LaTeX, for booktabs."""
    budgets, lines = _cells(results, r" $\pm$ ")

    def escape(text: str) -> str:
        return re.sub(r"([%_&#$])", r"\\\1", text).replace("<", "$<$")

    body = [" & ".join([escape(row[0]), escape(row[1]), *row[2:]]) + r" \\" for row in lines]
    head = " & ".join(["method", "network", *(f"{budget}/class" for budget in budgets)]) + r" \\"
    return "\n".join(
        [
            rf"\begin{{tabular}}{{ll{'r' * len(budgets)}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
            rf"{{\footnotesize {escape(_caption(results))}\par}}",
            "",
        ]
    )
