"""DsCoPipeline: a class-conditional diffusion pipeline whose sampling noise is optimised (NOpt), models frozen."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel

from ..data.labels import ClassLookup, class_mapping
from ..data.schema import nearest
from ..generators.base import Denoiser, denoiser_of
from ..generators.denoisers import SLOTS, as_components, with_slots
from ..generators.failures import FiniteWatch, explained_out_of_memory, refuse_nonfinite
from ..generators.latents import decode, encode, to_output
from ..matching.features import ensure_preprocessing
from ..matching.objectives import ClassifierObjective
from ..matching.targets import MatchingTargets
from ..utils.values import LARGEST_SEED, check_whole, plain_arguments
from .checks import check_call
from .loading import StoredPipeline
from .nopt import NoiseOptimizationMixin
from .plan import NoisePlan, optimized_steps, usable_eta
from .released import QuantileTargets


logger = logging.getLogger(__name__)


@dataclasses.dataclass
class DsCoPipelineOutput(BaseOutput):
    """Output of [`DsCoPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): B images; arrays are `(B, H, W, C)` in [0,
            1], tensors `(B, C, H, W)` in [0, 1], latents as they are.
        class_labels (`list[int]`): the generator's class of each image.
        discrepancies (`torch.Tensor` of shape `(S, K)`): the objective per class (ascending) at each of the S
            optimised steps, as predicted before the noise was moved; `(0, K)` for plain sampling.
        denoiser_calls, decoder_calls, classifier_calls (`int`): images that passed through the denoiser (twice per
            guided step), the decoder and the classifier.
    """

    images: Any
    class_labels: list[int]
    discrepancies: torch.Tensor
    denoiser_calls: int
    decoder_calls: int
    classifier_calls: int


class DsCoPipeline(NoiseOptimizationMixin, StoredPipeline):
    r"""Pipeline for dataset concentration: draws images of given classes whose features match those of whole classes.

    Noise optimisation (NOpt) follows "Beyond Dataset Distillation: Lossless Dataset Concentration via
    Diffusion-Assisted Distribution Alignment" (arXiv 2603.27987); the denoiser, decoder and classifier are frozen, and
    no gradient passes through the denoiser. Without targets this is plain ancestral sampling.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    (downloading, saving, running on a particular device, etc.).

    Parameters:
        denoiser ([`ModelMixin`], *optional*): class-conditional noise predictor of any family that is known, see
            [`Denoiser`]; learned variances are ignored. It becomes the component of its family: `transformer` for a
            [`DiTTransformer2DModel`], `unet` for a [`UNet2DModel`], and may be passed by that name instead.
        scheduler ([`DDIMScheduler`]): the only scheduler that takes its noise from outside and predicts the clean
            sample.
        vae ([`AutoencoderKL`], *optional*): decodes latents; None for a generator in pixel space.
        classifier ([`PreTrainedModel`], *optional*): any image classifier of transformers; its features are matched.
        id2label (`dict[int, str]`, *optional*): names of the generator's classes.
        preview_vae ([`AutoencoderTiny`], *optional*): a cheap decoder of the same latents, used while noise is
            optimised.
        classifier_2 ([`PreTrainedModel`], *optional*): a second classifier, whose features are matched together with
            those of the first by targets that name it (`FeatureSpec(network="classifier_2")`).

    Speed and memory, by what diffusers has:

    - `pipe.to(torch.bfloat16)`: latents, noise, features and objective stay in float32.
    - `pipe.denoiser.compile()`: compiled in place; saved and loaded as if it were not.
    - `batch_size` of a call bounds the memory of the gradient; `pipe.vae.enable_slicing()` and
      `pipe.vae.enable_tiling()` (also of `preview_vae`) bound that of decoding.
    - `pipe.enable_model_cpu_offload()`: the classifiers and the preview decoder stay on the device, as they are asked
      in every optimised step. Without a preview decoder, denoiser and VAE change places in each: right, but slow.
    """

    model_cpu_offload_seq = "->".join((*SLOTS, "vae"))
    # denoiser and scheduler are optional to diffusers only: its own error for a missing one does not tell the fix
    _optional_components = [*SLOTS, "scheduler", "vae", "classifier", "preview_vae", "classifier_2"]
    _exclude_from_cpu_offload = ["classifier", "classifier_2", "preview_vae"]
    _callback_tensor_inputs = ["latents", "noise"]

    @with_slots
    def __init__(
        self,
        denoiser: ModelMixin | None = None,
        scheduler: DDIMScheduler | None = None,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        classifier: PreTrainedModel | None = None,
        id2label: dict[str, str] | dict[int, str] | None = None,
        preview_vae: AutoencoderTiny | AutoencoderKL | None = None,
        classifier_2: PreTrainedModel | None = None,
        **slots: ModelMixin | None,
    ) -> None:
        super().__init__()
        components = as_components(denoiser, slots)
        if scheduler is None:
            raise ValueError(
                "The pipeline has no scheduler: pass `scheduler=DDIMScheduler(...)` with the noise levels of the "
                "training."
            )
        self.register_modules(
            **components, scheduler=scheduler, vae=vae, classifier=classifier, preview_vae=preview_vae,
            classifier_2=classifier_2,
        )  # fmt: skip
        self.register_to_config(id2label={str(key): value for key, value in (id2label or {}).items()})
        self.id2label = {int(key): value for key, value in (id2label or {}).items()}
        self.labels = {
            name.strip(): key for key, value in self.id2label.items() for name in (value, *value.split(","))
        }
        for model in (classifier, classifier_2):
            if model is not None:
                ensure_preprocessing(model)
        self._batch_size, self._calls = sys.maxsize, dict.fromkeys(("denoiser", "decoder", "classifier"), 0)
        self._plan: Any = None
        self._callback: Callable | None = None
        self._watch: FiniteWatch | None = None

    @property
    def denoiser(self) -> Any:
        """The noise predictor, whatever component it is; None if it was taken out."""
        return next((network for slot in SLOTS if (network := getattr(self, slot)) is not None), None)

    @property
    def family(self) -> Denoiser:
        """What is particular to the noise predictor's family."""
        return denoiser_of(self.denoiser, self.id2label)

    @property
    def num_classes(self) -> int:
        """Number of classes of the generator, without the null class."""
        return self.family.num_classes

    @property
    def null_class(self) -> int | None:
        """Index of the class that stands for none; None if the generator has none."""
        return self.family.null_class

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the denoiser draws: latents, or pixels."""
        return self.family.sample_shape

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent side; 1 in pixel space."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.latent_shape[1] * self.vae_scale_factor

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.latent_shape[0] if self.vae is None else self.vae.config.out_channels

    @property
    def num_timesteps(self) -> int:
        """Sampling steps of the last call."""
        return self._num_timesteps

    def get_label_ids(self, class_labels: Sequence[int | str]) -> list[int]:
        """Indices of classes given by index, by name (any of ImageNet's comma-separated synonyms) or by WordNet id.

        Raises:
            ValueError: for a class that the generator does not know, with the nearest names, or a name that fits
                several, with the choices.
        """
        if isinstance(class_labels, str | int):
            raise ValueError(f"`class_labels` must be a list, got {class_labels!r}: pass `[{class_labels!r}]`.")
        lookup = ClassLookup(self.id2label, self.num_classes)
        ids = []
        for label in class_labels:
            found = lookup.find_typed(label) if isinstance(label, str) else lookup.find(label)
            if not found:
                known = "" if self.labels else " It has no class names (`id2label`): pass indices."
                raise ValueError(f"The generator has no class {label!r}.{nearest(str(label), self.labels)}{known}")
            if len(found) > 1:
                raise ValueError(
                    f"Class {label!r} fits several: {lookup.describe(found)}. Pass an index or WordNet id."
                )
            index = found.pop()
            if not 0 <= index < self.num_classes:
                raise ValueError(
                    f"Class {label!r} is outside the generator's {self.num_classes} classes: pass 0 to "
                    f"{self.num_classes - 1}."
                )
            ids.append(index)
        return ids

    def classifier_labels(self, ids: Sequence[int]) -> list[int]:
        """The classifier's label for each of the generator's classes, matched by name.

        Raises:
            ValueError: if the classifier was trained on other classes.
        """
        distinct, config = list(dict.fromkeys(ids)), self.classifier.config
        names = [self.id2label.get(index, str(index)) for index in distinct]
        # names that occur twice are settled by the usual order, if the classifier has it too
        labels = class_mapping(names, config.id2label, config.num_labels, own_labels=distinct, owner="classifier")
        found = dict(zip(distinct, labels, strict=True))
        return [found[index] for index in ids]

    def check_inputs(self, **inputs: Any) -> None:
        """Refuses arguments that cannot work, see `dsco_hf.sampling.checks.check_call`."""
        check_call(self, **inputs)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, C, h, w)`, or `latents`, on the pipeline's device.

        Latents and noise are float32 whatever the models run in: the steps add what bfloat16 would round away, and a
        seed draws the same noise for all.
        """
        shape, dtype = (batch_size, *self.latent_shape), torch.promote_types(self.denoiser.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor | int, labels: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """ε_θ(x_t, t, c) `(B, C, h, w)`, with classifier-free guidance if `guidance_scale` > 1 (one batched call).

        Passes of at most the call's `batch_size` images.
        """
        if len(latents) > self._batch_size:
            pieces = zip(latents.split(self._batch_size), labels.split(self._batch_size), strict=True)
            return torch.cat([self.predict_noise(x, timestep, y, guidance_scale) for x, y in pieces])
        self._calls["denoiser"] += len(latents) * (2 if guidance_scale > 1 else 1)
        inputs = self.scheduler.scale_model_input(latents, timestep)
        return self.family.predict(inputs, timestep, labels, guidance_scale)

    def decode_latents(self, latents: torch.Tensor, *, preview: bool = False) -> torch.Tensor:
        """Latents `(B, C, h, w)` → pixels `(B, C, H, W)` in about [-1, 1]; gradients reach the latents."""
        decoder = self.preview_vae if preview and self.preview_vae is not None else self.vae
        if decoder is None:
            return latents
        self._calls["decoder"] += len(latents)
        return decode(decoder, latents)

    @torch.no_grad()
    def encode_pixels(
        self, pixels: torch.Tensor, *, generator: torch.Generator | None = None, sample_posterior: bool = True
    ) -> torch.Tensor:
        """Pixels `(B, C, H, W)` in [-1, 1] → latents; the pixels themselves for a generator in pixel space.

        Args:
            pixels (`torch.Tensor`): of the generator's size and channels.
            generator (`torch.Generator`, *optional*): of the draw from the posterior.
            sample_posterior (`bool`): draw from the VAE's posterior, or take its mode.

        Raises:
            ValueError: for images of another size than the generator's.
        """
        shape = (self.num_channels, self.image_size, self.image_size)
        if pixels.shape[1:] != shape:
            raise ValueError(
                f"The generator takes images of shape {shape} (channels, height, width), got "
                f"{tuple(pixels.shape[1:])}: resize them to {self.image_size} pixels."
            )
        if self.vae is None:
            return pixels
        # not `vae.device`: an offloaded VAE waits on the CPU until it is called
        pixels = pixels.to(self._execution_device)
        return encode(self.vae, pixels, generator=generator, sample_posterior=sample_posterior)

    def sample(
        self,
        class_labels: Sequence[int],
        targets: MatchingTargets | QuantileTargets | None = None,
        *,
        seeds: Sequence[int],
        **options: Any,
    ) -> DsCoPipelineOutput:
        """One call without its own progress bar and one seed per image; images as tensors `(B, C, H, W)` in [0, 1]."""
        generators = [torch.Generator().manual_seed(check_whole("seeds", seed, 0, LARGEST_SEED)) for seed in seeds]
        shown = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(**shown | {"disable": True})
        try:
            output = self(list(class_labels), targets, generator=generators, output_type="pt", **options)
            return cast(DsCoPipelineOutput, output)
        finally:
            self.set_progress_bar_config(**shown)

    @plain_arguments(num_inference_steps=1, optimization_steps=0, batch_size=1)
    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        targets: MatchingTargets | QuantileTargets | None = None,
        *,
        objective: str = "rkhs",
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        eta: float = 1.0,
        optimization_steps: int | None = None,
        step_size: float = 1.0,
        step_decay: float = 0.25,
        optimize_from: float = 0.6,
        optimize_until: float = 1.0,
        lookahead: str = "conditional",
        contrast: float = 0.0,
        regularization: float = 2.0,
        classifier_objective: ClassifierObjective | None = None,
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DsCoPipelineOutput | tuple:
        r"""Draws one image per entry of `class_labels`; those of one class are optimised jointly.

        Args:
            class_labels (sequence of `int` or `str`): the generator's classes, by index or name.
            targets ([`MatchingTargets`], *optional*): what each class has to match; plain sampling if None (and the
                objective is not "classifier"). The "quantile" objective takes [`QuantileTargets`].
            objective (`str`): "rkhs" (kernel mean matching), "ridge" (what a ridge regression learns from the images,
                for a few images of several classes), "quantile" (the released algorithm) or "classifier" (class
                evidence only, no targets).
            guidance_scale (`float`): classifier-free guidance; 1 is off.
            num_inference_steps (`int`): sampling steps.
            eta (`float`): 1 is ancestral sampling; smaller values leave less noise to optimise, 0 none.
            optimization_steps (`int`, *optional*): noise updates per sampling step; 1 if None (200 for "quantile"). 0
                is plain sampling.
            step_size (`float`): η, length of the first update in units of the noise's norm.
            step_decay (`float`): the last optimised step's update is this times `step_size`, in between it falls
                evenly: coarse moves first, fine ones at the end.
            optimize_from (`float`): where noise optimisation begins, as a fraction of the sampling steps. Late steps
                do nearly all of the work.
            optimize_until (`float`): where it ends, likewise; the last step has no noise.
            lookahead (`str`): how the images are predicted from x_{t-1}: "conditional" asks the denoiser again without
                guidance, "guided" with, "none" reuses its last answer, at no cost.
            contrast (`float`): γ of "rkhs": a class aims at μ_c + γ (μ_c - μ̄), away from the mean over all classes. 0
                matches the class itself, which suits all but the smallest sets. At one image per class, values like 2
                (digits) and 8 (CIFAR-10 at 16 px) train better evaluators.
            regularization (`float`): λ of "ridge", see [`ridge`]. On validation data of CIFAR-10
                at 16 px, 2 suited 1, 10 and 50 images per class.
            classifier_objective ([`ClassifierObjective`], *optional*): weights of the "classifier" objective.
            previous (`tuple`, *optional*): of images that are in the set already: embedding sums `(C, D)` and counts
                `(C,)`, or for "ridge" their embeddings `(n, D)` and rows of the targets `(n,)`.
            batch_size (`int`, *optional*): images per pass through denoiser, decoder and classifier; all at once if
                None. Memory grows with it; the joint gradient stays exact.
            generator (`torch.Generator` or list of them, *optional*): with one per image, an image's noise does not
                depend on the others.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): initial noise.
            output_type (`str`): "pil", "np", "pt" or "latent".
            return_dict (`bool`): whether to return a [`DsCoPipelineOutput`] instead of a tuple of its values.
            callback_on_step_end (`Callable`, *optional*): called as `f(pipe, step, timestep, kwargs)` after each step;
                may return changed tensors.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what `kwargs` holds, of "latents" and
                "noise".

        Returns:
            [`DsCoPipelineOutput`] or `tuple`.

        Raises:
            ValueError: for arguments that cannot work; the message says what is allowed.
            NonFiniteError: if the denoiser, the gradient or an image is not finite; names the step and the classes.
        """
        ids = self.get_label_ids(class_labels)
        if optimization_steps is None:
            optimization_steps = 200 if objective == "quantile" else 1
        plan = NoisePlan(
            objective, targets, optimization_steps, step_size, lookahead,
            classifier_objective or ClassifierObjective(), previous, step_decay, contrast,
            regularization,
        )  # fmt: skip
        self.check_inputs(
            ids=ids, plan=plan, guidance_scale=guidance_scale, eta=eta, optimize_from=optimize_from,
            optimize_until=optimize_until, generator=generator, latents=latents, output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._batch_size, self._guidance_scale, self._eta = batch_size or len(ids), guidance_scale, eta
        self._callback, self._callback_inputs = callback_on_step_end, callback_on_step_end_tensor_inputs or ["latents"]
        with explained_out_of_memory(
            len(ids), self._batch_size, latent=self.vae is not None, preview=self.preview_vae is not None
        ):
            self._begin(ids, plan, num_inference_steps, (optimize_from, optimize_until))
            latents = self._denoise(self.prepare_latents(len(ids), generator, latents), ids, generator)
            images = self._finish(latents, ids, output_type)
        discrepancies = torch.stack(self._discrepancies) if self._discrepancies else torch.empty(0, len(set(ids)))
        self._plan = self._watch = self._callback = None
        self.maybe_free_model_hooks()
        counts = (self._calls["denoiser"], self._calls["decoder"], self._calls["classifier"])
        if not return_dict:
            return images, ids, discrepancies, *counts
        return DsCoPipelineOutput(images, ids, discrepancies, *counts)

    def _begin(self, ids: list[int], plan: NoisePlan, num_inference_steps: int, interval: tuple[float, float]) -> None:
        """Sets the state of a call: the plan, the sampling steps and the counts."""
        device = self._execution_device
        self._calls = {"denoiser": 0, "decoder": 0, "classifier": 0}
        self._discrepancies = []
        self._plan = plan
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        self._eta = usable_eta(self.scheduler, self._eta)
        self._watch = FiniteWatch(ids, self.scheduler.timesteps)
        if plan.active and self._eta > 0:
            plan.prepare(self, ids)
            plan.steps = optimized_steps(self._num_timesteps, *interval)

    def _denoise(
        self, latents: torch.Tensor, ids: list[int], generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """All sampling steps: noise `(B, C, h, w)` → clean latents of the same shape."""
        labels, watch = torch.tensor(ids, device=latents.device), cast(FiniteWatch, self._watch)
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                noise_pred = self.predict_noise(latents, t, labels, self._guidance_scale)
                watch.see(i, noise_pred)
                noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
                if i in self._plan.steps:
                    noise = self.optimize_noise(i, latents, noise_pred, noise, labels)
                latents = self.scheduler.step(
                    noise_pred, t, latents, eta=self._eta, use_clipped_model_output=True, variance_noise=noise
                ).prev_sample
                if self._callback is not None:
                    tensors = {name: {"latents": latents, "noise": noise}[name] for name in self._callback_inputs}
                    latents = (self._callback(self, i, int(t), tensors) or {}).get("latents", latents)
                bar.update()
        watch.check()
        return latents

    def _finish(self, latents: torch.Tensor, ids: list[int], output_type: str) -> Any:
        """Decodes, refuses images that are not finite, and converts."""
        images = latents
        if output_type != "latent":
            decoded = (self.decode_latents(part) for part in latents.split(self._batch_size))
            images = torch.cat([(pixels.float() / 2 + 0.5).clamp(0, 1) for pixels in decoded])
        bad = ~images.flatten(1).isfinite().all(dim=1)
        refuse_nonfinite(bad, ids, "The decoded image is", step=None, models="the VAE")
        return to_output(images, output_type)
