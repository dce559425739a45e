"""Single models by folder or Hub id: safetensors only, with errors that name the file and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..generators.weights import check_own_weights, explained_model
from ..matching.features import ensure_preprocessing
from ..utils.files import check_path
from ..utils.safety import Token, explained


def load_model(
    kind: Any,
    name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    token: Token = None,
    **options: Any,
) -> Any:
    """A model of transformers or diffusers, in eval mode.

    Args:
        kind (`type`): a class with `from_pretrained`.
        name (`str`): a folder, or an id of the Hub.
        revision (`str`, *optional*): branch, tag or commit.
        subfolder (`str`, *optional*): of the folder or repository.
        variant (`str`, *optional*): such as "fp16".
        dtype (`torch.dtype`, *optional*): the stored one if None.
        token (`str` or `bool`, *optional*): for a private or gated repository; that of `hf auth login` or HF_TOKEN
            if None.
        options: `cache_dir`, `local_files_only`, ... of `from_pretrained`.

    Raises:
        FileNotFoundError: if there is no such folder, repository or revision, or a file is missing.
        DamagedFileError: for a file that is truncated, or weights of another model; it is named.
        ValueError: if there are only pickled weights, or only a variant that was not asked for.
        PermissionError: if it is gated, or the token is not valid.
        ConnectionError: if the Hub cannot be reached.
    """
    name = str(name)
    check_path(name, wanted="Give a folder that `save_pretrained` wrote, or an id such as 'user/name'.")
    given = {"revision": revision, "subfolder": subfolder, "variant": variant, "dtype": dtype, "token": token}
    options = {"use_safetensors": True, **options, **{key: value for key, value in given.items() if value is not None}}
    with explained(name, token=token, action="load"), explained_model(name, **given):
        model = kind.from_pretrained(name, **options).eval()
    if Path(name).is_dir():
        check_own_weights(Path(name) / (subfolder or ""), model, remedy="Save the model again, or copy it again.")
    return model


def load_classifier(name: str, **options: Any) -> PreTrainedModel:
    """A classifier of images with what its processor does, of the same commit and read with the same token.

    Args:
        name (`str`): a folder, or an id of the Hub.
        options: of [`load_model`], which also says what is raised.
    """
    model = load_model(AutoModelForImageClassification, name, **options)
    return ensure_preprocessing(model, subfolder=options.get("subfolder"), token=options.get("token"))
