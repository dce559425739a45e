"""What a study makes once and uses again: sets, checks of a generator, models.

Sets and checks lie beside all that decided them, and are used again where their identity is that of what would be made
now, and made anew or refused where it differs; see `dsco_hf.utils.origins`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from ..concentration.set_records import read_set, write_set
from ..costs.passes import synthesis_flops, weighted
from ..costs.probe import imagenet_pipeline
from ..costs.tracing import PassCost, pass_costs
from ..evaluators import Execution, ImageSet, Protocol, train_evaluator
from ..evaluators.evaluation import save_network
from ..generators.denoisers import GeneratorTrainingConfig, build_scheduler
from ..generators.failures import NonFiniteError
from ..generators.training import train_generator
from ..matching.kept import pipeline_identity
from ..matching.targets import MatchingTargets
from ..sampling.call import Sampling, SamplingMethod
from ..sampling.methods import JointTargets
from ..sampling.models import load_classifier
from ..sampling.pipeline import DsCoPipeline
from ..utils.files import DamagedFileError, read_json, reading, remove_partials, whole, write_json
from ..utils.origins import differences
from ..utils.progress import Clock
from .generator_check import GeneratorCheck, check_generator


FLOPS = ("flops", "data_pass_flops", "flops_dit_xl_2")  # of [`flops_of`], told of the first seed: all cost alike
DRAW_AGAIN = "Delete it, and run the same command again: it is made anew."


def set_name(method: str, images_per_class: int, seed: int) -> str:
    """What a study calls a set, such as "nopt-ipc10-seed0"."""
    return f"{method}-ipc{images_per_class}-seed{seed}"


def set_parts(name: str) -> tuple[str, int, int]:
    """Method, images per class and seed of a set's name; the inverse of [`set_name`]."""
    method, size, seed = name.rsplit("-", 2)
    return method, int(size.removeprefix("ipc")), int(seed.removeprefix("seed"))


def clear_name(share: float) -> str:
    """Name of the targets of the clearest images."""
    return f"clearest-{share}"


def shared_out(names: Sequence[str], effort: Callable[[str], float], processes: int) -> list[list[str]]:
    """What each process does so that they end at about the same time: the largest goes to whoever has least."""
    shares: list[list[str]] = [[] for _ in range(processes)]
    for name in sorted(names, key=effort, reverse=True):
        min(shares, key=lambda share: sum(map(effort, share))).append(name)
    return shares


class KeptSets:
    """Small sets in a folder, each with what it was made with, what it cost and how it was drawn.

        <name>.parquet      the rows with their record, see `dsco_hf.concentration.set_records`; whole or absent
        <name>.json         `made_with`, and what else is told of it

    Args:
        folder (`str` or `Path`): made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        return self._rows(name).is_file() and self._notes(name).is_file()

    def is_made(self, name: str, made_with: Mapping[str, Any]) -> bool:
        """Whether a set is there, and was made with the same."""
        try:
            return name in self and not differences(self.told(name)["made_with"], made_with)
        except (DamagedFileError, KeyError):
            return False

    def save(self, name: str, rows: Dataset, made_with: Mapping[str, Any], **told: object) -> None:
        """Keeps a set, in place of an earlier one of the name; `told` are JSON values."""
        self._rows(name).unlink(missing_ok=True)
        remove_partials(self.folder, self._rows(name).name)
        write_json(self._notes(name), {**told, "made_with": made_with})
        write_set(rows, self._rows(name))

    def rows(self, name: str) -> Dataset:
        """A finished set, with its record.

        Raises:
            DamagedFileError: if its file cannot be read.
        """
        with reading(self._rows(name), DRAW_AGAIN):
            return read_set(self._rows(name))

    def told(self, name: str) -> dict[str, Any]:
        """What was told of a set; nothing of one that is not there."""
        return read_json(self._notes(name), DRAW_AGAIN) if self._notes(name).is_file() else {}

    def file(self, name: str) -> Path:
        """The parquet file of a set."""
        return self._rows(name)

    def _rows(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"

    def _notes(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def passes_of(targets: Any, pipe: DiffusionPipeline) -> dict[str, int]:
    """What making targets cost: `images` that were read, and images that passed through networks, by kind.

    Targets of several networks have passed every image through each of them; those of a generator, which read no
    image, have drawn their samples with `pipe`.
    """
    if isinstance(targets, JointTargets):
        return dict(sum((Counter(passes_of(one, pipe)) for one in targets.parts.values()), Counter()))
    told = getattr(targets, "provenance", {})
    if not isinstance(targets, MatchingTargets):
        return {"images": told.get("images", 0), **told.get("passes", {})}
    networks = len({dataclasses.replace(spec, layers=("pooled",), pooling="average") for spec in targets.features})
    if told.get("population") == "data":
        return {"images": told["images"], "classifier": told["images"] * networks}
    samples = told["samples_per_class"] * targets.num_classes
    branches = 2 if told["guidance_scale"] > 1 else 1
    denoised = samples * told["num_inference_steps"] * branches
    return {
        "images": 0,
        "denoiser": denoised,
        "decoder": samples * (pipe.vae is not None),
        "classifier": samples * networks,
    }


def flops_of(
    pipe: DsCoPipeline,
    options: Mapping[str, Any],
    num_classes: int,
    images_per_class: int,
    *,
    features: str | None = None,
    data_pass: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """FLOPs of drawing a set, and of making its targets; beside them those of a generator of the field's usual size.

    Args:
        pipe (`DsCoPipeline`): that draws.
        options (mapping): of [`~dsco_hf.concentration.concentrate`]: `method`, steps, guidance and sizes of blocks.
        num_classes (`int`): of the set.
        images_per_class (`int`): of the set.
        features (*optional*): what the targets match.
        data_pass (mapping, *optional*): of [`passes_of`].

    Returns:
        `dict`: `flops` and `data_pass_flops` at this shape, and `flops_dit_xl_2`: drawn likewise with
            DiT-XL/2 at 256 px, see [`~dsco_hf.costs.probe.imagenet_pipeline`].
    """
    sizes = {name: options[name] for name in ("block_size", "images_per_call")}
    sampling = Sampling.of(**{name: value for name, value in options.items() if name not in sizes})
    drawn = (num_classes, images_per_class)
    owner = None if sampling.method.own_passes(pipe) is None else sampling.method
    costs = _costs(pipe, features, owner)
    large = _dit_xl_2()
    return {
        "flops": synthesis_flops(pipe, sampling, *drawn, costs=costs, features=features, **sizes),
        "data_pass_flops": weighted(data_pass or {}, {kind: cost.flops for kind, cost in costs.items()}),
        "flops_dit_xl_2": synthesis_flops(large, sampling, *drawn, costs=_costs(large, None, owner), **sizes),
    }


@functools.lru_cache(maxsize=4)  # a study's pipeline and the reference, with and without a method's network
def _costs(pipe: DsCoPipeline, features: str | None, owner: SamplingMethod | None) -> dict[str, PassCost]:
    return pass_costs(pipe, features=features, extractor=True, method=owner)


@functools.cache
def _dit_xl_2() -> DsCoPipeline:
    return imagenet_pipeline()


def kept_check(
    path: str | Path, pipe: DiffusionPipeline, real: Dataset | None = None, **options: Any
) -> GeneratorCheck | None:
    """What the classifier makes of plain samples: of an earlier session with the same models and images, or asked now.

    Args:
        path (`str` or `Path`): the JSON file that it is kept in.
        pipe (`DsCoPipeline`): as for [`~dsco_hf.studies.generator_check.check_generator`], like `real` and `options`.
        real (`Dataset`, *optional*): to compare with.
        options: of that function.

    Returns:
        [`GeneratorCheck`]; None where the classifier cannot say, or a sample is not finite: the run that follows says
        which.
    """
    path, made_with = Path(path), pipeline_identity(pipe, real, **options)
    if path.is_file():
        kept = read_json(path, f"Remove {path}: the samples are then drawn again.")
        if not differences(kept.get("made_with") or {}, made_with):
            check = GeneratorCheck(**kept["check"])
            check.warn()
            return check
    try:
        found = check_generator(pipe, real, **options)
    except NonFiniteError:
        return None
    if found is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"check": dataclasses.asdict(found), "made_with": json.loads(json.dumps(made_with))})
    return found


def kept_classifiers(
    folder: str | Path,
    build: Callable[..., PreTrainedModel],
    images: ImageSet,
    seeds: int,
    *,
    protocol: Protocol,
    clock: Clock,
) -> list[PreTrainedModel]:
    """Classifiers that differ in their seed; those that are not there are trained, each by one of the processes.

    Args:
        folder (`str` or `Path`): that of one kind of network, data and protocol, on a file system that all see.
        build (`Callable`): the untrained network of a `seed`.
        images (`ImageSet`): to train on.
        seeds (`int`): how many, from seed 0 on.
        protocol (`Protocol`): how.
        clock ([`~dsco_hf.utils.progress.Clock`]): of the launch.
    """
    accelerator = clock.accelerator
    clock.say("training the classifiers")
    folders = [Path(folder) / f"classifier-seed{seed}" for seed in range(seeds)]
    for seed, place in list(enumerate(folders))[accelerator.process_index :: accelerator.num_processes]:
        if not place.is_dir():
            execution = Execution(accelerator)
            result = train_evaluator(build(seed=seed), images, protocol=protocol, seed=seed, execution=execution)
            with whole(place) as partial:
                save_network(result.model, partial)
    accelerator.wait_for_everyone()
    return [load_classifier(str(place)) for place in folders]


def kept_pipeline(
    folder: str | Path,
    images: ImageSet,
    config: GeneratorTrainingConfig,
    *,
    classifier: PreTrainedModel,
    clock: Clock,
) -> DsCoPipeline:
    """A pipeline of a generator of pixels; where it is not there, the main process trains one.

    Args:
        folder (`str` or `Path`): that of one config, data and classifier, on a file system that all processes see.
        images (`ImageSet`): to train on; gives the classes.
        config (`GeneratorTrainingConfig`): how.
        classifier (`PreTrainedModel`): says what was drawn.
        clock ([`~dsco_hf.utils.progress.Clock`]): of the launch.
    """
    accelerator = clock.accelerator
    if not Path(folder).is_dir() and accelerator.is_main_process:
        clock.say("training the generator")
        options: dict[str, Any] = {"num_classes": len(images.names), "distributed": False}
        trained = train_generator(images.pixels, images.labels, config, accelerator=accelerator, **options)
        scheduler, names = build_scheduler(config, latents=False), dict(enumerate(images.names))
        pipe = DsCoPipeline(**trained.components, scheduler=scheduler, classifier=classifier, id2label=names)
        with whole(Path(folder)) as partial:
            pipe.save_pretrained(partial)
    accelerator.wait_for_everyone()
    return DsCoPipeline.from_pretrained(folder)
