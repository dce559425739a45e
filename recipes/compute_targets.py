"""Computes what a small dataset has to match: class means of a real dataset, or data-free of a generator's samples.

    accelerate launch recipes/compute_targets.py --config recipes/configs/targets_digits.yaml
    accelerate launch --multi_gpu --num_processes 8 recipes/compute_targets.py --config ...     (also without a GPU)
    accelerate launch recipes/compute_targets.py --generator outputs/pipe --data_free --output_dir outputs/targets

All processes share one pass. A pass that was stopped goes on where it was when the same command is run again; its
features, 4 bytes for each of their dimensions and images, wait in <output_dir>-work until the targets are saved.

The folder is read by `MatchingTargets.from_pretrained` and by `--targets` of recipes/concentrate.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from dsco_hf.data.datasets import load_splits
from dsco_hf.evaluators.evaluation import run_environment
from dsco_hf.matching.targets import MatchingTargets
from dsco_hf.sampling.models import load_classifier
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.utils.configs import check_anew, check_made, make_accelerator, parse_config
from dsco_hf.utils.files import write_atomically
from dsco_hf.utils.processes import RunError


@dataclass(frozen=True)
class TargetsRecipe:
    """Options of this recipe.

    Attributes:
        generator, generator_revision: pipeline folder or Hub id; it gives the image size and the classes.
        classifier, classifier_revision: folder or Hub id; that of the pipeline if none.
        dtype: "float32", "bfloat16" or "float16".
        features: what to match, as JSON; see `dsco_hf.matching.feature_spec`.
        embedding_dim, bandwidth, second_moment, seed: see `MatchingTargets.from_dataset`; another choice of them needs
            no new pass as long as the work folder is there (`keep_work`). The "ridge" objective needs `second_moment`.
        batch_size: images at a time.
        dataset, dataset_name, split, revision: what to match; see `dsco_hf.data.datasets.load_image_dataset`.
        test_split, holdout: what is not matched, see recipes/train_classifier.py.
        streaming: read the dataset row by row, without downloading or converting the whole.
        on_error: "skip" images that cannot be decoded, which are named, or "raise" an error.
        image_column, label_column, mapping: see `MatchingTargets.from_dataset`; `mapping` is a label set or
            a YAML file.
        decode_threads: threads of a process that decode images; its share of the cores if none.
        data_free: match samples of the generator, and read no real image.
        class_labels: the generator's classes, for data-free targets; all if none.
        samples_per_class, weighting, num_inference_steps, guidance_scale, eta: see `MatchingTargets.from_generator`.
        resume: go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.
        output_dir: the targets' folder, with results.json.
        keep_work: leave the features there.
    """

    generator: str
    generator_revision: str | None = None
    classifier: str | None = None
    classifier_revision: str | None = None
    dtype: str = "float32"
    features: str | None = None
    embedding_dim: int = 2048
    bandwidth: float | None = None
    second_moment: bool = False
    seed: int = 0
    batch_size: int = 256
    dataset: str | None = None
    dataset_name: str | None = None
    split: str = "train"
    test_split: str = "auto"
    holdout: float = 0.2
    revision: str | None = None
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    on_error: str = "skip"
    mapping: str | None = None
    decode_threads: int | None = None
    data_free: bool = False
    class_labels: list[str] = field(default_factory=list)
    samples_per_class: int = 200
    weighting: str = "confidence"
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    eta: float = 1.0
    resume: bool = True
    output_dir: str = "outputs/targets"
    keep_work: bool = False


DATA = ("image_column", "label_column", "on_error", "mapping", "decode_threads")
DRAWING = ("samples_per_class", "weighting", "num_inference_steps", "guidance_scale", "eta")
COMMON = ("embedding_dim", "bandwidth", "second_moment", "seed", "batch_size")


def main(arguments: list[str] | None = None) -> None:
    """Reads the config, makes the targets, and saves them with the results."""
    recipe = parse_config(TargetsRecipe, arguments, description=__doc__)
    if recipe.data_free == (recipe.dataset is not None):
        raise ValueError("Give either `dataset`, the images to match, or `data_free`, to match the generator's own.")
    if recipe.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {recipe.dtype!r}.")
    check_made(Path(__file__).parent, {"generator": recipe.generator, "classifier": recipe.classifier})
    accelerator = make_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    output = Path(recipe.output_dir).absolute()
    work = output.with_name(f"{output.name}-work")  # beside, so that it is never published
    check_anew(recipe.resume, accelerator, [work])
    pipe = load_pipeline(recipe, accelerator)
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
        spent = None if continued else seconds
        save_results(recipe, targets, splits, accelerator, spent, output / "results.json")
        if not recipe.keep_work:
            shutil.rmtree(work)
        print(f"Saved targets of {targets.num_classes} classes to {output} after {seconds:.1f} s.")
    accelerator.end_training()


def load_pipeline(recipe: TargetsRecipe, accelerator: Accelerator) -> DsCoPipeline:
    """The generator with the classifier."""
    dtype = getattr(torch, recipe.dtype)
    parts: dict[str, Any] = {}
    with accelerator.main_process_first():  # one process downloads, the others read its cache
        if recipe.classifier is not None:
            parts["classifier"] = load_classifier(recipe.classifier, revision=recipe.classifier_revision, dtype=dtype)
        pipe = DsCoPipeline.from_pretrained(recipe.generator, revision=recipe.generator_revision, dtype=dtype, **parts)
    return pipe.to(accelerator.device)


def make_targets(
    recipe: TargetsRecipe, pipe: DsCoPipeline, accelerator: Accelerator, work: Path
) -> tuple[MatchingTargets, dict[str, Any]]:
    """The targets, by all processes together, and which images were matched and which left out."""
    shared: dict[str, Any] = {name: getattr(recipe, name) for name in COMMON}
    shared |= {"features": recipe.features, "accelerator": accelerator, "work_dir": work}
    if recipe.data_free:
        options = {name: getattr(recipe, name) for name in DRAWING}
        return MatchingTargets.from_generator(pipe, recipe.class_labels or None, **options, **shared), {}
    with accelerator.main_process_first():
        dataset, _, splits = load_splits(
            str(recipe.dataset),
            recipe.dataset_name,
            train_split=recipe.split,
            test_split=recipe.test_split,
            holdout=recipe.holdout,
            label_column=recipe.label_column,
            revision=recipe.revision,
            streaming=recipe.streaming,
        )
    options = {name: getattr(recipe, name) for name in DATA}
    return MatchingTargets.from_dataset(dataset, pipe, **options, **shared), splits


def save_results(
    recipe: TargetsRecipe,
    targets: MatchingTargets,
    splits: dict[str, Any],
    accelerator: Accelerator,
    seconds: float | None,
    path: Path,
) -> None:
    """Writes what was made of what, and how long it took, unless it was made in several sessions."""
    provenance = targets.provenance
    images = provenance.get("images") or provenance["samples_per_class"] * targets.num_classes
    results = {
        "config": dataclasses.asdict(recipe),
        "splits": splits,
        "images": images,
        "seconds": seconds and round(seconds, 2),
        "images_per_second": seconds and round(images / seconds, 1),
        "classes": targets.num_classes,
        "feature_dim": targets.feature_dim,
        "bandwidth": targets.bandwidth,
        "provenance": provenance,
        **run_environment(accelerator),
    }
    write_atomically(path, (json.dumps(results, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
