"""What a search will cost, before it starts: trainings, steps, and time on this machine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from ...evaluators.evaluation import evaluator_builder
from ...evaluators.training import Execution, train_evaluator
from .checks import check_plan, check_trainable
from .find import HALF_SEEDS, length_in_steps, with_length
from .options import SearchOptions


MEASURED_STEPS = 10


def plan_search(options: SearchOptions, processes: Sequence[int], accelerator: Accelerator) -> dict[str, Any]:
    """Counts the trainings of a search, and measures a few steps of one on this machine.

    Args:
        options ([`SearchOptions`]): of the search.
        processes (sequence of `int`): numbers of processes that share the trainings, each as fast as this one.
        accelerator (`Accelerator`): where steps are measured.

    Returns:
        `dict`: `trainings` of the reference, half as long and of fewer images, `steps` of a training of full length,
            `seconds_per_training`, and `seconds` by number of processes, both at most.

    Raises:
        ValueError: for what the search itself would refuse before its first training.
    """
    given = options.load()
    real, teacher = given.real, given.teacher
    build = evaluator_builder(options.architecture, real, given.protocol, **options.overrides)
    network = build()
    check_trainable(network, given.protocol, teacher, real, given.test, given.small)
    plan = check_plan(options.plan, 0 if given.small is None else len(given.small.labels), len(real.labels))
    fixed = with_length(given.protocol.for_model(len(real.names), network.config.model_type), options.length, real)
    steps = length_in_steps(fixed, len(real.labels))
    for few in (2, MEASURED_STEPS):  # the first steps warm up
        short, begun = dataclasses.replace(fixed, steps=few, epochs=None), time.monotonic()
        done = train_evaluator(build, real, protocol=short, test=given.test, teacher=teacher,
                               execution=Execution(accelerator, compiled=options.compile))  # fmt: skip
        beside = time.monotonic() - begun - done.seconds  # a network that is built and tested
    each = done.seconds / few * steps + beside
    first, left = len(plan.first_shares), plan.trainings - len(plan.first_shares)

    def rounds(shared: int) -> float:
        """Trainings one after another, in units of full length: the rest may be shared out to two looks."""
        looks = math.ceil(left / shared) + (shared > 1)
        halves = math.ceil(HALF_SEEDS / shared) / 2
        return math.ceil(plan.reference_seeds / shared) + halves + math.ceil(first / shared) + looks

    return {
        "trainings": {"reference": plan.reference_seeds, "half as long": HALF_SEEDS, "fewer images": plan.trainings},
        "images": len(real.labels),
        "length": options.length,
        "steps": steps,
        "seconds_per_training": each,
        "seconds": {shared: rounds(shared) * each for shared in processes},
    }


def planned_table(found: dict[str, Any]) -> str:
    """The cost in Markdown."""
    counts, shorter = found["trainings"], found["length"] == "same epochs"
    lines = [
        f"Up to {counts['reference'] + counts['fewer images']} trainings: {counts['reference']} on all "
        f"{found['images']:,} images (and {counts['half as long']} half as long), at most {counts['fewer images']} on "
        f"fewer. {found['steps']:,} steps each{' at most' if shorter else ''}, {found['length']}; a training on all "
        f"images takes {found['seconds_per_training']:.0f} s here, by {MEASURED_STEPS} measured steps.",
        "",
        "| processes | time at most |",
        "| ---: | ---: |",
    ]
    lines += [f"| {shared} | {seconds / 3600:.2f} h |" for shared, seconds in found["seconds"].items()]
    return "\n".join(lines)
