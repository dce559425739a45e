"""How a pipeline is stored and found again: safetensors only, our own classes as components, one-line files of code.

A folder or repository holds what diffusers writes, and the file `pipeline.py`, through which diffusers finds the
installed class if it is told to trust it. A component of this package has such a file as well.
`DsCoPipeline.from_pretrained` needs none of them, and runs no code of a repository.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import PreTrainedModel

from ..data.schema import nearest
from ..generators.base import FAMILIES, check_fused
from ..generators.denoisers import SLOTS, as_components
from ..utils.files import check_path, read_json
from ..utils.progress import weights_in_silence
from ..utils.safety import explained, hub_error, is_pickle
from .models import check_folder, check_own_weights, check_weights, listed_files, load_classifier, variants_of


logger = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes; what PyTorch gives every tensor on a CPU
INDEX, SHIM_NAME = "model_index.json", "pipeline.py"
# What a repository needs so that diffusers finds the installed class: nothing is copied, so nothing can grow stale.
SHIM = "from dsco_hf import DsCoPipeline as DsCoPipeline\n"
OWN_MODULE = re.compile(r"dsco_hf(\.[a-z_]+)+")
OWN_SHIM = re.compile(rf"{OWN_MODULE.pattern}\.py")
# Repositories whose main branch holds pickled weights only, and where the Hub's conversion of them is.
CONVERSIONS = {"facebook/DiT-XL-2-256": "refs/pr/1"}
# The classes that a folder may name for a component; others have no such list, or are checked when they are used.
KINDS = {"vae": ("AutoencoderKL", "AutoencoderTiny"), "preview_vae": ("AutoencoderTiny", "AutoencoderKL")}
_NO_MODELS = ("scheduler", "tokenizer")  # how components are called that have no weights
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Pipelines that the package brings, by the names of their folders; `recipes/embed.py` makes them.
EMBEDDED = Path(__file__).with_name("embedded")


class StoredPipeline(DiffusionPipeline):
    """A [`DiffusionPipeline`] that loads safetensors only, and may have models of this package as components.

    Attributes:
        publisher (`Callable`): what [`StoredPipeline.push_to_hub`] calls; set by `dsco_hf.hub`, which is built on
            pipelines, so that pipelines need not know it.
    """

    publisher: ClassVar[Callable[..., Any]]

    def register_modules(self, **kwargs: object) -> None:
        """Sets components; see [`DiffusionPipeline.register_modules`]. Their weights are aligned in memory."""
        for component in kwargs.values():
            if isinstance(component, torch.nn.Module):
                align_weights(component)
        super().register_modules(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Loads a pipeline from a folder or from the Hub; see [`DiffusionPipeline.from_pretrained`] for its options.

        Weights are read from safetensors only, unless `use_safetensors=False` says otherwise. Components of this
        package are loaded without any code from the repository.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a folder, the id of a repository, or "digits": the small
                pipeline that the package brings, see [`embedded_folder`].
            kwargs: components to use in place of the stored ones (`classifier=...`, an object, or the folder or id of
                an image classifier of transformers, then with `classifier_revision`), `revision`, `token`,
                `cache_dir`, `local_files_only`, `dtype`, `variant`, ...

        Raises:
            ValueError: if there are only pickled weights, which can run code when loaded.
            FileNotFoundError: if there is no such folder, repository or revision.
            PermissionError: if it is gated, or the token is not valid.
            ConnectionError: if the Hub cannot be reached.
        """
        name = str(pretrained_model_name_or_path)
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        embedded = embedded_folder(name)
        if embedded is not None and kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32  # they are stored in half precision
        kwargs |= named_classifier(kwargs.get("classifier"), kwargs.pop("classifier_revision", None), kwargs)
        if embedded is not None:
            return named_as(name, cls._load(str(embedded), embedded, kwargs), embedded)
        if Path(name).is_dir():
            return cls._load(name, Path(name), kwargs)
        check_path(
            pretrained_model_name_or_path,
            wanted="Give a folder that `save_pretrained` wrote, or an id such as 'user/name'.",
        )
        if kwargs["use_safetensors"] and kwargs.get("revision") is None and name in CONVERSIONS:
            kwargs["revision"] = CONVERSIONS[name]
            logger.info("The main branch of %s holds pickled weights: loading %s of it.", name, kwargs["revision"])
        with explained(name, token=kwargs.get("token"), action="load"):
            options: dict[str, Any] = {key: kwargs[key] for key in DOWNLOAD_OPTIONS if key in kwargs}
            found = hf_hub_download(name, INDEX, **options)
            kwargs["revision"] = Path(found).parent.name  # one commit for all that follows
            return cls._load(name, Path(found).parent, kwargs)

    @classmethod
    def _load(cls, name: str, folder: Path, kwargs: dict[str, Any]) -> Self:
        index = read_index(folder)
        if (network := kwargs.pop("denoiser", None)) is not None:  # in place of the stored one, wherever that is
            kwargs |= as_components(network, {})
        given = {key for key, value in kwargs.items() if value is not None}  # passed as None: left out
        wanted = {key: value for key, value in index.items() if key not in kwargs or key in given}
        local = folder if Path(name).is_dir() else None
        check_index(wanted, cls._optional_components, passed=given, folder=local)
        ours = [key for key in wanted if key in cls._optional_components and key not in given]
        stored = [key for key in ours if _is_stored(wanted[key])]
        options = dict(kwargs)
        if local is not None:
            check_components(name, folder, stored, options)
        try:
            for component, module, class_name in own_components(index):
                kind = own_class(module, class_name)  # diffusers looks for the module among the imported ones
                if component not in kwargs:
                    kwargs[component] = load_own(kind, name, component, kwargs)
            with weights_in_silence():
                pipe = super().from_pretrained(name, **kwargs)
        except Exception as error:
            if local is None and not type(hub_error(error)).__module__.startswith("huggingface_hub"):
                check_components(name, folder, stored, options)
            raise
        if options["use_safetensors"]:
            for component in stored:
                if isinstance(model := getattr(pipe, component, None), torch.nn.Module):
                    check_own_weights(folder / component, model, remedy=_remedy(local is not None))
        return pipe

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, push_to_hub: bool = False, **kwargs: object
    ) -> None:
        """Writes the pipeline as safetensors, with the files through which diffusers finds the installed classes.

        Args:
            save_directory (`str` or `Path`): the folder; it is made if it is not there.
            safe_serialization (`bool`): must be True.
            push_to_hub (`bool`): also publish it, to `repo_id` or a repository of the folder's name.
            kwargs: see [`DiffusionPipeline.save_pretrained`], and with `push_to_hub` [`StoredPipeline.push_to_hub`].

        Raises:
            ValueError: for `safe_serialization=False`: pickled weights can run code when they are loaded; or for
                components with adapters such as LoRA that are not fused.
        """
        if not safe_serialization:
            raise ValueError("Pipelines are saved as safetensors only: leave `safe_serialization=False` out.")
        for name, model in self.components.items():
            check_fused(name, model)
        own = {key: kwargs.pop(key) for key in ("variant", "max_shard_size") if key in kwargs}
        with weights_in_silence():
            super().save_pretrained(str(save_directory), safe_serialization=True, **own)
        folder = Path(save_directory)
        (folder / SHIM_NAME).write_text(SHIM, encoding="utf-8")
        for stale in folder.glob("*/dsco_hf.*.py"):
            stale.unlink()
        for component, module, class_name in own_components(read_index(folder)):
            line = f"from {module} import {class_name} as {class_name}\n"
            (folder / component / f"{module}.py").write_text(line, encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(str(kwargs.pop("repo_id", folder.resolve().name)), **kwargs, **own)

    def push_to_hub(self, repo_id: str, **options: object) -> Any:
        """Publishes the pipeline with its card: `dsco_hf.publish_pipeline(self, repo_id, ...)`.

        Args:
            repo_id (`str`): `"user/name"`.
            options: `targets`, `dataset_id` and `license` of [`publish_pipeline`], and fields of `PushOptions`:
                `token`, `private`, `revision`, `create_pr`, `commit_message`, ...
        """
        return type(self).publisher(self, repo_id, **options)


def embedded_folder(name: str) -> Path | None:
    """The folder of a pipeline that the package brings, or None if `name` is none's.

    A pipeline in the working folder goes first, as everywhere: `digits` is then what lies there. A folder of that name
    without a `model_index.json`, such as one of images, is no pipeline and hides nothing.
    """
    folder = EMBEDDED / name
    known = folder.parent == EMBEDDED and (folder / INDEX).is_file()
    return folder if known and not (Path(name) / INDEX).is_file() else None


def named_as(name: str, pipe: DiffusionPipeline, folder: Path) -> DiffusionPipeline:
    """A pipeline that goes by a name in place of the folder where this installation has it, as do its components."""
    pipe.register_to_config(_name_or_path=name)
    for component, model in pipe.components.items():
        if isinstance(model, PreTrainedModel) and model.name_or_path == str(folder / component):
            model.name_or_path = f"{name}/{component}"
    return pipe


def align_weights(model: torch.nn.Module) -> None:
    """Moves weights on the CPU to where a computation would have allocated them.

    Those read from a file lie wherever its header ends. The CPU's kernels sum in another order there, so that the same
    weights give other last bits: a dataset could not be made again bit by bit from the published pipeline.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is torch.Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def read_index(folder: str | Path) -> dict[str, Any]:
    """The content of a pipeline's `model_index.json`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no JSON object.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a pipeline: it has no {INDEX}. Give one that `save_pretrained` wrote."
        )
    return read_json(path, "Save the pipeline again, or download it again.")


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
            stored[name] = value
    for name, (library, kind) in stored.items():
        if name in SLOTS:
            check_family(name, str(library), str(kind))
        elif kind not in KINDS.get(name, (kind,)):
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
    if "scheduler" not in present or not present & set(SLOTS):
        missing = "`scheduler`" if "scheduler" not in present else " or ".join(f"`{name}`" for name in SLOTS)
        raise ValueError(
            f"`model_index.json` names no {missing}, only {sorted(stored)}: save the pipeline again, or pass the "
            "component to `from_pretrained`."
        )


def check_family(component: str, library: str, kind: str) -> None:
    """Raises ValueError if no registered family keeps networks of such a class in that component of a pipeline.

    So only modules are imported, for their names in an index, that were imported to register a family.
    """
    known = {
        known_kind: known_library
        for family in FAMILIES.values()
        if family.component == component
        for known_kind, known_library in family.stored_kinds().items()
    }
    if known.get(kind) == library:
        return
    takes = " or ".join(known) or "those of registered families only"
    error = f"The `{component}` of `model_index.json` is of class {kind!r}, this pipeline takes {takes}."
    if library == "diffusers":
        raise ValueError(error + nearest(kind, known))
    raise ValueError(f"{error} If you trust {library!r}, import the module that registers a family for it first.")


def own_components(index: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(component, module, class) of the components in an index whose class is one of this package."""
    return [
        (name, str(value[0]), str(value[1]))
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and OWN_MODULE.fullmatch(str(value[0]))
    ]


def own_class(module: str, class_name: str) -> type[PreTrainedModel] | type[ModelMixin]:
    """A model class of this package, by the names that a pipeline's index gives.

    Raises:
        ValueError: if there is no such model: the names come from a repository.
    """
    try:
        found = getattr(importlib.import_module(module), class_name, None) if OWN_MODULE.fullmatch(module) else None
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel | ModelMixin)):
        raise ValueError(f"This version of dsco_hf has no model {class_name!r} in {module!r}. Install a newer one.")
    return found


def load_own(
    kind: type[PreTrainedModel] | type[ModelMixin], name: str, component: str, kwargs: dict[str, Any]
) -> PreTrainedModel | ModelMixin:
    """Loads a component of this package from a folder, or from the commit of a repository that `revision` names."""
    if Path(name).is_dir():
        folder = Path(name)
    else:
        patterns = [f"{component}/*.json", f"{component}/*.safetensors"]
        options = {key: kwargs[key] for key in DOWNLOAD_OPTIONS if key in kwargs}
        folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
    dtype = _dtype_of(component, kwargs)
    variant = kwargs.get("variant")
    if not list((folder / component).glob(f"*.{variant}*.safetensors")):
        variant = None
    with weights_in_silence():
        model = kind.from_pretrained(folder / component, dtype=dtype, variant=variant, use_safetensors=True).eval()
    device = kwargs.get("device_map")
    return model.to(device) if isinstance(device, str) and device != "balanced" else model


def named_classifier(
    classifier: PreTrainedModel | str | Path | None, revision: str | None, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The classifier of a folder or an id as a component, with the pipeline's precision and token; none of an object.

    Raises:
        ValueError: for a revision without an id; see [`~dsco_hf.sampling.models.load_model`] for other errors.
    """
    if not isinstance(classifier, str | Path):
        if revision is not None:
            raise ValueError(
                f"`classifier_revision={revision!r}` is of a classifier that is named: pass its id as well, "
                "`classifier='user/name'`."
            )
        return {}
    names = ("token", "cache_dir", "local_files_only", "force_download", "use_safetensors")
    options = {key: kwargs[key] for key in names if kwargs.get(key) is not None}
    return {
        "classifier": load_classifier(
            str(classifier), revision=revision, dtype=_dtype_of("classifier", kwargs), **options
        )
    }


def _dtype_of(component: str, kwargs: Mapping[str, Any]) -> torch.dtype | None:
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    return dtype.get(component, dtype.get("default")) if isinstance(dtype, dict) else dtype


def check_components(name: str, folder: Path, components: Sequence[str], options: Mapping[str, Any]) -> None:
    """Looks at the files of the components that are to be loaded from a folder, or from the snapshot of a repository.

    Raises:
        DamagedFileError, FileNotFoundError: naming the file.
        ValueError: if there are only pickled weights, or only a variant that was not asked for.
    """
    local, variant = Path(name).is_dir(), options.get("variant")
    listed = None if local else listed_files(name, revision=options.get("revision"), token=options.get("token"))
    files: dict[str, list[str]] = {}
    for component in components:
        check_folder(folder / component, remedy=_remedy(local))
        files[component] = [path.name for path in (folder / component).glob("*")]
        if listed is not None:
            files[component] = [
                path.removeprefix(f"{component}/") for path in listed if path.startswith(f"{component}/")
            ]
        kind = component.split("_")[0]
        config = f"{kind}_config.json" if kind in _NO_MODELS else "config.json"
        if config not in files[component]:
            raise FileNotFoundError(f"{folder / component / config} is missing. {_remedy(local)}")
    models = [one for one in components if one.split("_")[0] not in _NO_MODELS and options["use_safetensors"]]
    for component in sorted(models, key=lambda component: not any(map(is_pickle, files[component]))):
        check_weights(files[component], name=name, component=component, variant=variant)
    variants = {one for component in models for one in variants_of(files[component])}
    if variant is not None and variants and variant not in variants:
        there = sorted(one for one in variants if one)
        others = f", or choose of {there}" if there else ""
        raise ValueError(f"{name} has no variant {variant!r}: leave `variant` out{others}.")


def _is_stored(value: object) -> bool:
    """Whether an entry of a pipeline's index is a component with a folder."""
    return isinstance(value, list) and len(value) == 2 and None not in value


def _remedy(local: bool) -> str:
    return "Save the pipeline again, or copy it again." if local else "Load again with `force_download=True`."
