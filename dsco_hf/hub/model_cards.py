"""Model cards: of a published pipeline, from `pipeline_card.md`, and of a published evaluator."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from ..generators.denoisers import ENCODERS, SLOTS
from ..utils.markdown import (
    BEGIN_MARK,
    END_MARK,
    Trusted,
    escape_id,
    escape_markdown,
    format_number,
    join_card,
    parameter_rows,
    render,
    split_card,
)
from .cards import (
    DIT_WARNING,
    KNOWN_GENERATOR_LICENSES,
    is_non_commercial,
    license_metadata,
    license_sentence,
    listed,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel


PLACEHOLDER = "user/dsco-pipeline"
STORED_TARGETS = f'MatchingTargets.from_pretrained("{PLACEHOLDER}")  # statistics, no data'
MADE_TARGETS = "MatchingTargets.from_generator(pipe)  # or of real images: .from_dataset(dataset, pipe)"
FILL = re.compile(r"(<!-- dsco_hf:fill (?P<name>\w+) -->\n).*?(\n<!-- dsco_hf:filled -->)", re.DOTALL)
ROLES = dict.fromkeys(SLOTS, "predicts the noise, given step and class") | {
    "scheduler": "the ancestral sampler",
    "vae": "decodes latents",
    "classifier": "its pooled features define the discrepancy",
    "preview_vae": "cheap decoder for the look-ahead",
    "classifier_2": "a second classifier, whose features are matched as well",
    "prompts": "encoded prompts of the classes",
    **dict.fromkeys(ENCODERS, "encodes further prompts"),
}


# What `pipeline_card.md` shows was measured with other pipelines than the one that is published.
MEASURED_ELSEWHERE = (
    "No results of this pipeline are recorded. The README of `dsco_hf` has those of others, with their commands."
)


def pipeline_card_template() -> str:
    """Returns the text of `pipeline_card.md`, which stands beside the package or, when installed, in its templates."""
    here = Path(__file__).parent
    for path in (here / "templates" / "pipeline_card.md", here.parents[1] / "pipeline_card.md"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError("pipeline_card.md is missing from this installation of dsco_hf. Install it again.")


def render_pipeline_card(
    pipeline: DiffusionPipeline,
    *,
    repo_id: str,
    has_targets: bool = False,
    dataset_id: str | None = None,
    license: str | None = None,
) -> str:
    """Renders the model card of a pipeline: `pipeline_card.md` with what is known of this one filled in.

    Arguments as of [`~dsco_hf.hub.models.publish_pipeline`]; `has_targets` tells whether the repository has some. The
    licence of known checkpoints is looked up.
    """
    validate_repo_id(repo_id)
    metadata, body = split_card(pipeline_card_template())
    origin = str(getattr(pipeline.config, "_name_or_path", "") or "")
    license = license or KNOWN_GENERATOR_LICENSES.get(origin)
    metadata |= license_metadata(license or "unknown")
    if dataset_id:
        metadata["datasets"] = [dataset_id]
    if origin in KNOWN_GENERATOR_LICENSES and "/" in origin:  # a repository, unlike what the package brings
        metadata["base_model"] = origin
    texts = {
        "components": _components_table(pipeline),
        "targets": _targets_text(repo_id, has_targets),
        "license": _license_text(license),
        "summary": _summary(pipeline, dataset_id),
        "measured": MEASURED_ELSEWHERE,
    }
    body = FILL.sub(lambda match: f"{match[1]}{texts[match['name']]}{match[3]}", body)
    if not has_targets:
        body = body.replace(STORED_TARGETS, MADE_TARGETS)
    return join_card(metadata, body.replace(PLACEHOLDER, repo_id))


def _summary(pipeline: DiffusionPipeline, dataset_id: str | None) -> str:
    names = getattr(pipeline.config, "id2label", None) or {}
    classes = f" for {len(names)} classes ({listed(list(names.values()), 20)})" if names else ""
    data = f" Dataset: {escape_id(dataset_id)}." if dataset_id else ""
    return (
        f"A class-conditional diffusion pipeline{classes} that draws *small training sets*: the few images it makes "
        f"of a class together match the features of the whole class.{data}"
    )


def _components_table(pipeline: DiffusionPipeline) -> str:
    rows = ["| component | class | parameters | role |", "| --- | --- | ---: | --- |"]
    for name, component in pipeline.components.items():
        if component is None:
            continue
        parameters = getattr(component, "parameters", None)
        count = format_number(sum(p.numel() for p in parameters())) if callable(parameters) else "–"
        kind = escape_markdown(type(component).__name__)
        rows.append(f"| {escape_markdown(name)} | {kind} | {count} | {ROLES.get(name, '')} |")
    return "\n".join(rows)


def _targets_text(repo_id: str, has_targets: bool) -> str:
    if has_targets:
        return (
            f'This repository holds them: `MatchingTargets.from_pretrained("{repo_id}")` loads one mean embedding per '
            "class. They are statistics of a population, not images; whoever has them needs no access to the data."
        )
    return (
        "This repository holds none. Compute them in one pass over a dataset "
        "(`MatchingTargets.from_dataset(dataset, pipe)`) or, without any data, over samples of the generator "
        "(`MatchingTargets.from_generator(pipe, class_labels=[0, 1])`)."
    )


def _license_text(license: str | None) -> str:
    if not license or license == "unknown":
        return (
            "**The licence of these weights is not known.** Find it out before you use them or what they draw. "
            f"{DIT_WARNING}"
        )
    text = f"Licence of the weights: {escape_markdown(license)}."
    if is_non_commercial(license):
        text += " **Not for commercial use**, which also binds what is made with them."
    return f"{text} {license_sentence(license)}".rstrip()


def render_evaluator_card(
    model: PreTrainedModel,
    *,
    repo_id: str,
    dataset_id: str,
    accuracy: float | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    test_dataset: str | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int | None = None,
    license: str | None = None,
) -> str:
    """Renders the model card of an evaluator, with a `model-index` result that links the dataset it was trained on.

    Arguments as of [`~dsco_hf.hub.models.publish_evaluator`].

    Raises:
        ValueError: If the accuracy is not a fraction.
    """
    for name in (repo_id, dataset_id):
        validate_repo_id(name)
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy must be a fraction in [0, 1], but is {accuracy}. Divide percentages by 100.")
    name = repo_id.rpartition("/")[2]
    config = model.config
    results = None
    if accuracy is not None:
        tested: dict[str, Any] = {"dataset_config": dataset_config, "dataset_revision": dataset_revision}
        tested = {} if test_dataset else tested
        result = huggingface_hub.EvalResult(
            task_type="image-classification", dataset_type=test_dataset or dataset_id,
            dataset_name=test_dataset or dataset_id, dataset_split="test", metric_type="accuracy",
            metric_name="test accuracy at the last epoch", metric_value=float(accuracy), **tested,
        )  # fmt: skip
        results = [result]
    metadata = huggingface_hub.ModelCardData(
        license=license or "unknown",
        library_name="transformers",
        pipeline_tag="image-classification",
        datasets=[dataset_id],
        tags=["dataset-concentration", "dsco_hf"],
        metrics=["accuracy"] if results else None,
        model_name=name if results else None,
        eval_results=results,
    ).to_dict()
    names = [str(label) for label in (getattr(config, "id2label", None) or {}).values()]
    details = [text for text in (dataset_config, f"revision {dataset_revision}" if dataset_revision else None) if text]
    mean = getattr(config, "image_mean", None)
    body = render(
        "evaluator_card.md.jinja",
        title=name,
        repo_id=Trusted(repo_id),
        dataset_link=Trusted(f"[{dataset_id}](https://huggingface.co/datasets/{dataset_id})"),
        config_text=Trusted(f" ({escape_markdown(', '.join(details))})" if details else ""),
        accuracy=None if accuracy is None else Trusted(format_number(float(accuracy), scale=100)),
        test_dataset=Trusted(escape_id(test_dataset or dataset_id)),
        seed_text=Trusted("" if seed is None else f" (one run, seed {int(seed)})"),
        needs_package=type(model).__module__.startswith("dsco_hf"),
        num_channels=getattr(config, "num_channels", 3),
        image_size=getattr(config, "image_size", "any"),
        range_text=Trusted(f", normalised by mean {escape_markdown(mean)}" if mean else ""),
        classes=names,
        class_list=Trusted(listed(names, 100)),
        protocol=parameter_rows(protocol),
        license=license or "not known",
    )
    return join_card(metadata, f"{BEGIN_MARK}\n\n{body}\n{END_MARK}\n")
