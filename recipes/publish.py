"""Publishes a dataset, pipeline or evaluator folder to the Hugging Face Hub.

    accelerate launch recipes/publish.py --folder outputs/quickstart/dataset --repo_id user/digits-dsco --dry_run
    accelerate launch recipes/publish.py --folder outputs/generator --repo_id user/digits-dit --private

What is in the folder decides: `concentration.json` (a dataset saved by `save_dataset_folder`), `model_index.json` (a
pipeline) or `config.json` (an evaluator). The token is that of `hf auth login` or HF_TOKEN; it is no option, because
other users of a machine can see command lines. Run again after a cut, it sends only what is missing.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import logging
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsco_hf.concentration.records import config_record
from dsco_hf.data.datasets import class_names
from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.hub.folder import CONCENTRATION, read_folder
from dsco_hf.hub.publish import PublishResult, PushOptions, publish, publish_evaluator, publish_pipeline
from dsco_hf.studies.figures.page import look
from dsco_hf.utils.configs import parse_config
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True)
class PublishRecipe:
    """Options of this recipe.

    Attributes:
        folder: what to publish.
        repo_id: "user/name"; your own name is put before a bare "name".
        private, revision, create_pr, commit_message, dry_run, max_retries: see `dsco_hf.hub.PushOptions`.
        license: licence of what is published, such as "cc-by-4.0".
        pretty_name, description, source_license, generator_license, use: for the card of a dataset, see
            `dsco_hf.DatasetCardFields`.
        default_config, overwrite_features: for a dataset; see `dsco_hf.hub.publish`.
        preview: for a dataset, a page that shows all images of its default config is published with it, as
            recipes/look.py makes it.
        soft_labels, soft_labels_revision: for a dataset, a classifier (folder or Hub id) whose probabilities are
            stored with every image; see `dsco_hf.add_soft_labels`.
        views: how often it is asked for an image, augmented if more than once.
        top_k: most probable classes that are kept; all of them if left out.
        targets: for a pipeline, a folder of targets to send along.
        dataset_id: dataset that a pipeline or an evaluator was made with.
        dataset_config, dataset_revision, test_dataset, accuracy, seed: for an evaluator; see
            `dsco_hf.hub.publish.publish_evaluator`.
    """

    folder: str
    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    dry_run: bool = False
    max_retries: int = 5
    license: str | None = None
    pretty_name: str | None = None
    description: str | None = None
    source_license: str | None = None
    generator_license: str | None = None
    use: str | None = None
    default_config: str | None = None
    overwrite_features: bool = False
    preview: bool = False
    soft_labels: str | None = None
    soft_labels_revision: str | None = None
    views: int = 1
    top_k: int | None = None
    targets: str | None = None
    dataset_id: str | None = None
    dataset_config: str | None = None
    dataset_revision: str | None = None
    test_dataset: str | None = None
    accuracy: float | None = None
    seed: int | None = None


def publish_folder(recipe: PublishRecipe) -> PublishResult | None:
    """Publishes a folder as what it holds."""
    folder = Path(recipe.folder)
    names = ("revision", "create_pr", "commit_message", "dry_run", "max_retries")
    # None leaves the account's default, False would override it
    push = PushOptions(**{name: getattr(recipe, name) for name in names}, private=recipe.private or None)
    if (folder / CONCENTRATION).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            return publish_set(folder, recipe, push, Path(scratch))
    options: dict[str, Any] = {"license": recipe.license, "dataset_id": recipe.dataset_id, "push": push}
    if (folder / "model_index.json").is_file():
        from dsco_hf.matching.targets import MatchingTargets
        from dsco_hf.sampling.pipeline import DsCoPipeline

        targets = MatchingTargets.from_pretrained(recipe.targets) if recipe.targets else None
        return publish_pipeline(DsCoPipeline.from_pretrained(folder), recipe.repo_id, targets=targets, **options)
    if (folder / "config.json").is_file():
        from transformers import AutoModelForImageClassification

        from dsco_hf.sampling.models import load_model

        if not recipe.dataset_id:
            raise ValueError(
                "The card of an evaluator links the dataset it was trained on: add --dataset_id user/name."
            )
        names = ("dataset_config", "dataset_revision", "test_dataset", "accuracy", "seed")
        model = load_model(AutoModelForImageClassification, str(folder))
        options |= {name: getattr(recipe, name) for name in names}
        return publish_evaluator(model, recipe.repo_id, **options)
    raise FileNotFoundError(
        f"{folder} holds neither {CONCENTRATION} (a dataset saved by `save_dataset_folder`), nor model_index.json (a "
        "pipeline), nor config.json (an evaluator). Check the path."
    )


def publish_set(folder: Path, recipe: PublishRecipe, push: PushOptions, scratch: Path) -> PublishResult | None:
    """Publishes the folder of a dataset, with labels and a page if they are asked for."""
    said = {field.name: getattr(recipe, field.name, None) for field in fields(DatasetCardFields)}
    said = {name: value for name, value in said.items() if value and name != "repo_id"}
    stored = read_folder(folder) if recipe.soft_labels is None else with_soft_labels(folder, recipe)
    configs, default = stored.pop("configs"), stored.pop("default_config")
    rows = [rows for splits in configs.values() for rows in splits.values()]
    told = {"classes": len(class_names(rows[0])), "size": rows[0][0]["image"].width}
    introduce(None, recipe.folder, images=sum(map(len, rows)), **told)
    default = recipe.default_config or default
    if recipe.preview:
        record, rows = config_record(stored["concentration"], default), next(iter(configs[default].values()))
        title = " ".join([recipe.pretty_name or recipe.repo_id, *([default] if len(configs) > 1 else [])])
        page = look(rows, scratch / "look.html", record=record, results=stored["results"], title=title)
        stored["figures"] = [*(path for path in stored["figures"] if path.name != page.name), page]
    return publish(
        configs, recipe.repo_id, card=DatasetCardFields(**said) if said else None, push=push, default_config=default,
        overwrite_features=recipe.overwrite_features, **stored,
    )  # fmt: skip


def with_soft_labels(folder: Path, recipe: PublishRecipe) -> dict[str, Any]:
    """What the folder of a dataset holds, with a teacher's probabilities in every split."""
    from datasets import DatasetDict

    from dsco_hf.concentration.additions.soft_labels import add_soft_labels
    from dsco_hf.sampling.models import load_classifier

    stored, teacher = (
        read_folder(folder),
        load_classifier(str(recipe.soft_labels), revision=recipe.soft_labels_revision),
    )
    options: dict[str, Any] = {"views": recipe.views, "top_k": recipe.top_k}
    labelled = {
        config: DatasetDict({split: add_soft_labels(rows, teacher, **options) for split, rows in splits.items()})
        for config, splits in stored["configs"].items()
    }
    return {**stored, "configs": labelled}


def main(arguments: list[str] | None = None) -> None:
    """Reads the options, publishes, and prints what was sent."""
    recipe = parse_config(PublishRecipe, arguments, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        result = publish_folder(recipe)
    except (ConnectionError, FileNotFoundError, PermissionError, ValueError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if result is not None:
        print(result)


if __name__ == "__main__":
    main()
