"""Compares small datasets of equal size under one protocol, with random real and herded real images beside them.

    accelerate launch recipes/compare.py --config recipes/configs/compare_digits.yaml
    accelerate launch recipes/compare.py --config my.yaml --budgets 1 10 50 --datasets
        "ours=user/small@ipc{budget}" "peer=outputs/peer/ipc{budget}"

A dataset is `name=path[@config[@split[@revision]]]`, where a part may be empty (`name=path@@@main`) and `{budget}`
stands for the images per class. Trainings are spread over processes and survive a kill. Writes `results.json`,
`table.md`, `table.tex` and `accuracy.png`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from datasets import Dataset
from transformers import PreTrainedModel

from dsco_hf.concentration.doping import select
from dsco_hf.concentration.methods import chance_level, dataset_title, network_title
from dsco_hf.concentration.selection import Herding
from dsco_hf.data.datasets import find_columns, load_image_dataset, load_splits
from dsco_hf.data.pixels import default_image_size, image_sizes
from dsco_hf.evaluators import (
    ImageSet,
    Protocol,
    get_protocol,
    job_identity,
    load_image_set,
    protocol_to_dict,
    run_jobs,
    summarise,
    train_job,
)
from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.sampling.models import load_classifier
from dsco_hf.studies.figures import accuracy_figure
from dsco_hf.studies.metrics import LEAST_SEEDS, paired_difference
from dsco_hf.utils.configs import check_anew, make_accelerator, parse_config


BASELINES = {"random": "random real", "herding": "herded real"}


@dataclass(frozen=True)
class ComparisonRecipe:
    """Options of this recipe.

    Attributes:
        real, real_name, revision: the real dataset that baselines are drawn from and that is tested on.
        title: what tables and figures call the real dataset; the last part of `real` by default.
        train_split, test_split, holdout: its splits, as in recipes/train_classifier.py.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        image_column, label_column: for a real dataset with several of them.
        datasets: what is compared, see above; none compares the baselines only.
        datasets_image_column, datasets_label_column: of those, where they have several of them: a column of all of
            them, or `name=column` for each.
        budgets: images per class.
        protocol: a protocol's name or YAML file.
        epochs, steps, batch_size, learning_rate, label_type: changes to it.
        image_size: what the images of all datasets are brought to (shorter side, then the centre); the protocol's by
            default, or else that of the compared images, which must then be one; without any, that of the real ones,
            or 32 if they have several sizes.
        architectures: names or model types, see `dsco_hf.evaluators.build_evaluator`.
        model_options: values of the networks' configurations, as JSON.
        seeds: trainings of each network; each has random real images of its own.
        classifier, classifier_revision: a classifier (folder or Hub id) whose features are herded; pixels without one.
        teacher, teacher_revision: a classifier for protocols with a teacher's labels; `classifier` by default.
        full: also train on all real images.
        allow_unequal: accept datasets of other sizes than the budget.
        num_channels: 1 or 3.
        mixed_precision: "no", "fp16" or "bf16"; without it, what `accelerate launch` was told.
        compile: pass the networks through `torch.compile`; pays from about a minute of training on.
        checkpoint_seconds: time between checkpoints; 0 writes one after every epoch.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        output_dir: where results, jobs and checkpoints go.
    """

    real: str = "digits"
    real_name: str | None = None
    revision: str | None = None
    title: str | None = None
    train_split: str = "train"
    test_split: str = "auto"
    holdout: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
    on_error: str = "skip"
    datasets: list[str] = field(default_factory=list)
    datasets_image_column: list[str] = field(default_factory=list)
    datasets_label_column: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=lambda: [10])
    protocol: str = "quick"
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    label_type: str | None = None
    image_size: int | None = None
    architectures: list[str] = field(default_factory=lambda: ["convnet-3"])
    model_options: str = "{}"
    seeds: int = 3
    classifier: str | None = None
    classifier_revision: str | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    full: bool = False
    allow_unequal: bool = False
    num_channels: int = 3
    mixed_precision: str | None = None
    compile: bool = False
    checkpoint_seconds: float = 60.0
    resume: bool = True
    output_dir: str = "outputs/comparison"


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, trains everything and writes the table and the figure."""
    recipe = parse_config(ComparisonRecipe, arguments, description=__doc__)
    output = Path(recipe.output_dir)
    accelerator = make_accelerator(
        recipe.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))]
    )
    check_anew(recipe.resume, accelerator, [output / "jobs"])
    names = ("epochs", "steps", "batch_size", "learning_rate", "label_type", "image_size")
    changes = {name: getattr(recipe, name) for name in names if getattr(recipe, name) is not None}
    protocol = get_protocol(recipe.protocol, **changes)
    with accelerator.main_process_first():  # one process downloads and converts, the others read its cache
        compared = open_compared(recipe)
        train, tested, splits = open_real(recipe, protocol)
        if protocol.image_size is None:
            protocol = dataclasses.replace(protocol, image_size=size_of_all(recipe, compared, train))
        real, test = load_real(recipe, protocol, train, tested, accelerator)
        if protocol.image_size is None:  # nothing is compared but real images, at their own size
            protocol = dataclasses.replace(protocol, image_size=real.pixels.shape[-1])
        classifier = frozen(recipe.classifier, recipe.classifier_revision, accelerator)
        teacher = None
        if protocol.label_type == "teacher":
            own = frozen(recipe.teacher, recipe.teacher_revision, accelerator)
            teacher = classifier if own is None else own
        sets = load_compared(recipe, protocol, compared, real)
    sets |= {("herding", budget): images for budget, images in herd(real, recipe.budgets, classifier).items()}
    options = json.loads(recipe.model_options)
    cells = [(method, budget) for budget in recipe.budgets for method in ("random", "herding", *dataset_names(recipe))]
    cells += [("full", 0)] if recipe.full else []
    jobs = {
        f"{method}-{budget}-{network}-seed{seed}": (method, budget, network, seed)
        for seed in range(recipe.seeds)
        for method, budget in cells
        for network in recipe.architectures
    }

    def training_set(method: str, budget: int, seed: int) -> ImageSet:
        if method == "random":
            return select(real, "random", images_per_class=budget, seed=seed)
        return real if method == "full" else sets[method, budget]

    def run(key: str, checkpoint: Path) -> dict[str, Any]:
        method, budget, network, seed = jobs[key]
        return train_job(
            training_set(method, budget, seed),
            test,
            architecture=network,
            seed=seed,
            protocol=protocol,
            teacher=teacher,
            accelerator=accelerator,
            compiled=recipe.compile,
            checkpoint=checkpoint,
            checkpoint_seconds=recipe.checkpoint_seconds,
            overrides=options,
            progress=accelerator.is_local_main_process,
        )

    def settings(key: str) -> dict[str, Any]:
        method, budget, network, seed = jobs[key]
        return job_identity(
            training_set(method, budget, seed),
            test,
            architecture=network,
            seed=seed,
            protocol=protocol,
            teacher=teacher,
            accelerator=accelerator,
            compiled=recipe.compile,
            overrides=options,
        )

    finished = run_jobs(list(jobs), run, settings=settings, accelerator=accelerator, folder=output / "jobs")
    if not accelerator.is_main_process:
        return
    results = collect(recipe, finished, jobs, cells, {key: len(images.labels) for key, images in sets.items()}, real)
    results |= {"config": dataclasses.asdict(recipe), "protocol": protocol_to_dict(protocol)}
    results |= {"splits": splits, "test_images": len(test.labels), "dataset_fingerprint": real.fingerprint}
    results |= {"test_fingerprint": test.fingerprint, **run_environment(accelerator)}
    save(results, output)


def herd(real: ImageSet, budgets: Sequence[int], classifier: PreTrainedModel | None) -> dict[int, ImageSet]:
    """The herded real images of each budget."""
    rule = Herding(features="pixels" if classifier is None else classifier)
    return {budget: select(real, rule, images_per_class=budget) for budget in budgets}


def open_real(recipe: ComparisonRecipe, protocol: Protocol) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """Training and test images of the real dataset, and which splits these are."""
    if protocol.label_type == "stored":
        raise ValueError(
            "compare.py needs labels that all datasets can have, but label_type is 'stored'. Use --label_type hard, "
            "or teacher with --teacher; recipes/train_evaluator.py evaluates one dataset with its stored labels."
        )
    train, test, splits = load_splits(
        recipe.real,
        recipe.real_name,
        train_split=recipe.train_split,
        test_split=recipe.test_split,
        holdout=recipe.holdout,
        label_column=recipe.label_column,
        revision=recipe.revision,
    )
    if test is None:
        raise ValueError("Networks are tested: `test_split` is a split or 'auto' here, not 'none'.")
    return train, test, splits


def load_real(
    recipe: ComparisonRecipe, protocol: Protocol, train: Dataset, test: Dataset, accelerator: Accelerator
) -> tuple[ImageSet, ImageSet]:
    """The real images in memory."""
    options: dict[str, Any] = {
        "protocol": protocol,
        "num_channels": recipe.num_channels,
        "image_column": recipe.image_column,
        "label_column": recipe.label_column,
        "on_error": recipe.on_error,
        "progress": accelerator.is_local_main_process,
    }
    real = load_image_set(train, **options)
    return real, load_image_set(test, test_for=real, **options)


def size_of_all(recipe: ComparisonRecipe, compared: Mapping[tuple[str, int], Dataset], real: Dataset) -> int | None:
    """The size that all images are brought to, so that they are treated alike: that of the compared ones.

    Raises:
        ValueError: if these have several.
    """
    if not compared:
        columns = {"image_column": recipe.image_column, "label_column": recipe.label_column}
        return default_image_size(real, **columns)
    found = {key: image_sizes(rows, **columns_of(recipe, key[0])) for key, rows in compared.items()}
    sides = {side for sizes in found.values() for size in sizes for side in size}
    if len(sides) > 1:
        listed = [
            f"{name} ({budget} per class) {' and '.join(f'{width}x{height}' for width, height in sorted(sizes)[:3])}"
            for (name, budget), sizes in found.items()
        ]
        raise ValueError(
            f"The compared images have several sizes: {'; '.join(listed[:10])}. To treat all alike, choose one with "
            f"--image_size, such as {min(sides)}."
        )
    return sides.pop() if sides else None


def dataset_names(recipe: ComparisonRecipe) -> list[str]:
    """Names of the compared datasets."""
    for item in recipe.datasets:
        if "=" not in item or item.split("=")[0] in ("", "random", "herding", "full"):
            raise ValueError(
                f"--datasets takes name=path[@config[@split[@revision]]] with a name of its own, got {item!r}."
            )
    names = [item.split("=")[0] for item in recipe.datasets]
    if len(set(names)) != len(names):
        raise ValueError(f"The names of --datasets must differ, got {names}.")
    return names


def columns_of(recipe: ComparisonRecipe, name: str) -> dict[str, str | None]:
    """The columns of a compared dataset.

    Raises:
        ValueError: for a column of a dataset that is not compared, or several for one.
    """
    known, columns = dataset_names(recipe), {}
    for option in ("image_column", "label_column"):
        given = getattr(recipe, f"datasets_{option}")
        shared = [item for item in given if "=" not in item]
        own = [item.split("=", 1) for item in given if "=" in item]
        names = [owner for owner, _ in own]
        if len(shared) > 1 or len(set(names)) < len(names) or set(names) - set(known):
            raise ValueError(
                f"--datasets_{option} takes one column for all datasets, or name=column for some of {known}, got "
                f"{given}."
            )
        columns[option] = dict(own).get(name, shared[0] if shared else None)
    return columns


def open_compared(recipe: ComparisonRecipe) -> dict[tuple[str, int], Dataset]:
    """The compared datasets by name and budget."""
    opened = {}
    for name, item in zip(dataset_names(recipe), recipe.datasets, strict=True):
        columns = columns_of(recipe, name)  # before anything is read
        for budget in recipe.budgets:
            parts = item.split("=", 1)[1].format(budget=budget).split("@")
            if len(parts) > 4:
                raise ValueError(f"--datasets takes name=path[@config[@split[@revision]]], got {item!r}.")
            path, config, split, revision = [*parts, "", "", ""][:4]
            opened[name, budget] = load_image_dataset(
                path, config or None, split=split or "train", revision=revision or None
            )
            try:
                find_columns(opened[name, budget], **columns)
            except ValueError as error:
                raise ValueError(
                    f"Set {name!r}: {error} Here these are --datasets_image_column and --datasets_label_column."
                ) from error
    return opened


def load_compared(
    recipe: ComparisonRecipe, protocol: Protocol, compared: Mapping[tuple[str, int], Dataset], real: ImageSet
) -> dict[tuple[str, int], ImageSet]:
    """The compared datasets in memory, checked for size and classes."""
    sets = {}
    for (name, budget), dataset in compared.items():
        options = {"classes": real.names, "num_channels": recipe.num_channels, **columns_of(recipe, name)}
        images = load_image_set(dataset, protocol=protocol, **options)
        wanted = budget * len(real.names)
        if len(images.labels) != wanted and not recipe.allow_unequal:
            raise ValueError(
                f"The dataset {name!r} has {len(images.labels)} images, but {budget} per class are {wanted}. "
                "Compare at equal size, with {budget} in the path or config, or pass --allow_unequal true."
            )
        sets[name, budget] = images
    return sets


def frozen(path: str | None, revision: str | None, accelerator: Accelerator) -> PreTrainedModel | None:
    """A frozen classifier on the device, or None."""
    if path is None:
        return None
    return load_classifier(path, revision=revision).requires_grad_(False).to(accelerator.device)


def collect(
    recipe: ComparisonRecipe,
    finished: Mapping[str, Mapping[str, Any]],
    jobs: Mapping[str, tuple[str, int, str, int]],
    cells: Sequence[tuple[str, int]],
    sizes: Mapping[tuple[str, int], int],
    real: ImageSet,
) -> dict[str, Any]:
    """Rows of results.json, each compared with the baselines of its budget over the same seeds."""
    results: dict[str, Any] = {"dataset": recipe.real, "title": recipe.title, "classes": len(real.names), "rows": []}
    for network in recipe.architectures:
        summaries = {
            cell: summarise([finished[key] for key, job in jobs.items() if job[:3] == (*cell, network)])
            for cell in cells
        }
        for (method, budget), summary in summaries.items():
            if method == "full":
                if "full" not in results:
                    results["full"] = {"architecture": network, "images": len(real.labels), **summary}
                continue
            row = {"method": method, "architecture": network, "images_per_class": budget}
            row["images"] = sizes.get((method, budget), budget * len(real.names))
            row |= summary
            for baseline in BASELINES:
                if method != baseline:
                    row[f"against_{baseline}"] = paired_difference(
                        summary["accuracies"], summaries[baseline, budget]["accuracies"]
                    )
            results["rows"].append(row)
    return results


def save(results: dict[str, Any], output: Path) -> None:
    """Writes the results, tables and figures."""
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    table = markdown_table(results)
    (output / "table.md").write_text(table, encoding="utf-8")
    (output / "table.tex").write_text(latex_table(results), encoding="utf-8")
    for index, network in enumerate(dict.fromkeys(row["architecture"] for row in results["rows"])):
        rows = [row for row in results["rows"] if row["architecture"] == network]
        name = "accuracy.png" if index == 0 else f"accuracy-{network.replace('/', '_')}.png"
        accuracy_figure({**results, "rows": rows, "full": results.get("full") if index == 0 else None}, output / name)
    print(table)


def table_cells(results: Mapping[str, Any], plus_minus: str) -> tuple[list[int], list[list[str]]]:
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
        [BASELINES.get(method, method), network_title(network), *(own.get(budget, "–") for budget in budgets)]
        for (method, network), own in lines.items()
    ]


def caption(results: Mapping[str, Any]) -> str:
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


def markdown_table(results: Mapping[str, Any]) -> str:
    """The comparison in Markdown."""
    budgets, lines = table_cells(results, " ± ")
    head = ["method", "network", *(f"{budget} per class" for budget in budgets)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{caption(results)}\n"


def latex_table(results: Mapping[str, Any]) -> str:
    """The comparison in LaTeX, for booktabs."""
    budgets, lines = table_cells(results, r" $\pm$ ")

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
            rf"{{\footnotesize {escape(caption(results))}\par}}",
            "",
        ]
    )


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
