"""Models by folder or Hub id, safetensors only: what is wrong with their files is found by looking at them.

Errors name the file and the way out, where a library would only tell what it stumbled over.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi
from safetensors import safe_open
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..evaluators.preprocessing import ensure_preprocessing
from ..utils.files import DamagedFileError, check_path, read_json, reading
from ..utils.progress import weights_in_silence
from ..utils.safety import Token, explained, hub_error, is_pickle, status_of


PICKLES = (
    "{name} has {what}, and pickles can run code when they are loaded, so they are refused. Load a revision with "
    "safetensors (often the Hub's conversion: `revision='refs/pr/N'`, see the pull requests of the repository), "
    "convert the weights (https://huggingface.co/spaces/safetensors/convert), or, if you trust who made them, pass "
    "`use_safetensors=False` to `from_pretrained`; what `save_pretrained` then writes is safetensors."
)
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?")


def load_model(
    kind: type[ModelMixin | PreTrainedModel],
    name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    token: Token = None,
    **options: object,
) -> ModelMixin | PreTrainedModel:
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
    with (
        explained(name, token=token, action="load"),
        explained_model(name, variant=variant, subfolder=subfolder or "", revision=revision, token=token),
        weights_in_silence(),
    ):
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


def check_folder(folder: Path, *, remedy: str) -> None:
    """Reads the configs and the headers of all weights in the folder of a model.

    Args:
        folder (`Path`): of one model, or of a scheduler.
        remedy (`str`): the way out, a sentence.

    Raises:
        DamagedFileError: for a file that is truncated, empty or of another kind; it is named.
        FileNotFoundError: for a part of the weights that is missing.
    """
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, remedy)
        if path.name.endswith(".index.json"):
            parts = sorted(set(content.get("weight_map", {}).values()))
            if missing := [part for part in parts if not (folder / part).is_file()]:
                raise FileNotFoundError(
                    f"{folder / missing[0]} is missing, of {len(parts)} parts of weights. {remedy}"
                )
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path, remedy):
            if path.is_dir():
                raise IsADirectoryError
            with safe_open(path, framework="pt"):
                pass


def check_weights(files: Sequence[str], *, name: str, component: str, variant: str | None = None) -> None:
    """Refuses a model that has no safetensors of the variant that is asked for.

    Args:
        files (sequence of `str`): names of the files in the model's folder.
        name (`str`): how to call the model or pipeline.
        component (`str`): how to call this part of it, or "".
        variant (`str`, *optional*): such as "fp16"; one that is not there is replaced by the plain weights.

    Raises:
        ValueError: if there is only a variant, which is named, or only pickled weights.
        FileNotFoundError: if there are no weights at all.
    """
    of = f" of `{component}`" if component else ""
    found = variants_of(files)
    if None in found or (variant is not None and variant in found):
        return
    if variants := sorted(one for one in found if one):
        asked = "" if variant is None else f" and none of the variant {variant!r}"
        raise ValueError(
            f"{name} has the weights{of} only as variant {' and '.join(map(repr, variants))}{asked}: pass "
            f"`variant={variants[0]!r}` to `from_pretrained`. A recipe takes the folder that `save_pretrained` then "
            "writes."
        )
    if pickles := sorted(file for file in files if is_pickle(file)):
        place = f"{component}/{pickles[0]}" if component else pickles[0]
        raise ValueError(PICKLES.format(name=name, what=f"{place} but no safetensors beside it"))
    raise FileNotFoundError(
        f"{name} has no weights{of}: a safetensors file is needed, and there are {sorted(files)[:10]}. Save it again, "
        "or download it again."
    )


def variants_of(files: Sequence[str]) -> set[str | None]:
    """The variants of the weights among the files of a model; None stands for the plain weights."""
    return {_variant_of(file) for file in files if file.endswith(".safetensors")}


def check_own_weights(folder: Path, model: torch.nn.Module, *, remedy: str) -> None:
    """Refuses weights of another model: libraries only warn, and leave what they do not find at random values.

    A head that is new, or keys that a library renames, are no reason; less than half of the weights is.
    """
    stored: set[str] = set()
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with reading(path, remedy), safe_open(path, framework="pt") as file:
            stored |= set(file.keys())
    ends = {key.split(".", 1)[-1] for key in stored}  # a library may add or drop the name of the model's body
    wanted = list(model.state_dict())
    known = sum(key in stored or key in ends or key.split(".", 1)[-1] in stored for key in wanted)
    if files and 2 * known < len(wanted):
        raise DamagedFileError(
            f"{files[0]} holds the weights of another model: of {len(wanted)} tensors of a {type(model).__name__} it "
            f"has {known}. {remedy}"
        )


def listed_files(name: str, *, revision: str | None, token: Token) -> list[str] | None:
    """All files of a repository; None if the Hub cannot be asked."""
    with contextlib.suppress(Exception):
        return HfApi(token=token).list_repo_files(name, revision=revision)
    return None


@contextlib.contextmanager
def explained_model(
    name: str,
    *,
    variant: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    token: Token = None,
) -> Iterator[None]:
    """Turns the errors of a library that loads one model into ones that name the file and the way out.

    Args:
        name (`str`): a folder, or the id of a repository, whose list of files is looked at. What the Hub itself
            answers is for [`~dsco_hf.utils.safety.explained`].
        variant (`str`, *optional*): as the library is given it, like the others.
        subfolder (`str`): "" for none.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str` or `bool`, *optional*): for private repositories.
    """
    folder = Path(name) / subfolder
    try:
        yield
    except Exception as error:
        if not Path(name).is_dir() and status_of(hub_error(error)) is None:
            listed = listed_files(name, revision=revision, token=token)
            files = [path for path in listed or () if path.rpartition("/")[0] == subfolder]
            if "config.json" in {path.rpartition("/")[2] for path in files}:
                check_weights(
                    [path.rpartition("/")[2] for path in files],
                    name=name,
                    component=subfolder,
                    variant=variant,
                )
        if folder.is_dir():
            remedy = "Save the model again, or copy it again."
            check_folder(folder, remedy=remedy)
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"{folder} is not the folder of a model: it has no config.json.") from None
            files = [path.name for path in folder.iterdir()]
            check_weights(files, name=str(folder), component="", variant=variant)
        raise


def _variant_of(file: str) -> str | None:
    """The variant in a file's name: "fp16" of `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors`."""
    match = _WEIGHTS.fullmatch(file.removesuffix(".safetensors"))
    return match["variant"] if match else None
