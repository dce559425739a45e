"""Makes targets in one of several processes, for tests; started by `accelerate launch`.

    accelerate launch --multi_gpu --num_processes 2 tests/targets_worker.py FOLDER
    python tests/targets_worker.py FOLDER --die_after 3

The targets of every case in `CASES` are written to FOLDER/<case>-<process>. With `--die_after`, the pass of one case
kills itself after that many batches.
"""

import argparse
import os
import signal
from pathlib import Path

from conftest import NAMES, pixel_pipeline, striped_images, tiny_convnet
from dsco_hf import MatchingTargets
from dsco_hf.utils.configs import make_accelerator


SMALL = {"embedding_dim": 64, "second_moment": True, "progress": False}
DRAWN = {"num_inference_steps": 2, "guidance_scale": 1.0, "samples_per_class": 5, "batch_size": 2, **SMALL}


def sorted_images():
    """Class after class, so that some classes are in one shard only."""
    return striped_images((7, 5, 6)).sort("label")


def made_from_dataset(pipe, work_dir=None, **options):
    return MatchingTargets.from_dataset(striped_images(), pipe, batch_size=2, work_dir=work_dir, **SMALL, **options)


def made_from_stream(shards, pipe, work_dir=None, **options):
    stream = sorted_images().to_iterable_dataset(num_shards=shards)
    return MatchingTargets.from_dataset(stream, pipe, batch_size=2, **SMALL, **options)


CASES = {
    "dataset": made_from_dataset,
    "shards": lambda pipe, **options: made_from_stream(2, pipe, **options),
    "examples": lambda pipe, **options: made_from_stream(3, pipe, **options),
    "one-image": lambda pipe, work_dir=None, **options: MatchingTargets.from_dataset(
        striped_images((1,), names=("square",)), pipe, **SMALL, **options
    ),
    "generator": lambda pipe, work_dir=None, **options: MatchingTargets.from_generator(
        pipe, list(NAMES), **DRAWN, **options
    ),
    "resumed": made_from_dataset,
}


def kill_after(classifier, batches):
    """Ends this process as the kernel would, in the middle of a pass."""
    seen = []

    def count(module, inputs):
        seen.append(len(inputs[0]))
        if len(seen) > batches:
            os.kill(os.getpid(), signal.SIGKILL)

    classifier.register_forward_pre_hook(count)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die_after", type=int)
    options = parser.parse_args()
    pipe = pixel_pipeline(classifier=tiny_convnet())
    if options.die_after is not None:
        kill_after(pipe.classifier, options.die_after)
        made_from_dataset(pipe, work_dir=options.folder)
        return
    accelerator = make_accelerator()
    for name, make in CASES.items():
        work_dir = options.folder / "work" if name == "resumed" else None
        targets = make(pipe, work_dir=work_dir, accelerator=accelerator)
        targets.save_pretrained(options.folder / f"{name}-{accelerator.process_index}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
