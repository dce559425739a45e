"""Publishing pipelines and evaluators to the Hugging Face Hub, each with its card and in one commit."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sampling.loading import StoredPipeline
from ..utils.markdown import merge_cards
from ..utils.origins import without_places
from ..utils.processes import is_main_process
from ..utils.safety import explained
from ..utils.values import plain_arguments
from .model_cards import render_evaluator_card, render_pipeline_card
from .push import PublishResult, PushOptions, Remote, make_target, send


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

    from ..matching.targets import MatchingTargets


CARD = "README.md"
LIBRARIES = ("diffusers", "transformers", "dsco_hf")  # whose classes the users of a published pipeline have


@plain_arguments()
def publish_pipeline(
    pipeline: DiffusionPipeline,
    repo_id: str,
    *,
    targets: MatchingTargets | None = None,
    dataset_id: str | None = None,
    license: str | None = None,
    push: PushOptions | None = None,
) -> PublishResult | None:
    """Publishes a pipeline: components, targets, card, and the one-line `pipeline.py` that finds the installed class.

    Both `DsCoPipeline.from_pretrained(repo_id)` and `DiffusionPipeline.from_pretrained(repo_id,
    custom_pipeline="pipeline", trust_remote_code=True)` then load it, and `MatchingTargets.from_pretrained(repo_id)`
    the targets, without the data.

    Args:
        pipeline: The pipeline; saved as safetensors. Its components are of diffusers, transformers or this package.
        repo_id: `"user/name"`.
        targets: Targets to send along.
        dataset_id: Dataset that the generator was trained on or the targets were made of, linked on the card.
        license: Licence identifier of the weights.
        push: Token, branch or pull request, message, dry run and the like, see `PushOptions`.

    Returns:
        What was sent; `None` on all processes but the main one.

    Raises:
        TypeError: If `pipeline` or `targets` cannot be saved.
        ValueError: If a component is of another package; this and further errors as of `publish`.
    """
    if not hasattr(pipeline, "save_pretrained") or not hasattr(pipeline, "components"):
        raise TypeError(f"Expected a DsCoPipeline, but got a {type(pipeline).__name__}.")
    if targets is not None and not hasattr(targets, "save_pretrained"):
        raise TypeError(f"Expected MatchingTargets, but got a {type(targets).__name__}.")
    _check_texts(dataset_id=dataset_id, license=license)
    for name, component in pipeline.components.items():
        library = type(component).__module__.split(".")[0]
        if component is not None and library not in LIBRARIES:
            raise ValueError(
                f"The component {name!r} is a {type(component).__name__} of {library!r}, which nobody could load from "
                "the Hub without its code. Publish the pipeline without it "
                f"(`pipeline.register_modules({name}=None)`), and pass `{name}=` to `from_pretrained`."
            )

    def save(folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=True)
        if targets is not None:
            targets.save_pretrained(folder)

    card = functools.partial(
        render_pipeline_card, pipeline, has_targets=targets is not None, dataset_id=dataset_id, license=license
    )
    return _publish_model(save, card, repo_id, push, "Publish a pipeline with dsco_hf")


@plain_arguments()
def publish_evaluator(
    model: PreTrainedModel,
    repo_id: str,
    *,
    dataset_id: str,
    accuracy: float | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    test_dataset: str | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int | None = None,
    license: str | None = None,
    push: PushOptions | None = None,
) -> PublishResult | None:
    """Publishes a trained evaluator, with a `model-index` result that links the dataset it was trained on.

    Args:
        model: The model; saved as safetensors.
        repo_id: `"user/name"`.
        dataset_id: Repository of the (concentrated) dataset it was trained on.
        accuracy: Test accuracy of the last epoch, a fraction in [0, 1].
        dataset_config: Config it was trained on, such as `"ipc10"`.
        dataset_revision: Commit of the dataset.
        test_dataset: Dataset whose test split the accuracy is of; `dataset_id` if `None`.
        protocol: Training settings, for the card.
        seed: Training seed.
        license: Licence identifier of the weights.
        push: Token, branch or pull request, message, dry run and the like, see `PushOptions`.

    Returns:
        What was sent; `None` on all processes but the main one.

    Raises:
        ValueError: If the accuracy is not a fraction; this and further errors as of `publish`.
    """
    card = functools.partial(
        render_evaluator_card, model, dataset_id=dataset_id, accuracy=accuracy, dataset_config=dataset_config,
        dataset_revision=dataset_revision, test_dataset=test_dataset, protocol=protocol, seed=seed, license=license,
    )  # fmt: skip
    _check_texts(dataset_id=dataset_id, license=license, dataset_config=dataset_config, test_dataset=test_dataset)
    card(repo_id="user/name")  # its errors come before anything is written
    return _publish_model(model.save_pretrained, card, repo_id, push, "Publish an evaluator with dsco_hf")


def _check_texts(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str | None):
            raise TypeError(f"`{name}` must be text, or None where it is not known, got {value!r}.")


def _publish_model(
    save: Callable[[Path], object], card: Callable[..., str], repo_id: str, push: PushOptions | None, message: str
) -> PublishResult | None:
    push = push or PushOptions()
    if not is_main_process():
        return None
    with explained(repo_id, token=push.token, action="publish to"), tempfile.TemporaryDirectory() as scratch:
        target = make_target(repo_id, "model", push)
        folder = Path(scratch) / "model"
        folder.mkdir()
        save(folder)
        _forget_places(folder)
        text = card(repo_id=target.repo_id)

        def prepare(folder: Path, remote: Remote) -> list[str]:
            (folder / CARD).write_text(merge_cards(remote.read(CARD), text), encoding="utf-8", newline="\n")
            return []

        return send(target, folder, prepare, message)


def _forget_places(folder: Path) -> None:
    """Takes out of all configurations where models lay on this machine, which diffusers writes there."""
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if (clean := without_places(values)) != values:
            path.write_text(json.dumps(clean, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def _push_to_hub(pipeline: DiffusionPipeline, repo_id: str, **options: Any) -> PublishResult | None:
    """`publish_pipeline` with the options of the push as diffusers names them, beside the others."""
    own = {name: options.pop(name) for name in ("targets", "dataset_id", "license") if name in options}
    return publish_pipeline(pipeline, repo_id, **own, push=PushOptions(**options))


StoredPipeline.publisher = staticmethod(_push_to_hub)  # `pipe.push_to_hub(...)`
