"""DsCoPipeline: a class-conditional diffusion pipeline whose sampling noise is optimised (NOpt), models frozen."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import PIL.Image
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel

from .checks import check_call
from .features import Observation, ensure_preprocessing, observe
from .noise import joint_gradient, momentum_descent, shell_step
from .objectives import ClassifierObjective
from .plan import NoisePlan, optimized_steps
from .quantile import QuantileTargets, quantile_loss, shell_penalty
from .schema import class_mapping, nearest
from .targets import MatchingTargets


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


class DsCoPipeline(DiffusionPipeline):
    r"""Pipeline for dataset concentration: draws images of given classes whose features match those of whole classes.

    Noise optimisation (NOpt) follows "Beyond Dataset Distillation: Lossless Dataset Concentration via
    Diffusion-Assisted Distribution Alignment" (arXiv 2603.27987); the denoiser, decoder and classifier are frozen, and
    no gradient passes through the denoiser. Without targets this is plain ancestral sampling.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    (downloading, saving, running on a particular device, etc.).

    Parameters:
        transformer ([`DiTTransformer2DModel`]): class-conditional noise predictor; learned variances are ignored.
        scheduler ([`DDIMScheduler`]): the only scheduler that takes its noise from outside and predicts the clean
        sample. vae ([`AutoencoderKL`], *optional*): decodes latents; None for a generator in pixel space.
        classifier ([`PreTrainedModel`], *optional*): any image classifier of transformers; its features are matched.
        id2label (`dict[int, str]`, *optional*): names of the generator's classes.
        preview_vae ([`AutoencoderTiny`], *optional*): a cheap decoder of the same latents, used while noise is
            optimised.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "classifier", "preview_vae"]
    _exclude_from_cpu_offload = ["classifier", "preview_vae"]
    _callback_tensor_inputs = ["latents", "noise"]

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        scheduler: DDIMScheduler,
        vae: AutoencoderKL | None = None,
        classifier: PreTrainedModel | None = None,
        id2label: dict[str, str] | dict[int, str] | None = None,
        preview_vae: AutoencoderTiny | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, classifier=classifier, preview_vae=preview_vae
        )
        self.register_to_config(id2label={str(key): value for key, value in (id2label or {}).items()})
        self.id2label = {int(key): value for key, value in (id2label or {}).items()}
        self.labels = {
            name.strip(): key for key, value in self.id2label.items() for name in (value, *value.split(","))
        }
        if classifier is not None:
            ensure_preprocessing(classifier)
        self._batch_size, self._calls = sys.maxsize, dict.fromkeys(("denoiser", "decoder", "classifier"), 0)

    @property
    def num_classes(self) -> int:
        """Number of classes of the generator, which is also the index of its null class."""
        return self.transformer.config.num_embeds_ada_norm

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent side; 1 in pixel space."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Height and width of the images, in pixels."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    @property
    def num_channels(self) -> int:
        """Channels of the images."""
        return self.transformer.config.in_channels if self.vae is None else self.vae.config.out_channels

    @property
    def num_timesteps(self) -> int:
        """Sampling steps of the last call."""
        return self._num_timesteps

    def get_label_ids(self, class_labels: Sequence[int | str]) -> list[int]:
        """Indices of classes given by index or by name (any of ImageNet's comma-separated synonyms).

        Raises:
            ValueError: for a class that the generator does not know; the nearest names are suggested.
        """
        if isinstance(class_labels, str):
            raise ValueError(f"`class_labels` must be a list, got {class_labels!r}: pass `[{class_labels!r}]`.")
        ids = []
        for label in class_labels:
            index = self.labels.get(label) if isinstance(label, str) else int(label)
            if index is None:
                known = "" if self.labels else " It has no class names (`id2label`): pass indices."
                raise ValueError(f"The generator has no class {label!r}.{nearest(str(label), self.labels)}{known}")
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
        names = [self.id2label.get(index, str(index)) for index in ids]
        distinct = list(dict.fromkeys(names))
        config = self.classifier.config
        found = dict(zip(distinct, class_mapping(distinct, config.id2label, config.num_labels), strict=True))
        return [found[name] for name in names]

    def check_inputs(self, **inputs: Any) -> None:
        """Refuses arguments that cannot work, see `dsco_hf.checks.check_call`."""
        check_call(self, **inputs)

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, C, h, w)`, or `latents` moved to the pipeline's device and dtype."""
        config = self.transformer.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(
                shape, generator=generator, device=self._execution_device, dtype=self.transformer.dtype
            )
        return latents.to(self._execution_device, self.transformer.dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def predict_noise(
        self, latents: torch.Tensor, timestep: torch.Tensor | int, labels: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """ε_θ(x_t, t, c) `(B, C, h, w)`, with classifier-free guidance if `guidance_scale` > 1 (one batched call).

        The null class is the one after the generator's last. Passes of at most the call's `batch_size` images.
        """
        if len(latents) > self._batch_size:
            pieces = zip(latents.split(self._batch_size), labels.split(self._batch_size), strict=True)
            return torch.cat([self.predict_noise(x, timestep, y, guidance_scale) for x, y in pieces])
        guided = guidance_scale > 1
        inputs, classes = latents, labels
        if guided:
            inputs, classes = (
                torch.cat([latents, latents]),
                torch.cat([labels, torch.full_like(labels, self.num_classes)]),
            )
        self._calls["denoiser"] += len(inputs)
        times = torch.as_tensor(timestep, device=latents.device).expand(len(inputs))
        predicted = self.transformer(
            self.scheduler.scale_model_input(inputs, timestep), timestep=times, class_labels=classes
        ).sample[:, : latents.shape[1]]  # a learned variance, if there is one, fills the other half of the channels
        if guided:
            conditional, unconditional = predicted.chunk(2)
            predicted = unconditional + guidance_scale * (conditional - unconditional)
        return predicted

    def decode_latents(self, latents: torch.Tensor, *, preview: bool = False) -> torch.Tensor:
        """Latents `(B, C, h, w)` → pixels `(B, C, H, W)` in about [-1, 1]; gradients reach the latents."""
        decoder = self.preview_vae if preview and self.preview_vae is not None else self.vae
        if decoder is None:
            return latents
        self._calls["decoder"] += len(latents)
        return decoder.decode(latents.to(decoder.dtype) / decoder.config.scaling_factor).sample

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Pixels `(B, C, H, W)` in [-1, 1] → latents; the pixels themselves for a generator in pixel space."""
        if self.vae is None:
            return pixels
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.sample(generator) * self.vae.config.scaling_factor

    def sample(
        self,
        class_labels: Sequence[int],
        targets: MatchingTargets | QuantileTargets | None = None,
        *,
        seeds: Sequence[int],
        **options: Any,
    ) -> DsCoPipelineOutput:
        """One call without its own progress bar and one seed per image; images as tensors `(B, C, H, W)` in [0, 1]."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shown = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(**shown | {"disable": True})
        try:
            output = self(list(class_labels), targets, generator=generators, output_type="pt", **options)
            return cast(DsCoPipelineOutput, output)
        finally:
            self.set_progress_bar_config(**shown)

    def _preview(
        self,
        i: int,
        latents: torch.Tensor,
        noise_pred: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor,
        lookahead: str,
    ) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """The predicted clean latents as a function of step i's noise z, with everything but z held fixed.

        With look-ahead the denoiser is asked once, at the x_{t-1} that `noise` leads to; without, the current
        prediction is taken to move with z as x_{t-1} does.
        """
        step = self.scheduler.step
        t, t_next = self.scheduler.timesteps[i], self.scheduler.timesteps[i + 1]
        options = {"eta": self._eta, "use_clipped_model_output": True}

        def advance(z: torch.Tensor, part: slice) -> torch.Tensor:
            return step(noise_pred[part], t, latents[part], variance_noise=z, **options).prev_sample

        everything = slice(None)
        if lookahead == "none":
            level = self.scheduler.alphas_cumprod[t_next].to(latents)
            predicted = step(noise_pred, t, latents, variance_noise=noise, **options).pred_original_sample
            base = advance(noise, everything)
            return lambda z, part: predicted[part] + (advance(z, part) - base[part]) / level.sqrt()
        scale = self._guidance_scale if lookahead == "guided" else 1.0
        ahead = self.predict_noise(advance(noise, everything), t_next, labels, scale)
        return lambda z, part: step(ahead[part], t_next, advance(z, part)).pred_original_sample

    def optimize_noise(
        self, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Moves step i's noise `(B, C, h, w)` so that the predicted images lower the objective (NOpt)."""
        plan: NoisePlan = self._plan
        if plan.objective == "quantile":
            return self._optimize_noise_quantile(i, latents, noise_pred, noise)
        moments = plan.objective == "classifier" and plan.classifier_objective.batchnorm > 0

        for _ in range(plan.optimization_steps):
            preview = self._preview(i, latents, noise_pred, noise, labels, plan.lookahead)

            def observe_noise(z: torch.Tensor, part: slice, preview: Callable = preview) -> Observation:
                self._calls["classifier"] += len(z)
                pixels = self.decode_latents(preview(z, part), preview=True).clamp(-1, 1)
                return observe(self.classifier, pixels, moments=moments)

            losses, gradient = joint_gradient(
                noise, observe_noise, lambda seen: plan.loss(Observation(*seen)), batch_size=self._batch_size
            )
            if not (losses.isfinite().all() & gradient.isfinite().all()):
                raise FloatingPointError(
                    f"The objective or its gradient is not finite at step {i} "
                    f"(t = {int(self.scheduler.timesteps[i])}). Check the generator's and "
                    "classifier's weights, or load them in float32 or bfloat16 instead of float16."
                )
            self._discrepancies.append(losses.float().cpu())
            noise = shell_step(noise, gradient, plan.step_size_at(i))
        return noise

    def _optimize_noise_quantile(
        self, i: int, latents: torch.Tensor, noise_pred: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The released algorithm: features of x_{t-1} itself against those of real latents at the level of t.

        The classes of a call share their passes through the network; their losses do not touch each other.
        """
        plan, t = self._plan, self.scheduler.timesteps[i]
        members = [(plan.rows == row).nonzero()[:, 0] for row in plan.rows.unique()]
        pivots = [
            plan.targets.pivots(int(plan.rows[index[0]]), len(index), int(t), plan.extractor, self.scheduler)
            for index in members
        ]
        options = {"eta": self._eta, "use_clipped_model_output": True}

        def losses(z: torch.Tensor) -> torch.Tensor:
            self._calls["classifier"] += len(z)
            ahead = self.scheduler.step(noise_pred, t, latents, variance_noise=z, **options).prev_sample
            features = plan.extractor(ahead)
            pairs = zip(members, pivots, strict=True)
            return torch.stack([quantile_loss(features[index], p) + shell_penalty(z[index]) for index, p in pairs])

        noise, first = momentum_descent(noise, losses, iterations=plan.optimization_steps)
        self._discrepancies.append(first.float().cpu())
        return noise

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
            objective (`str`): "rkhs" (kernel mean matching), "quantile" (the released algorithm) or "classifier"
                (class evidence only, no targets).
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
            classifier_objective ([`ClassifierObjective`], *optional*): weights of the "classifier" objective.
            previous (`tuple`, *optional*): embedding sums `(C, D)` and counts `(C,)` of images that are in the set
                already.
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
            FloatingPointError: if a gradient or an image is not finite.
        """
        ids = self.get_label_ids(class_labels)
        if optimization_steps is None:
            optimization_steps = 200 if objective == "quantile" else 1
        plan = NoisePlan(
            objective,
            targets,
            optimization_steps,
            step_size,
            lookahead,
            classifier_objective or ClassifierObjective(),
            previous,
            step_decay,
        )
        self.check_inputs(
            ids=ids, plan=plan, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, eta=eta,
            optimize_from=optimize_from, optimize_until=optimize_until, batch_size=batch_size, generator=generator,
            latents=latents, output_type=output_type, tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        device = self._execution_device
        self._guidance_scale, self._eta = guidance_scale, eta
        self._batch_size = batch_size or len(ids)
        self._calls = {"denoiser": 0, "decoder": 0, "classifier": 0}
        self._discrepancies: list[torch.Tensor] = []
        self._plan: Any = plan
        labels = torch.tensor(ids, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        if plan.active and eta > 0:
            plan.prepare(self, ids)
            plan.steps = optimized_steps(len(timesteps), optimize_from, optimize_until)
        latents = self.prepare_latents(len(ids), generator, latents)

        with self.progress_bar(total=len(timesteps)) as bar:
            for i, t in enumerate(timesteps):
                noise_pred = self.predict_noise(latents, t, labels, guidance_scale)
                noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=latents.dtype)
                if i in plan.steps:
                    noise = self.optimize_noise(i, latents, noise_pred, noise, labels)
                latents = self.scheduler.step(
                    noise_pred, t, latents, eta=eta, use_clipped_model_output=True, variance_noise=noise
                ).prev_sample
                if callback_on_step_end is not None:
                    names = callback_on_step_end_tensor_inputs or ["latents"]
                    tensors = {name: {"latents": latents, "noise": noise}[name] for name in names}
                    latents = (callback_on_step_end(self, i, int(t), tensors) or {}).get("latents", latents)
                bar.update()

        images = self._finish(latents, ids, output_type)
        discrepancies = torch.stack(self._discrepancies) if self._discrepancies else torch.empty(0, len(set(ids)))
        self._plan = None
        self.maybe_free_model_hooks()
        counts = (self._calls["denoiser"], self._calls["decoder"], self._calls["classifier"])
        if not return_dict:
            return images, ids, discrepancies, *counts
        return DsCoPipelineOutput(images, ids, discrepancies, *counts)

    def _finish(self, latents: torch.Tensor, ids: list[int], output_type: str) -> Any:
        """Decodes, refuses images that are not finite, and converts."""
        images = latents
        if output_type != "latent":
            parts = [self.decode_latents(part) for part in latents.split(self._batch_size)]
            images = (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)
        bad = (~images.flatten(1).isfinite()).any(dim=1).nonzero()[:, 0].tolist()
        if bad:
            raise FloatingPointError(
                f"{len(bad)} of {len(ids)} images are not finite (class(es) {sorted({ids[j] for j in bad})[:10]}). "
                "Check the generator's weights, or load it in float32 or bfloat16 instead of float16."
            )
        if output_type in ("pt", "latent"):
            return images
        arrays = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return arrays
        arrays = (arrays * 255).round().astype("uint8")
        return [PIL.Image.fromarray(a[:, :, 0] if a.shape[2] == 1 else a) for a in arrays]
