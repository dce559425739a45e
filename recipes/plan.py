"""What a concentration will cost, before it runs: calls, FLOPs, memory, and time on any number of devices.

    python recipes/plan.py --generator outputs/pipeline --images_per_class 1 10 50 --guidance_scale 1.0
    python recipes/plan.py --run_config recipes/configs/concentrate_digits.yaml --num_processes 1 2
    python recipes/plan.py --preset imagenet1k --images_per_class 10 50 650 --num_processes 1 8 64 --device a100
    python recipes/plan.py --preset imagenet1k --device a100 --memory_gib 24 --max_hours 8
    python recipes/plan.py --preset imagenette --shapes sdxl --images_per_class 10 50 --device a100
    python recipes/plan.py --search_config recipes/configs/lossless_digits.yaml --num_processes 1 2

Calls are counted by the pipeline itself on networks that cost nothing, and are exact. Time comes from a few steps on
this machine (`--device here`), or from counted FLOPs and an assumed share of a device's peak rate. Prints Markdown.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsco_hf.costs.plan import CostPlan
from dsco_hf.costs.probe import imagenet_pipeline
from dsco_hf.data.labels import PRESETS as LABEL_SETS
from dsco_hf.data.labels import label_set
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.studies.lossless.options import SearchOptions
from dsco_hf.studies.lossless.planned import plan_search, planned_table
from dsco_hf.studies.options import PreviewOptions
from dsco_hf.utils.configs import check_made, make_accelerator, parse_config, read_config
from dsco_hf.utils.files import write_json
from dsco_hf.utils.values import check_choice


# preset: (classes, real images per class)
PRESETS = {"imagenet1k": (1000, 1281), "imagenet100": (100, 1281), "imagenette": (10, 947)}


@dataclass(frozen=True, kw_only=True)
class PlanRecipe(CostPlan, PreviewOptions):
    """Options of this recipe; those of the plan and of the models are inherited.

    Attributes:
        preset: "imagenet1k", "imagenet100" or "imagenette": the shapes of facebook/DiT-XL-2-256, its VAE, a tiny
            preview VAE and ResNet-18, without weights.
        shapes: of another generator with the preset: "sd-1.5", "sdxl", "pixart-512" or "sd3-medium", each at its own
            size.
        generator: a pipeline's folder or Hub id, instead.
        run_config: a YAML file of `recipes/concentrate.py`; options that both recipes have are taken from it.
        search_config: a YAML file of `recipes/lossless.py`, whose search is planned instead, on this machine.
        tiny: the preset's shapes at a size for tests.
        output_file: JSON file for all numbers.
    """

    preset: str | None = None
    shapes: str = "dit-xl-2"
    run_config: str | None = None
    search_config: str | None = None
    dtype: str = "bfloat16"
    tiny: bool = False
    output_file: str | None = None


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Reads the config, predicts, prints the plan, and returns its numbers."""
    recipe = parse_config(PlanRecipe, arguments, description=__doc__)
    if recipe.search_config is not None:
        return written(recipe, *of_search(recipe))
    if recipe.run_config is not None:
        recipe = parse_config(PlanRecipe, arguments, defaults=of_run_config(Path(recipe.run_config)))
    pipe = load(recipe)
    classes, population = PRESETS.get(recipe.preset or "", (pipe.num_classes, 0))
    population = population if recipe.population is None else recipe.population
    num_classes = recipe.num_classes or min(classes, pipe.num_classes)
    recipe = dataclasses.replace(recipe, num_classes=num_classes, population=population)
    plan = recipe.of(pipe)
    return written(recipe, plan, recipe.markdown(plan))


def written(recipe: PlanRecipe, plan: dict[str, Any], table: str) -> dict[str, Any]:
    """Prints a plan, and writes its numbers where a file is named."""
    print(table)
    if recipe.output_file is not None:
        Path(recipe.output_file).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(recipe.output_file), plan)
    return plan


def of_search(recipe: PlanRecipe) -> tuple[dict[str, Any], str]:
    """The plan of a search for the lossless size, and its table."""
    if recipe.preset or recipe.generator or recipe.run_config or recipe.device != "here":
        raise ValueError(
            "`--search_config` plans trainings on this machine: leave `--preset`, `--generator`, `--run_config` and "
            "`--device` out."
        )
    options = parse_config(SearchOptions, ["--config", str(recipe.search_config)])
    plan = plan_search(options, recipe.num_processes, make_accelerator(options.mixed_precision))
    return plan, planned_table(plan)


@dataclass(frozen=True)
class RunClasses:
    """What the file of a run says of its classes, beside its dataset."""

    class_labels: list[str] = field(default_factory=list)
    mapping: str | None = None


def of_run_config(path: Path) -> dict[str, Any]:
    """The options of a run that this recipe has too; those of the command line come before them."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no config file {path}: `--run_config` is that of recipes/concentrate.py.")
    found = {"dtype": "float32", **read_config(path, PlanRecipe, others=True), "max_hours": None}  # as the run's
    classes = RunClasses(**read_config(path, RunClasses, others=True))
    if classes.class_labels:
        found["num_classes"] = len(classes.class_labels)
    elif classes.mapping in LABEL_SETS:
        found["num_classes"] = len(label_set(str(classes.mapping)))
    return found


def load(recipe: PlanRecipe) -> DsCoPipeline:
    """The pipeline that is to be predicted; a preset has shapes only, unless this machine is to be measured."""
    if (recipe.preset is None) == (recipe.generator is None):
        raise ValueError(f"Give either `--generator` (a folder or Hub id) or `--preset`, one of {list(PRESETS)}.")
    recipe.check()
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.preset is not None:
        check_choice("preset", recipe.preset, list(PRESETS))
        device = here if recipe.device == "here" else "meta"
        prompted = recipe.num_classes or PRESETS[recipe.preset][0]
        return imagenet_pipeline(
            shapes=recipe.shapes, prompted=prompted, device=device, dtype=recipe.torch_dtype, tiny=recipe.tiny
        )
    check_made(Path(__file__).parent, {"generator": recipe.generator, "classifier": recipe.classifier})
    pipe = recipe.load_pipeline().to(here)
    if pipe.classifier is None and not recipe.plain:
        raise ValueError(
            f"{recipe.generator} has no classifier: name one with `--classifier`, or plan `--plain true`."
        )
    return pipe


if __name__ == "__main__":
    main()
