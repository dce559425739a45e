"""What every recipe starts with: a config from a YAML file and the command line, and an accelerator."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers import HfArgumentParser

from dsco.options import class_options, help_text

from .files import Entry, read_entries
from .names import RENAMED, nearest
from .values import Named, check_choice


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Classes of your own.

    Attributes:
        imports: modules to import first, from where Python looks and the working folder; what is in them is then
            called "module:Class" where options take a name. A name, a file or a record alone imports nothing.
    """

    imports: list[str] = field(default_factory=list)


def parse_config(
    config_class: type[T],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Builds a config: defaults of the dataclass, then the file given by `--config`, then the other options.

    Modules that `imports` names, of [`ImportOptions`], are imported before the config looks at its values.

    Args:
        config_class (`type`): a dataclass; every field is an option of the same name. Lists of numbers are given as
            `16 32` or `16,32`, and `none` stands for None where a number may be missing.
        arguments (sequence of `str`, *optional*): the command line; `sys.argv[1:]` if None.
        description (`str`, *optional*): shown by `--help`.
        defaults (mapping, *optional*): values in place of the dataclass's own defaults.

    Raises:
        ValueError: for an unknown field (with the nearest names), or a value of the wrong type, in the file or on the
            command line, or a module that is not there.
        FileNotFoundError: if the file is not there.
    """
    parser = _RaisingParser(config_class, description=description, allow_abbrev=False)
    parser.config_class = config_class
    parser.add_argument("--config", type=Path)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    path = _config_path(arguments)
    values = dict(defaults or {}) | ({} if path is None else read_config(path, config_class))
    parser.set_defaults(**values)
    for action in parser._actions:  # given by the file: no longer required on the command line
        action.required = action.required and action.dest not in values
    arguments, absent = _as_written(arguments, get_type_hints(config_class))
    known, unknown = parser.parse_known_args(arguments)
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    if unknown:
        raise ValueError(_not_understood(unknown[0], arguments, names))
    given: dict[str, Any] = {name: None if name in absent else getattr(known, name) for name in names}
    if issubclass(config_class, ImportOptions):
        import_modules(given["imports"])
    return config_class(**given)


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that a user names, also from the working folder, which is looked in last.

    Raises:
        ValueError: for a module that is not there.
    """
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        for name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise  # the module is there, and lacks another
                raise ValueError(
                    f"There is no module {name!r} (`imports`): name it as Python does, `{Path(name).stem}` for a file "
                    f"{Path(name).stem}.py here in {folder} or where PYTHONPATH says."
                ) from error
    finally:
        sys.path.remove(folder)


def _as_written(arguments: Sequence[str], kinds: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """The command line with lists of numbers apart, and the options that `none` takes away."""
    written: list[str] = []
    absent: set[str] = set()
    name = ""
    for given in arguments:
        option, *rest = given.split("=", 1)
        known = option[2:] in kinds or option[2:] not in RENAMED or not option.startswith("--")
        value = argument = given if known else "=".join([f"--{RENAMED[option[2:]]}", *rest])
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
        kind = kinds.get(name)
        choices = get_args(kind)
        if get_origin(kind) is list and choices in ((int,), (float,)):
            parts = value.split(",") if value is argument else [f"--{name}", *value.split(",")]
            written += [part for part in parts if part]
        elif _is_union(kind) and type(None) in choices and value == "none":
            absent.add(name)
            if value is argument:
                written.pop()  # its option
        else:
            absent.discard(name)
            written.append(argument)
    return written, absent


def _not_understood(argument: str, arguments: Sequence[str], names: Sequence[str]) -> str:
    """What to say of an argument that no option takes."""
    before = [text for text in arguments[: arguments.index(argument)] if text.startswith("--")]
    if argument.startswith("-") or not before:
        option = argument.split("=")[0]
        return f"Unknown option {option!r}.{nearest(option.lstrip('-'), names)} `--help` lists all {len(names)}."
    values = " ".join(arguments[arguments.index(before[-1]) + 1 : arguments.index(argument) + 1])
    return (
        f"`{before[-1]}` takes one value, got {values!r}. A value with blanks needs quotes; numbers that make one "
        f"value are joined with commas: {before[-1]} {','.join(values.split())}."
    )


class _RaisingParser(HfArgumentParser):
    config_class: type

    def format_help(self) -> str:
        file = Path(inspect.getfile(self.config_class))
        return help_text(self.prog, self.description or "", class_options(file, self.config_class.__name__)) + "\n"

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"Bad command line: {message}. `--help` lists all options.")


def _config_path(arguments: Sequence[str]) -> Path | None:
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
        if argument == "--config":
            if i + 1 == len(arguments):
                raise ValueError("`--config` needs a file: `--config FILE`.")
            return Path(arguments[i + 1])
    return None


def read_config(path: Path, config_class: type, *, others: bool = False) -> dict[str, Any]:
    """The values of a YAML file for the fields of a dataclass.

    Files of YAML that it names, such as a protocol, may lie beside it: `protocol: protocols/mine.yaml`.

    Args:
        path (`Path`): the file.
        config_class (`type`): the dataclass.
        others (`bool`): leave fields out that the dataclass does not have, in place of refusing them.

    Raises:
        ValueError: for an unknown field (with the nearest names), or a value of the wrong type.
        FileNotFoundError: if the file is not there.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"There is no config file {path}.{nearest(path.name, siblings)}")
    entries = read_entries(path, "config file")
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold `field: value` lines, got {type(entries).__name__}.")
    kinds = get_type_hints(config_class, include_extras=True)
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {}
    for given, entry in entries.items():
        name = RENAMED[given] if given in RENAMED and given not in names else given
        if name in names:
            values[name] = _from_there(path, _checked_value(path, name, kinds[name], entry))
        elif not others:
            raise ValueError(f"{path} has an unknown field {name!r}.{nearest(name, names)}")
    return values


def _from_there(config: Path, value: object) -> object:
    """A value of a config file; another file of YAML that it names is looked for beside it first, then from here."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")) and (config.parent / value).is_file():
        return str(config.parent / value)
    return value


def _checked_value(path: Path, name: str, kind: type, entry: Entry) -> object:
    """A YAML value as the field's type: text as written, `1e-3` a number as it is to everybody but YAML 1.1."""
    if kind == Named:
        if isinstance(entry.value, Mapping):
            return json.dumps(entry.value, default=str)
        kind = str
    choices = get_args(kind) if _is_union(kind) else (kind,)
    allowed = [get_origin(choice) or choice for choice in choices]
    value, text = entry.value, entry.text
    if type(value) is int and text is not None and (":" in text or re.match("[-+]?0[0-9_]+$", text)):
        value = text  # sexagesimal or octal in YAML 1.1
    if isinstance(value, list) and entry.items is not None and list in allowed:
        (item_kind,) = get_args(choices[allowed.index(list)]) or (Any,)
        return value if item_kind is Any else [_checked_value(path, name, item_kind, item) for item in entry.items]
    if list in allowed and value is not None:  # one value is a list of one
        (item_kind,) = get_args(choices[allowed.index(list)]) or (Any,)
        return [value if item_kind is Any else _checked_value(path, name, item_kind, entry)]
    if type(value) in allowed:  # not isinstance: True is not an int here
        return value
    if str in allowed and text is not None and (value is not None or text not in ("", "~")):
        return text
    if float in allowed and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    wanted = " or ".join("nothing" if choice is type(None) else choice.__name__ for choice in allowed)
    raise ValueError(f"{path}: `{name}` must be {wanted}, got {value!r} ({type(value).__name__}).")


def _is_union(kind: object) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def check_made(recipes: Path, folders: Mapping[str, str | None]) -> None:
    """Makes sure that folders which a recipe takes and another one makes are there.

    Args:
        recipes (`Path`): the folder of the recipes, whose configs and first lines hold the commands.
        folders (mapping): paths by the name of the option; what no command makes is left to whoever loads it.

    Raises:
        FileNotFoundError: with the command that makes the folder.
    """
    for option, path in folders.items():
        if path is None or Path(path).exists():
            continue
        makers = [
            command for folder, command in _commands(recipes) if Path(folder) in (Path(path), *Path(path).parents)
        ]
        if makers:
            raise FileNotFoundError(
                f"There is no folder {path!r} (`{option}`). It is made by this command:\n    {makers[0]}"
            )


def check_anew(resume: bool, accelerator: Accelerator, left: Iterable[Path]) -> None:
    """Refuses to start anew where a run has left something, which would be lost or taken for the new run's.

    Args:
        resume (`bool`): the option; True goes on.
        accelerator (`Accelerator`): of the launch; nobody writes before all have looked.
        left (iterable of `Path`): what a run goes on with.

    Raises:
        FileExistsError: if anything is there.
    """
    found = [] if resume else [path for path in left if path.exists()]
    accelerator.wait_for_everyone()
    if found:
        listed = " and ".join(map(str, found))
        raise FileExistsError(
            f"`--resume false` starts anew, and {listed} is what a run has left: delete it, choose another "
            "`--output_dir`, or leave `--resume false` out to go on."
        )


def _commands(recipes: Path) -> list[tuple[str, str]]:
    """The commands that the first lines of configs and recipes show, each with the folder that it makes."""
    found = []
    for path in sorted([*recipes.rglob("*.yaml"), *recipes.glob("*.py")]):
        text = path.read_text(encoding="utf-8")
        made = re.search(r"^output_dir: *(\S+)", text, re.MULTILINE) if path.suffix == ".yaml" else None
        shown = re.sub(r"\\\n#? *", "", text)  # lines that go on
        for command in re.findall(r"^#? +((?:[A-Z_]+=\S+ )*(?:accelerate|python) .*)$", shown, re.MULTILINE):
            own = re.search(r"--output_dir (\S+)", command)
            if own is not None:
                found.append((own[1], command))
            elif made is not None and f"--config recipes/{path.relative_to(recipes).as_posix()}" in command:
                found.append((made[1], command))
    return found


def make_accelerator(mixed_precision: str | None = None, **options: object) -> Accelerator:
    """An `Accelerator` that also works with several processes on a machine without a GPU.

    There, `accelerate launch --multi_gpu --num_processes 2` starts two processes, but a plain `Accelerator()` does not
    connect them; and memory that is freed is kept for the next step, see [`keep_freed_memory`].

    Args:
        mixed_precision (`str`, *optional*): "no", "fp16" or "bf16"; what `accelerate launch` was told if None.
        options: anything else that `Accelerator` takes.

    Raises:
        ValueError: for an unknown precision.
        RuntimeError: if processes were started that cannot reach each other.
    """
    if mixed_precision is not None:
        check_choice("mixed_precision", mixed_precision, ("no", "fp16", "bf16", "fp8"))
    options.setdefault("cpu", not torch.accelerator.is_available())
    # what one process does alone, a download or a training, may take longer than others usually wait (10 minutes)
    options.setdefault("kwargs_handlers", [InitProcessGroupKwargs(timeout=timedelta(days=7))])
    accelerator = Accelerator(mixed_precision=mixed_precision, **options)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise RuntimeError(
            f"{started} processes were started, but this one sees {accelerator.num_processes}: each would do all of "
            "the work and write the same files. Start them with `accelerate launch --multi_gpu --num_processes N`."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def keep_freed_memory() -> bool:
    """Keeps what this process frees, up to 256 MiB apiece, instead of returning it to the system at once.

    The C library of Linux maps anew, page by page, what training frees and needs again at every step. Nothing is
    changed where the environment says how memory is managed (`LD_PRELOAD`, `GLIBC_TUNABLES`, `MALLOC_*`).

    Returns:
        `bool`: whether the C library took the setting; other systems have none.
    """
    if any(name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h, in bytes
    return all(mallopt(setting, size) == 1 for setting, size in ((-3, 2**28), (-1, 2**31 - 1)))
