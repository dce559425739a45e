"""What a search has found, for people: lossless.json, a table, a figure, and the accepted set with its claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ...utils.files import write_atomically, write_json
from ..figures.accuracy import FAINT, INK, save_figure


def claim(found: Mapping[str, Any]) -> str:
    """What was shown, in one sentence with margin, confidence and protocol."""
    points, confidence = f"{100 * found['margin']:g}", f"{100 * found['confidence']:g} %"
    labels = {"hard": "hard labels", "teacher": "a teacher's soft labels"}[found["labels"]]
    how = f"({found['architecture']}, protocol {found['protocol']['name']}, {labels}, {found['length']} as all data)"
    rule, all_images = found["selection"]["name"], f"{found['all_images']:,}"
    if found["status"] == "accepted":
        return (
            f"{found['images']:,} of {all_images} images ({100 * found['share']:.1f} %), chosen by {rule!r}, train a "
            f"network whose accuracy is less than {points} points below that of all data, with {confidence} "
            f"confidence {how}."
        )
    return (
        f"Within {found['trainings']} trainings no smaller set, chosen by {rule!r}, was shown to be less than "
        f"{points} points below all {all_images} images with {confidence} confidence {how}."
    )


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
    room = max(reached) - min(reached)
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
