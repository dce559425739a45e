"""DsCoPipeline: a class-conditional diffusion pipeline whose sampling noise is optimised (NOpt), models frozen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel

from ..data.images import to_unit
from ..evaluators.preprocessing import ensure_preprocessing
from ..generators.base import Denoiser, denoiser_of
from ..generators.denoisers import ENCODERS, SLOTS, as_components, with_slots
from ..generators.failures import explained_out_of_memory, refuse_nonfinite
from ..generators.latents import Output, decode, encode, resized, to_output
from ..generators.prompts import Prompts
from ..matching.objectives import Objective
from ..utils.values import LARGEST_SEED, check_whole
from .call import Call, Sampling, SamplingMethod, Targets, calls
from .checks import check_call, check_kinds, check_smaller
from .hosts import HostedPipeline
from .methods import NOpt as NOpt  # methods are known by name once they are imported
from .peers import MGD3 as MGD3


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
        denoiser_calls (`int`): images that passed through the denoiser, twice per guided step.
        decoder_calls (`int`): images that passed through the decoder.
        classifier_calls (`int`): images that passed through classifiers.
        weights (`list[float]`, *optional*): how much each image counts in training, of a method that weighs them.
    """

    images: Any
    class_labels: list[int]
    discrepancies: torch.Tensor
    denoiser_calls: int
    decoder_calls: int
    classifier_calls: int
    weights: list[float] | None = None


class DsCoPipeline(HostedPipeline):
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
        scheduler ([`DDIMScheduler`] or [`FlowMatchEulerDiscreteScheduler`]): the noise levels of the training, of
            diffusion or of flow matching, and what the denoiser predicts. Steps are those of [`Steps`].
        vae ([`AutoencoderKL`], *optional*): decodes latents; None for a generator in pixel space.
        classifier ([`PreTrainedModel`], *optional*): any image classifier of transformers; its features are matched.
        id2label (`dict[int, str]`, *optional*): names of the generator's classes.
        preview_vae ([`AutoencoderTiny`], *optional*): a cheap decoder of the same latents, used while noise is
            optimised.
        classifier_2 ([`PreTrainedModel`], *optional*): a second classifier, whose features are matched together with
            those of the first by targets that name it (`FeatureSpec(network="classifier_2")`).
        prompts ([`Prompts`], *optional*): the encoded prompts of the classes, for a denoiser of a text-to-image model;
            or what they are made of by the encoders, with further options of [`DsCoPipeline.encode_prompts`].
        image_size (`int`, *optional*): height and width of the images, if they are to be smaller than they are drawn:
            they are resized, antialiased, before anything sees or stores them.

    Speed and memory, by what diffusers has:

    - `pipe.to(torch.bfloat16)`: latents, noise, features and objective stay in float32.
    - `pipe.denoiser.compile()`: compiled in place; saved and loaded as if it were not.
    - `batch_size` of a call bounds the memory of the gradient; `pipe.vae.enable_slicing()` and
      `pipe.vae.enable_tiling()` (also of `preview_vae`) bound that of decoding.
    - `pipe.enable_model_cpu_offload()`: the classifiers and the preview decoder stay on the device, as they are asked
      in every optimised step. Without a preview decoder, denoiser and VAE change places in each: right, but slow.
    """

    model_cpu_offload_seq = "->".join((*(name for name in ENCODERS if "tokenizer" not in name), *SLOTS, "vae"))
    # denoiser and scheduler are optional to diffusers only: its own error for a missing one does not tell the fix
    _optional_components = [
        *SLOTS,
        "scheduler",
        "vae",
        "classifier",
        "preview_vae",
        "classifier_2",
        "prompts",
        *ENCODERS,
    ]
    only_prepares = ENCODERS  # no image depends on them once prompts are encoded: runs go on without
    _exclude_from_cpu_offload = ["classifier", "classifier_2", "preview_vae", "prompts"]
    _callback_tensor_inputs = ["latents", "noise"]

    @with_slots
    def __init__(
        self,
        denoiser: ModelMixin | None = None,
        scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler | None = None,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        classifier: PreTrainedModel | None = None,
        id2label: dict[str, str] | dict[int, str] | None = None,
        preview_vae: AutoencoderTiny | AutoencoderKL | None = None,
        classifier_2: PreTrainedModel | None = None,
        prompts: Prompts | None = None,
        image_size: int | None = None,
        **slots: Any,
    ) -> None:
        super().__init__()
        encoders = {name: slots.pop(name, None) for name in ENCODERS}
        options = self.prompt_options(slots)
        components = as_components(denoiser, slots)
        if scheduler is None:
            raise ValueError(
                "The pipeline has no scheduler: pass `scheduler=DDIMScheduler(...)` with the noise levels of the "
                "training."
            )
        others = {"vae": vae, "classifier": classifier, "preview_vae": preview_vae, "classifier_2": classifier_2}
        check_kinds(scheduler=scheduler, **others)
        stored = prompts if isinstance(prompts, Prompts) else None
        self.register_modules(**components, scheduler=scheduler, **others, **encoders, prompts=stored)
        self.name_classes({int(key): value for key, value in (id2label or {}).items()})
        self.begin_prompts(prompts, options)
        self.register_to_config(image_size=image_size)
        if image_size is not None:
            check_smaller(image_size, self.drawn_size)
        for model in (classifier, classifier_2):
            if model is not None:
                ensure_preprocessing(model)

    @property
    def denoiser(self) -> ModelMixin:
        """The noise predictor, whatever component it is; None if it was taken out."""
        return next((network for slot in SLOTS if (network := getattr(self, slot)) is not None), None)

    @property
    def family(self) -> Denoiser:
        """What is particular to the noise predictor's family."""
        return denoiser_of(self.denoiser, self.id2label, self.prompts)

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
    def drawn_size(self) -> int:
        """Height and width that the generator draws, in pixels."""
        return self.latent_shape[1] * self.vae_scale_factor

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.config.image_size or self.drawn_size

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.latent_shape[0] if self.vae is None else self.vae.config.out_channels

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
        return latents.to(self._execution_device, dtype)

    @torch.no_grad()
    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor | int, labels: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """ε_θ(x_t, t, c) `(B, C, h, w)`, with classifier-free guidance if `guidance_scale` > 1 (one batched call)."""
        return self.family.predict(latents, timestep, labels, guidance_scale)

    def decode_latents(self, latents: torch.Tensor, *, preview: bool = False) -> torch.Tensor:
        """Latents `(B, C, h, w)` → pixels `(B, C, H, W)` in about [-1, 1]; gradients reach the latents."""
        decoder = self.preview_vae if preview and self.preview_vae is not None else self.vae
        return resized(latents if decoder is None else decode(decoder, latents), self.image_size)

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
        pixels = resized(pixels, self.drawn_size)
        if self.vae is None:
            return pixels
        # not `vae.device`: an offloaded VAE waits on the CPU until it is called
        pixels = pixels.to(self._execution_device)
        return encode(self.vae, pixels, generator=generator, sample_posterior=sample_posterior)

    def start_call(
        self,
        class_labels: Sequence[int | str],
        targets: Targets | None = None,
        sampling: Sampling | None = None,
        *,
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        tensor_inputs: Sequence[str] | None = None,
        indices: Sequence[int] | None = None,
    ) -> Call:
        """What [`DsCoPipeline.__call__`] does first: the state of a call, whose parts can then be called alone.

        Arguments, such as latents `(B, C, h, w)`, and errors are those of the call; `indices` say which image of its
        class each is, counted if None.
        """
        ids = self.get_label_ids(class_labels)
        sampling = (sampling or Sampling()).for_targets(targets)
        check_call(
            self, ids, targets, sampling, generator=generator, latents=latents, output_type=output_type,
            tensor_inputs=tensor_inputs,
        )  # fmt: skip
        return Call(
            self, ids, targets, sampling, generator=generator, latents=latents, previous=previous, indices=indices
        )

    def sample(
        self,
        class_labels: Sequence[int],
        targets: Targets | None = None,
        *,
        seeds: Sequence[int],
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
        output_type: str = "pt",
        indices: Sequence[int] | None = None,
        **options: object,
    ) -> DsCoPipelineOutput:
        """One call without its own progress bar and one seed per image; images as tensors `(B, C, H, W)` in [0, 1].

        `indices` are as of `start_call`, options those of [`Sampling.of`].
        """
        generators = [torch.Generator().manual_seed(check_whole("seeds", seed, 0, LARGEST_SEED)) for seed in seeds]
        given: dict[str, Any] = {"previous": previous, "generator": generators, "output_type": output_type}
        given["indices"] = indices
        call = self.start_call(list(class_labels), targets, Sampling.of(**options), **given)
        return self.draw(call, output_type)

    def __call__(
        self,
        class_labels: Sequence[int | str],
        targets: Targets | None = None,
        *,
        method: SamplingMethod | Sampling | str | None = None,
        objective: Objective | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        batch_size: int | None = None,
        previous: tuple[torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, float, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> DsCoPipelineOutput | tuple:
        r"""Draws one image per entry of `class_labels`; those of one class are optimised jointly.

        Args:
            class_labels (sequence of `int` or `str`): the generator's classes, by index or name.
            targets ([`MatchingTargets`], *optional*): what each class has to match, or what else the method takes;
                without, a method that needs them is plain sampling.
            method ([`SamplingMethod`], *optional*): what steers the sampling, an object or a name: [`NOpt`] if None,
                [`Plain`], [`Released`], or one of your own. Also a [`Sampling`], of which the next arguments change
                what they name.
            objective ([`Objective`], *optional*): short for `method=NOpt(objective=...)`; object or name: [`Ridge`]
                (what a ridge regression learns from the images) if None, [`RKHS`] (kernel mean matching, as the paper
                words it), [`ClassifierEvidence`] (without targets), or one of your own.
            num_inference_steps (`int`, *optional*): see [`Sampling`], whose defaults stand for None.
            guidance_scale (`float`, *optional*): likewise.
            eta (`float`, *optional*): likewise.
            batch_size (`int`, *optional*): likewise.
            previous (`tuple`, *optional*): of images that are in the set already: embedding sums `(C, D)` and counts
                `(C,)`, or for "ridge" their embeddings `(n, D)` and rows of the targets `(n,)`.
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
        sampling = Sampling.of(
            method, objective, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, eta=eta,
            batch_size=batch_size,
        )  # fmt: skip
        inputs = callback_on_step_end_tensor_inputs
        call = self.start_call(
            class_labels, targets, sampling, previous=previous, generator=generator, latents=latents,
            output_type=output_type, tensor_inputs=inputs,
        )  # fmt: skip
        with self.progress_bar(total=len(call.timesteps)) as bar:

            def after_step(i: int, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return latents
                tensors = {name: {"latents": latents, "noise": noise}[name] for name in inputs or ["latents"]}
                changed = callback_on_step_end(self, i, call.timesteps[i].item(), tensors) or {}
                return changed.get("latents", latents)

            output = self.draw(call, output_type, after_step)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def draw(
        self, call: Call, output_type: str, after_step: Callable[..., torch.Tensor] = lambda i, latents, noise: latents
    ) -> DsCoPipelineOutput:
        """All of a call that was started, see `start_call`.

        Args:
            call ([`Call`]): keeps what the method left in its state, and the passes that it counted.
            output_type (`str`): as of the call.
            after_step (`Callable`): is told the step, the latents and the noise `(B, C, h, w)`; gives latents back.
        """
        parts = {"latent": self.vae is not None, "preview": self.preview_vae is not None}
        try:
            with explained_out_of_memory(len(call.ids), call.batch_size, **parts):
                images, chosen = self._finish(call, self._denoise(call, after_step), output_type)
        finally:
            self.maybe_free_model_hooks()
        classes = len(set(call.ids))
        discrepancies = torch.stack(call.discrepancies) if call.discrepancies else torch.empty(0, classes)
        weights = call.method.weights(call)[chosen].tolist() if call.method.weighs else None
        return DsCoPipelineOutput(images, call.wanted, discrepancies, *calls(call.counts).values(), weights)

    def _denoise(self, call: Call, after_step: Callable[..., torch.Tensor]) -> torch.Tensor:
        """All sampling steps: noise `(B, C, h, w)` → clean latents of the same shape."""
        method = call.method
        method.prepare(call)
        latents, first = method.begin(call)
        for i in range(first, len(call.timesteps)):
            noise_pred = call.predict_noise(latents, call.timesteps[i])
            call.watch.see(i, noise_pred)
            noise_pred = method.guide(call, i, latents, noise_pred)
            noise = method.noise(call, i, latents, noise_pred, call.draw_noise(latents))
            latents = after_step(i, call.step(i, latents, noise_pred, noise), noise)
        call.watch.check()
        return latents

    def _finish(self, call: Call, latents: torch.Tensor, output_type: str) -> tuple[Output, torch.Tensor]:
        """Decodes, leaves what the method chooses, refuses images that are not finite, and converts.

        Returns:
            `tuple`: the images, and their indices `(N,)` among those that were drawn.
        """
        images, chosen = latents, torch.arange(len(call.ids))
        if output_type != "latent" or call.method.candidates > 1:
            decoded = torch.cat([call.decode(part).float() for part in latents.split(call.batch_size)])
            chosen = call.chosen(call.method.choose(call, latents, decoded))
            images = to_unit(decoded).clamp(0, 1) if output_type != "latent" else latents
        images = images[chosen.to(images.device)]
        bad = ~images.flatten(1).isfinite().all(dim=1)
        refuse_nonfinite(bad, call.wanted, "The decoded image is", step=None, models="the VAE")
        return to_output(images, output_type), chosen
