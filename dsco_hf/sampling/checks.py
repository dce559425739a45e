"""What a pipeline call can work with. Errors say what came, what is allowed, and the likely fix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from ..generators.failures import cannot_run
from ..matching.objectives import MATCHING, OBJECTIVES
from ..matching.targets import MatchingTargets
from ..utils.values import check_choice, check_real
from .released import QuantileTargets


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LOOKAHEADS = ("conditional", "guided", "none")


def check_call(
    pipe: DiffusionPipeline,
    *,
    ids: Sequence[int],
    plan: Any,
    guidance_scale: float,
    eta: float,
    optimize_from: float,
    optimize_until: float,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
    tensor_inputs: Sequence[str] | None,
) -> None:
    """Raises ValueError for arguments of [`DsCoPipeline.__call__`] that cannot work."""
    if not ids:
        raise ValueError("`class_labels` is empty: pass one class per image, for example `[0, 0, 1, 1]`.")
    check_choice("objective", plan.objective, OBJECTIVES)
    check_choice("output_type", output_type, OUTPUT_TYPES)
    check_choice("lookahead", plan.lookahead, LOOKAHEADS)
    for name, value, high in (
        ("eta", eta, 1),
        ("optimize_from", optimize_from, 1),
        ("optimize_until", optimize_until, 1),
        ("guidance_scale", guidance_scale, math.inf),
        ("step_size", plan.step_size, math.inf),
        ("step_decay", plan.step_decay, 1),
        ("contrast", plan.contrast, math.inf),
    ):
        check_real(name, value, 0, high)
    if optimize_from > optimize_until:
        raise ValueError(f"`optimize_from={optimize_from}` must not exceed `optimize_until={optimize_until}`.")
    if isinstance(generator, list | tuple) and len(generator) != len(ids):
        raise ValueError(
            f"Got {len(generator)} generators for {len(ids)} images: pass one per image, or a single one."
        )
    check_real("regularization", plan.regularization, 0, open_low=True)
    for name in tensor_inputs or []:
        check_choice("callback_on_step_end_tensor_inputs", name, pipe._callback_tensor_inputs)
    if latents is not None:
        shape = (len(ids), *pipe.latent_shape)
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` must have shape {shape} (images, channels, height, width), got {tuple(latents.shape)}."
            )
    pipe.family.check_guidance(guidance_scale)
    channels = pipe.latent_shape[0]
    if pipe.vae is None and channels not in (1, 3) and output_type != "latent":
        raise ValueError(
            f"The generator draws {channels} channels, which is no image, and there is no VAE: pass `vae=...`, "
            "the AutoencoderKL that it was trained with, or `output_type='latent'`."
        )
    check_components(pipe, uses_classifier=plan.active and plan.objective != "quantile")
    if plan.active:
        check_targets(pipe, plan)


def check_components(pipe: DiffusionPipeline, *, uses_classifier: bool) -> None:
    """Raises ValueError for components that cannot work, or would give other images each time."""
    if not isinstance(pipe.scheduler, DDIMScheduler):
        raise ValueError(
            f"The scheduler is a {type(pipe.scheduler).__name__}; noise from outside needs a DDIMScheduler: set "
            "`pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`."
        )
    kind = pipe.family.component
    names = [kind, "vae", "preview_vae"] + ["classifier", "classifier_2"] * uses_classifier
    for name in names:
        component = getattr(pipe, name)
        if component is not None and component.training:
            raise ValueError(
                f"`{name}` is in train mode, where dropout and batch statistics change its output: call "
                f"`pipe.{name}.eval()` first."
            )
    pipe.family.check_size()
    for name in names:
        component = getattr(pipe, name)
        reason = None if component is None else cannot_run(component.dtype, pipe._execution_device)
        if reason is not None:
            raise ValueError(
                f"The device {pipe._execution_device} cannot run `{name}` in {component.dtype} ({reason}): load the "
                "pipeline with `dtype=torch.bfloat16` or in float32, `pipe.to(torch.float32)`."
            )
    channels = pipe.latent_shape[0]
    for name in ("vae", "preview_vae"):
        decoder = getattr(pipe, name)
        if decoder is not None and decoder.config.latent_channels != channels:
            label = "VAE" if name == "vae" else "preview VAE"
            raise ValueError(
                f"The {label} has {decoder.config.latent_channels} latent channels, the {kind} takes {channels}: load "
                f"the VAE that the {kind} was trained with."
            )


def check_targets(pipe: DiffusionPipeline, plan: Any) -> None:
    """Raises ValueError if the objective, the targets and the classifier do not fit together."""
    wanted = {"quantile": QuantileTargets, **dict.fromkeys(MATCHING, MatchingTargets)}.get(plan.objective)
    if wanted is None:
        if plan.targets is not None:
            raise ValueError(
                "The 'classifier' objective uses no targets: leave `targets` out, or choose objective='rkhs'."
            )
        if pipe.classifier is None:
            raise ValueError("The 'classifier' objective needs a classifier: load the pipeline with `classifier=...`.")
        return
    if not isinstance(plan.targets, wanted):
        raise ValueError(
            f"objective={plan.objective!r} takes {wanted.__name__}, got {type(plan.targets).__name__}: make them with "
            f"`{wanted.__name__}.from_dataset(dataset, pipe)`."
        )
    if isinstance(plan.targets, MatchingTargets):
        plan.targets.check_pipeline(pipe)
        if plan.objective == "ridge":
            check_ridge_targets(plan.targets)


def check_ridge_targets(targets: MatchingTargets) -> None:
    """Raises ValueError for targets that the "ridge" objective cannot work with."""
    if targets.num_classes < 2:
        raise ValueError(
            f"objective='ridge' tells classes apart, and the targets have only {targets.class_names}: choose "
            "objective='rkhs'."
        )
    if targets.second_moment is None:
        raise ValueError(
            "objective='ridge' takes targets with a second moment, and these have none: make them with "
            "`MatchingTargets.from_dataset(dataset, pipe, second_moment=True)`."
        )
