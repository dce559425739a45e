"""What a search has found, for people: lossless.json, a table, a figure, and the accepted set with its claim."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ...utils.files import write_atomically, write_json
from ..figures.accuracy import FAINT, INK, save_figure


LENGTHS = {
    "same steps": (
        "Every network was trained for the same number of steps ({length}), however many images it had: fewer images "
        "save storage here, and no training time."
    ),
    "same epochs": (
        "Every network was trained for the same number of epochs ({length}), so that fewer images had fewer steps: "
        "they save storage and training time here."
    ),
}


def claim(found: Mapping[str, Any]) -> str:
    """What was shown, in sentences that state size, margin, confidence, length, labels, protocol and their limits."""
    all_images, points = f"{found['all_images']:,}", f"{100 * found['margin']:g} percentage points"
    reference = found["reference"]
    chosen = f"real ones chosen by the rule {found['selection']['name']!r}"
    if found["synthetic_images"]:
        chosen = f"{found['synthetic_images']:,} synthetic ones, then {chosen}"
    if found["status"] == "accepted":
        look = next(look for look in found["looks"] if look["images"] == found["images"])
        own = sum(row["images"] == found["images"] for row in found["every_training"])
        first = (
            f"Trained on {found['images']:,} images ({chosen}; {100 * found['share']:.1f} % of the number of all real "
            f"ones), a network's mean test accuracy is at most {points} below that of training on all {all_images} "
            "real images. This was shown with "
            f"{100 * found['confidence']:g} % confidence by a one-sided test, {own} trainings against "
            f"{reference['trainings']} on {found['test_images']:,} test images (all images reach "
            f"{100 * reference['accuracy_mean']:.2f} %, these {100 * look['difference']:+.2f} points)."
        )
    else:
        first = (
            f"Not shown: within {found['trainings']} trainings no smaller set ({chosen}) than all {all_images} real "
            "images was shown "
            f"with {100 * found['confidence']:g} % confidence to train a network whose mean test accuracy "
            f"is at most {points} below that of training on all of them "
            f"({100 * reference['accuracy_mean']:.2f} %, {reference['trainings']} trainings, "
            f"{found['test_images']:,} test images)."
        )
    return " ".join([first, *_conditions(found)])


def _conditions(found: Mapping[str, Any]) -> list[str]:
    """Under which the claim holds, a sentence each."""
    protocol = found["protocol"]
    length = f"{protocol['steps']:,} steps" if protocol["steps"] is not None else f"{protocol['epochs']:,} epochs"
    labels = "Labels are hard: the dataset's own classes, for all sizes."
    if found["labels"] == "teacher":
        labels = (
            f"Labels are soft, given at training time by a teacher ({found['teacher']['name']}, SHA-256 "
            f"{found['teacher']['sha256'][:12]}…), for all images as for fewer: nothing is said of the dataset's own "
            "labels, nor of training without this teacher."
        )
    told = [LENGTHS[found["length"]].format(length=length), labels]
    if found["gain_of_second_half"] > found["margin"]:
        told.append(
            f"All images were still rising: the second half of the training gained "
            f"{100 * found['gain_of_second_half']:.1f} points, so that a longer training may need more images."
        )
    return [
        *told,
        f"This holds for the network {found['architecture']} under the protocol {protocol['name']!r}, and says "
        "nothing of others.",
    ]


def accepted_results(found: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies of the accepted size and of all images, as a results.json has them."""
    rows = []
    for images in (found["images"], found["all_images"]):
        own = [row["accuracy"] for row in found["every_training"] if row["images"] == images]
        rows.append({"method": found["selection"]["name"], "images": images, "training_seeds": len(own),
                     "accuracy_mean": statistics.fmean(own), "accuracy_std": statistics.stdev(own)})  # fmt: skip
    few, full = rows
    if found["synthetic_images"]:
        few["method"] = f"synthetic, then {few['method']}"
    full = {key: value for key, value in full.items() if key != "method"} | {"seeds": full["training_seeds"]}
    return {"rows": [few], "full": full}


def lossless_table(found: Mapping[str, Any]) -> str:
    """The claim, and a line for every size, in Markdown."""
    looks = {look["images"]: look for look in found["looks"]}
    lines = [claim(found), "", "| images | share | trainings | accuracy | difference, one-sided bound | test |",
             "| ---: | ---: | ---: | ---: | ---: | --- |"]  # fmt: skip
    for images in sorted({row["images"] for row in found["every_training"]}):
        own = [row["accuracy"] for row in found["every_training"] if row["images"] == images]
        bound, verdict = "", "all data" if images == found["all_images"] else ""
        if images in looks:
            look = looks[images]
            bound = f"{100 * look['difference']:+.2f}, above {100 * look['lower']:+.2f}"
            verdict = "accepted" if look["accepted"] else "not shown"
        share, mean = 100 * images / found["all_images"], 100 * sum(own) / len(own)
        lines.append(f"| {images:,} | {share:.1f} % | {len(own)} | {mean:.2f} | {bound} | {verdict} |")
    return "\n".join(lines) + "\n"


def draw_search(found: Mapping[str, Any], path: str | Path) -> Path:
    """Draws the fitted curve with its 90 % band, the margin, every training as a point, and the bracket.

    Args:
        found (mapping): content of lossless.json.
        path (`str` or `Path`): the PNG file to write.
    """
    figure = Figure(figsize=(5.2, 4.0), dpi=200, facecolor="white", layout="constrained")
    axes, curve, full = figure.add_subplot(), found["curve"], found["reference"]["accuracy_mean"]
    low, middle, high = ([100 * value for value in curve[key]] for key in ("low", "middle", "high"))
    axes.fill_between(curve["images"], low, high, color=FAINT, label="fitted curve, 90 % band")
    axes.plot(curve["images"], middle, color=INK, linewidth=1)
    axes.axhline(100 * full, color=INK, linewidth=0.8, label="all data, mean")
    axes.axhline(100 * (full - found["margin"]), color=INK, linewidth=0.8, linestyle="--",
                 label=f"{100 * found['margin']:g} points below")  # fmt: skip
    sizes = [row["images"] for row in found["every_training"]]
    reached = [100 * row["accuracy"] for row in found["every_training"]]
    axes.scatter(sizes, reached, s=11, color="#4477aa", zorder=3, linewidths=0, alpha=0.8, label="a training")
    for images, style, word in zip(found["bracket"], (":", "-"), ("not shown", "accepted"), strict=True):
        if images:
            axes.axvline(images, color="#aa3377", linewidth=1, linestyle=style, label=f"{word}: {images:,}")
    room = max(max(reached) - min(reached), 100 * found["margin"])  # all trainings may be alike
    axes.set_ylim(min(reached) - 0.1 * room, max(reached) + 0.15 * room)
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=7.5)
    axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel("images", fontsize=8.5)
    axes.set_ylabel("test accuracy in %", fontsize=8.5)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return save_figure(figure, path)


def write_lossless(found: Mapping[str, Any], folder: str | Path) -> str:
    """Writes lossless.json, lossless.md and lossless.png.

    Returns:
        `str`: the table.
    """
    folder = Path(folder)
    write_json(folder / "lossless.json", found)
    table = lossless_table(found)
    write_atomically(folder / "lossless.md", table.encode())
    draw_search(found, folder / "lossless.png")
    return table
