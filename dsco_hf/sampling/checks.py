"""What a pipeline call can work with. Errors say what came, what is allowed, and the likely fix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ..generators.failures import cannot_run
from ..generators.steps import PREDICTIONS, check_fits, is_flow
from ..utils.values import check_choice, check_whole
from .call import Sampling


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_call(
    pipe: DiffusionPipeline,
    ids: Sequence[int],
    targets: object,
    sampling: Sampling,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: torch.Tensor | None,
    output_type: str,
    tensor_inputs: Sequence[str] | None,
) -> None:
    """Raises ValueError for arguments of [`DsCoPipeline.__call__`] that cannot work; latents are `(B, C, h, w)`."""
    if not ids:
        raise ValueError("`class_labels` is empty: pass one class per image, for example `[0, 0, 1, 1]`.")
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if isinstance(generator, list | tuple) and len(generator) != len(ids):
        raise ValueError(
            f"Got {len(generator)} generators for {len(ids)} images: pass one per image, or a single one."
        )
    for name in tensor_inputs or []:
        check_choice("callback_on_step_end_tensor_inputs", name, pipe._callback_tensor_inputs)
    guidance_scale = sampling.guidance_scale
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
    check_components(pipe, uses_classifier=sampling.method.uses_classifier)
    sampling.method.check(pipe, targets)


def check_targets(targets: object) -> None:
    """Raises TypeError for anything but targets (which name their classes and the generator's) or None."""
    if targets is not None and not (hasattr(targets, "class_names") and hasattr(targets, "class_labels")):
        raise TypeError(
            f"`targets` must be targets or None, got {type(targets).__name__}. Make them of real images with "
            "`MatchingTargets.from_dataset(dataset, pipe)`, data-free with `MatchingTargets.from_generator(pipe)`."
        )


def check_smaller(image_size: int, drawn: int) -> None:
    """Raises ValueError unless images that are drawn so large can be brought to `image_size`."""
    if check_whole("image_size", image_size, 1) > drawn:
        raise ValueError(
            f"`image_size={image_size}` is more than the generator draws, {drawn}, and would only be blurred: give "
            f"at most {drawn}, or leave it out."
        )


_NEEDED = {  # by component: what it must have, of its config or of itself, and what that is
    "scheduler": ("set_timesteps", "a DDIMScheduler or FlowMatchEulerDiscreteScheduler of diffusers"),
    "vae": ("decode", "an AutoencoderKL of diffusers"),
    "preview_vae": ("decode", "an AutoencoderTiny of diffusers"),
    "classifier": ("num_labels", "an image classifier of transformers"),
    "classifier_2": ("num_labels", "an image classifier of transformers"),
}


def check_kinds(**components: object) -> None:
    """Raises TypeError for a component that is something else than its place says, by position for example."""

    def fits(component: object, place: str) -> bool:
        return any(hasattr(part, _NEEDED[place][0]) for part in (component, getattr(component, "config", None)))

    for name, component in components.items():
        if component is not None and not fits(component, name):
            others = [place for place in _NEEDED if fits(component, place)]
            advice = f"pass it by name, `{others[0]}=...`" if others else "pass components by name"
            raise TypeError(f"`{name}` must be {_NEEDED[name][1]}, got {type(component).__name__}: {advice}.")


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises ValueError for a scheduler of unknown steps, made of one of the other kind, or that ends in noise."""
    config, kind = scheduler.config, type(scheduler).__name__
    predicts = config.get("prediction_type", "epsilon")
    flows = ("flow", "flow_prediction")
    of_flow = kind.startswith("FlowMatch") or predicts in flows or config.get("use_flow_sigmas")
    diffusion = {"beta_start", "beta_end", "beta_schedule", "prediction_type"} & set(config)
    flow = {"shift", "use_dynamic_shifting", "base_image_seq_len", "stochastic_sampling"} & set(config)
    if not config.get("use_dynamic_shifting"):  # solvers of diffusion have it as well, turned off
        flow -= {"use_dynamic_shifting"}
    if not is_flow(scheduler) and (of_flow or (isinstance(scheduler, DDIMScheduler) and flow)):
        shift = config.get("flow_shift") or config.get("shift", 1.0)
        told = f"prediction_type={predicts!r}" if predicts != "epsilon" else f"{sorted(flow)}"
        raise ValueError(
            f"The scheduler, a {kind}, is of a flow ({told}), whose steps are those of another class: set "
            f"`pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift={shift})`."
        )
    if not isinstance(scheduler, DDIMScheduler | FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"The scheduler is a {kind}; noise from outside needs a DDIMScheduler: set "
            "`pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`."
        )
    if is_flow(scheduler) and diffusion and predicts not in flows:
        raise ValueError(
            f"The scheduler, a {kind}, was made of one of diffusion ({sorted(diffusion)}), and the generator does not "
            "predict the velocity of a flow: set `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`."
        )
    if not is_flow(scheduler):
        check_choice("prediction_type", predicts, PREDICTIONS[:3])
    elif config.invert_sigmas:
        raise ValueError(
            "The scheduler's noise levels end at σ = 1, pure noise, and an image is at σ = 0: leave "
            "`invert_sigmas=True` out."
        )


def check_components(pipe: DiffusionPipeline, *, uses_classifier: bool) -> None:
    """Raises ValueError for components that cannot work, or would give other images each time."""
    check_scheduler(pipe.scheduler)
    check_fits(pipe.scheduler, type(pipe.denoiser).__name__, pipe.family.flow)
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
