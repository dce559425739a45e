"""Computes what a small dataset has to match: class means of a real dataset, or data-free of a generator's samples.

    accelerate launch recipes/compute_targets.py --config recipes/configs/targets_digits.yaml
    accelerate launch --multi_gpu --num_processes 8 recipes/compute_targets.py --config ...     (also without a GPU)
    accelerate launch recipes/compute_targets.py --generator outputs/pipe --data_free --output_dir outputs/targets

All processes share one pass. A pass that was stopped goes on where it was when the same command is run again; its
features, 4 bytes for each of their dimensions and images, wait in <output_dir>-work until the targets are saved.
The folder is read by `MatchingTargets.from_pretrained` and by `--targets` of recipes/concentrate.py.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset

from dsco_hf.data.datasets import class_names
from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.studies.options import DtypeOptions, MatchOptions, OutputOptions
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_json
from dsco_hf.utils.processes import RunError
from dsco_hf.utils.progress import introduce


@dataclass(frozen=True, kw_only=True)
class TargetsRecipe(DtypeOptions, MatchOptions, OutputOptions):
    """Options of this recipe; those of the models and of what is matched are inherited.

    Attributes:
        embedding_dim, bandwidth, second_moment, seed: see `MatchingTargets.from_dataset`; another choice of them needs
            no new pass as long as the work folder is there (`keep_work`). Only "rkhs" does without `second_moment`.
        batch_size: images at a time.
        streaming: read the dataset row by row, without downloading or converting the whole.
        decode_threads: threads of a process that decode images; its share of the cores if none.
        num_inference_steps, guidance_scale, eta: see `MatchingTargets.from_generator`.
        output_dir: the targets' folder, with results.json.
        keep_work: leave the features there.
    """

    generator: str = field()
    embedding_dim: int = 2048
    bandwidth: float | None = None
    second_moment: bool = True
    seed: int = 0
    batch_size: int = 256
    streaming: bool = False
    decode_threads: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    eta: float = 1.0
    output_dir: str = "outputs/targets"
    keep_work: bool = False


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, makes the targets, and saves them with the results."""
    recipe = parse_config(TargetsRecipe, arguments, description=__doc__)
    if recipe.data_free == (recipe.dataset is not None):
        raise ValueError("Give either `dataset`, the images to match, or `data_free`, to match the generator's own.")
    check_made(Path(__file__).parent, {"generator": recipe.generator, "classifier": recipe.classifier})
    accelerator, output = make_accelerator(), Path(recipe.output_dir).absolute()
    work = output.with_name(f"{output.name}-work")  # beside, so that it is never published
    check_anew(recipe.resume, accelerator, [work])
    with accelerator.main_process_first():  # one process downloads, the others read its cache
        pipe = recipe.load_pipeline().to(accelerator.device)
    continued = any(work.glob("features-*"))
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    begin = time.perf_counter()
    try:
        targets, splits = make_targets(recipe, pipe, accelerator, work)
    except RunError as error:
        sys.exit(str(error) if accelerator.is_main_process else 1)
    seconds = time.perf_counter() - begin
    if accelerator.is_main_process:
        targets.save_pretrained(output)
        told = made(targets, None if continued else seconds) | run_environment(accelerator)
        write_json(output / "results.json", {"config": dataclasses.asdict(recipe), "splits": splits, **told})
        if not recipe.keep_work:
            shutil.rmtree(work)
        print(f"Saved targets of {targets.num_classes} classes to {output} after {seconds:.1f} s.")
    accelerator.end_training()


def make_targets(
    recipe: TargetsRecipe, pipe: DsCoPipeline, accelerator: Accelerator, work: Path
) -> tuple[MatchingTargets, dict[str, Any]]:
    """The targets, by all processes together, and which images were matched and which left out."""
    with accelerator.main_process_first():
        real, _, splits = recipe.splits(streaming=recipe.streaming)
    own = recipe.classes(pipe) or range(pipe.num_classes)
    names = own if real is None else class_names(real, label_column=recipe.label_column)
    images = len(real) if isinstance(real, Dataset) else None
    data = recipe.dataset or f"generator {recipe.generator}"
    introduce(accelerator, data, images=images, classes=len(names), size=pipe.image_size)
    drawing = {name: getattr(recipe, name) for name in ("num_inference_steps", "guidance_scale", "eta")}
    common = ["embedding_dim", "bandwidth", "second_moment", "seed", "batch_size"]
    common += [] if recipe.data_free else ["decode_threads"]
    options = recipe.targets_options(pipe, **drawing) | {name: getattr(recipe, name) for name in common}
    return recipe.make_targets(pipe, real, accelerator=accelerator, work_dir=work, **options), splits


def made(targets: MatchingTargets, seconds: float | None) -> dict[str, Any]:
    """What targets are of, and how long they took, unless it was in several sessions, for results.json."""
    images = targets.provenance.get("images") or targets.provenance["samples_per_class"] * targets.num_classes
    speed = {"seconds": seconds and round(seconds, 2), "images_per_second": seconds and round(images / seconds, 1)}
    about = {name: getattr(targets, name) for name in ("feature_dim", "bandwidth", "provenance")}
    return {"images": images, **speed, "classes": targets.num_classes, **about}


if __name__ == "__main__":
    main()
