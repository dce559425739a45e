"""What the components of a pipeline are: which a folder must name, and what each kind of denoiser says of itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..data.schema import nearest
from .failures import is_out_of_memory


# The classes that a folder may name for a component; others have no such list, or are checked when they are used.
# facebook/DiT-XL-2-256 was saved when the DiT was called Transformer2DModel.
KINDS = {
    "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
    "unet": ("UNet2DModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "preview_vae": ("AutoencoderTiny", "AutoencoderKL"),
}


def check_index(
    index: Mapping[str, Any], names: Collection[str], *, passed: Collection[str] = (), folder: Path | None = None
) -> None:
    """Raises ValueError if a pipeline's `model_index.json` lacks components, or names unknown ones or a wrong kind.

    Args:
        index (`Mapping[str, Any]`): its content: a component's library and class by its name, both None for one that
            is left out; keys with an underscore and plain values are no components.
        names (collection of `str`): the components that the pipeline has.
        passed (collection of `str`): components that are given by the caller, and need not be there.
        folder (`Path`, *optional*): where each component must have its own folder, if it is on this machine.
    """
    listed = {key: value for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    listed |= {key: index[key] for key in names if key in index}
    stored = {}
    for name, value in listed.items():
        if not (isinstance(value, list) and len(value) == 2):
            raise ValueError(f"`model_index.json` must give [library, class] for `{name}`, got {value!r}.")
        if name not in names:
            raise ValueError(
                f"`model_index.json` names the component `{name}` ({value[1]}), which this pipeline does not have."
                f"{nearest(name, sorted(names))} Its components are {sorted(names)}."
            )
        if value[1] is not None and name not in passed:
            stored[name] = value[1]
    for name, kind in stored.items():
        if kind not in KINDS.get(name, (kind,)):
            raise ValueError(
                f"The `{name}` of `model_index.json` is of class {kind!r}, this pipeline takes "
                f"{' or '.join(KINDS[name])}.{nearest(kind, KINDS[name])}"
            )
        if folder is not None and not (folder / name).is_dir():
            raise ValueError(
                f"`model_index.json` names the component `{name}` ({kind}), but {folder} has no folder `{name}`: copy "
                f"the whole pipeline, or pass the component, `from_pretrained(..., {name}=...)`."
            )
    present = {*stored, *passed}
    if "scheduler" not in present or not present & {"transformer", "unet"}:
        missing = "`scheduler`" if "scheduler" not in present else "`transformer` or `unet`"
        raise ValueError(
            f"`model_index.json` names no {missing}, only {sorted(stored)}: save the pipeline again, or pass the "
            "component to `from_pretrained`."
        )


def refuse_incomplete(transformer: Any, unet: Any, scheduler: Any) -> None:
    """Raises ValueError unless there is exactly one denoiser, conditioned on classes, and a scheduler."""
    if (transformer is None) == (unet is None):
        given = "neither" if transformer is None else "both"
        raise ValueError(
            f"The pipeline needs one denoiser, got {given} of `transformer` (a DiTTransformer2DModel) and `unet` (a "
            "class-conditional UNet2DModel): pass exactly one."
        )
    if scheduler is None:
        raise ValueError(
            "The pipeline has no scheduler: pass `scheduler=DDIMScheduler(...)` with the noise levels of the training."
        )
    name, denoiser = ("unet", unet) if transformer is None else ("transformer", transformer)
    config = denoiser.config
    key = "num_class_embeds" if transformer is None else "num_embeds_ada_norm"
    if config.get(key) is None or config.get("class_embed_type") is not None:
        raise ValueError(
            f"The `{name}` (a {type(denoiser).__name__}) is not conditioned on classes: {key}={config.get(key)}, "
            f"class_embed_type={config.get('class_embed_type')!r}. Take a {KINDS[name][0]} that was trained with "
            f"`{key}=...`."
        )


def classes_of(denoiser: Any, num_names: int) -> int:
    """Number of classes without the null class.

    Args:
        denoiser (`DiTTransformer2DModel` or `UNet2DModel`): a DiT always has an embedding of the null class, which its
            `num_embeds_ada_norm` does not count; a UNet's `num_class_embeds` are all of its embeddings.
        num_names (`int`): how many classes have a name; a UNet with one embedding more has a null class.
    """
    embeddings = denoiser.config.get("num_class_embeds")
    if embeddings is None:
        return denoiser.config.num_embeds_ada_norm
    return embeddings - 1 if embeddings == num_names + 1 > 1 else embeddings


def null_class_of(denoiser: Any, num_names: int) -> int | None:
    """Index of the null class, the one after the last; None for a UNet without one. Arguments as `classes_of`."""
    classes = classes_of(denoiser, num_names)
    return None if classes == denoiser.config.get("num_class_embeds") else classes


def side_of(denoiser: Any) -> int:
    """Height and width of what the denoiser takes, in latents or pixels.

    Raises:
        ValueError: for a denoiser of no fixed size, or one that is not square.
    """
    size = denoiser.config.sample_size
    sides = {size} if isinstance(size, int) or size is None else set(size)
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise ValueError(
            f"The denoiser's `sample_size` must be one whole number, the height and width of what it draws, got "
            f"{size!r}: set it with `denoiser.register_to_config(sample_size=...)`."
        )
    return side


def check_sizes(denoiser: Any) -> None:
    """Raises ValueError if the denoiser cannot take images of its own `sample_size`."""
    side, config = side_of(denoiser), denoiser.config
    if config.get("patch_size") is None:
        factor, why = 2 ** (len(config.down_block_types) - 1), "halves it at each of its blocks but the last"
    else:
        factor, why = config.patch_size, f"cuts it into patches of {config.patch_size}"
    if side % factor:
        closest = max(1, math.floor(side / factor + 0.5)) * factor
        raise ValueError(
            f"The {type(denoiser).__name__} cannot take its `sample_size={side}`, as it {why}: it must be a multiple "
            f"of {factor}, for example {closest}."
        )


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
