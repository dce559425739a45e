"""What goes wrong while images are drawn, told so that the user knows what to change: not finite, out of memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F


_REMEDY = "Check the weights, or load {models} in float32 or bfloat16 instead of float16."


class NonFiniteError(FloatingPointError):
    """A model gave NaN or infinity.

    Args:
        message (`str`): what was not finite.
        step (`int`, *optional*): index of the sampling step; None for finished images.
        class_labels (sequence of `int`): the generator's classes of the images concerned, ascending, each once.
    """

    def __init__(self, message: str, *, step: int | None, class_labels: Sequence[int]) -> None:
        super().__init__(message)
        self.step, self.class_labels = step, sorted(set(class_labels))

    def __reduce__(self) -> tuple:
        return _rebuild, (str(self), self.step, self.class_labels)


def _rebuild(message: str, step: int | None, class_labels: list[int]) -> NonFiniteError:
    return NonFiniteError(message, step=step, class_labels=class_labels)


def refuse_nonfinite(bad: torch.Tensor, ids: Sequence[int], what: str, *, step: int | None, models: str) -> None:
    """Raises [`NonFiniteError`] if any entry of `bad` `(B,)` is true; `ids` are the classes of the B images."""
    if bad.any():
        classes = [ids[j] for j in bad.nonzero()[:, 0].tolist()]
        raise NonFiniteError(
            f"{what} not finite for {len(classes)} of {len(ids)} images, of class(es) {sorted(set(classes))[:10]}. "
            + _REMEDY.format(models=models),
            step=step,
            class_labels=classes,
        )


class FiniteWatch:
    """Remembers per image the first step at which the denoiser's output was not finite.

    It stays on the device: asking for it is what makes a GPU wait, so that is done when there is a wait anyway.

    Args:
        ids (sequence of `int`): the generator's class of each of the B images.
        timesteps (`torch.Tensor` of shape `(S,)`): the noise levels of the sampling steps, for messages.
    """

    def __init__(self, ids: Sequence[int], timesteps: torch.Tensor) -> None:
        self.ids, self.timesteps = list(ids), timesteps
        self.first = torch.full((len(self.ids),), -1, device=timesteps.device)

    def see(self, step: int, predicted: torch.Tensor) -> None:
        """Takes the output `(B, ...)` at a step; on a CPU it is also checked."""
        bad = ~predicted.flatten(1).isfinite().all(dim=1)
        self.first = torch.where(bad & (self.first < 0), step, self.first)
        if self.first.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises [`NonFiniteError`] for the earliest step, if there is one."""
        if (self.first >= 0).any():
            step = int(self.first[self.first >= 0].min())
            what = f"The denoiser's output at step {step} (t = {self.timesteps[step].item():g}) is"
            refuse_nonfinite(self.first == step, self.ids, what, step=step, models="the denoiser")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the machine, is used up."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def explained_out_of_memory(images: int, batch_size: int, *, latent: bool, preview: bool) -> Iterator[None]:
    """Adds to an out-of-memory error a note on the settings to change, and lets it pass.

    Args:
        images (`int`): images of the call.
        batch_size (`int`): images per pass through a model.
        latent (`bool`): whether there is a decoder.
        preview (`bool`): whether the pipeline has a preview decoder.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            advice = []
            if batch_size > 1:
                advice.append(
                    f"lower `batch_size` (images per pass through a model, now {min(batch_size, images)}: "
                    "`method=Sampling(batch_size=...)`)"
                )
            if images > 1:
                advice.append(f"draw fewer images a call (now {images}; `images_per_call` of `concentrate`)")
            if latent and not preview:
                advice.append("give the pipeline a `preview_vae` (an AutoencoderTiny), used while noise is optimised")
            if latent:
                advice.append("decode piece by piece: `pipe.vae.enable_slicing()`, `pipe.vae.enable_tiling()`")
            advice.append("load the models in bfloat16, or `pipe.enable_model_cpu_offload()`")
            error.add_note("Out of memory while images were drawn. What helps: " + "; ".join(advice) + ".")
        raise


@functools.lru_cache
def cannot_run(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a device cannot run models of a dtype, or None if it can: the layers of such models are tried on it."""
    try:
        x = torch.ones(1, 4, 4, 4, device=device).to(dtype)
        x = F.conv2d(x, x[0, :, :1, :1].expand(4, 4, 1, 1))
        x = F.linear(F.layer_norm(F.silu(x), (4,)), x[0, 0])
        (x.softmax(dim=-1) + F.group_norm(x, 2)).float()
    except (RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            return None
        return str(error).partition("\n")[0]
    return None
