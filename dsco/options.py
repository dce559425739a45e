"""What options a recipe has, read from its source: `--help` in no time, and mistyped options refused at once.

A recipe's options are the fields of a dataclass, and what they mean stands in its docstring and those of its bases.
Importing them would import torch first, which takes seconds; here files are only parsed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard


ROOT = Path(__file__).parents[1]  # of this package and of dsco_hf
NAMES = ROOT / "dsco_hf" / "utils" / "names.py"  # says which options were renamed
WIDTH = 100
_KINDS = {"bool": "true|false", "int": "INTEGER", "float": "NUMBER", "str": "TEXT", "Named": "NAME", "Path": "FILE"}
_WHOLE = re.compile(r"[-+]?\d[\d_]*")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?|nan|[-+]?inf", re.IGNORECASE)
_TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: of the field.
        kind: its annotation, such as "list[int]" or "int | None".
        default: as it is written on a command line; None if there is no default, and one must be given.
        meaning: what the docstring says.
        group: what the class is for that has the field first.
    """

    name: str
    kind: str
    default: str | None
    meaning: str = ""
    group: str = ""

    @property
    def kinds(self) -> list[str]:
        """What one value may be: names of types."""
        inner = re.fullmatch(r"(?:list|Sequence|tuple)\[(.*?)(?:, \.\.\.)?\]", self.kind)
        return [part.strip() for part in (inner[1] if inner else self.kind).split("|")]

    @property
    def many(self) -> bool:
        """Whether it takes several values."""
        return self.kind.startswith(("list", "Sequence", "tuple"))

    @property
    def alias(self) -> str | None:
        """A second name, where the docstring begins with one."""
        found = re.match(r"`--(\w+)`", self.meaning)
        return found[1] if found else None

    @property
    def shown(self) -> str:
        """The option and its value in `--help`."""
        value = "|".join(dict.fromkeys(_KINDS.get(kind, "TEXT") for kind in self.kinds if kind != "None"))
        return f"--{self.alias or self.name} {value}{' ...' if self.many else ''}"

    def refusal(self, value: str) -> str | None:
        """What is wrong with a value, if that can be told without importing anything."""
        kinds = set(self.kinds)
        if "str" in kinds or ("None" in kinds and value == "none"):
            return None
        if "bool" in kinds:
            return None if value.lower() in _TRUTHS else f"`--{self.name}` must be true or false, got {value!r}."
        whole = kinds <= {"int", "None"}
        pattern = _WHOLE if whole else _NUMBER
        texts = [text for text in (value.split(",") if self.many else [value]) if text]
        if kinds & {"int", "float"} and not all(pattern.fullmatch(text) for text in texts):
            return f"`--{self.name}` must be {'an integer' if whole else 'a number'}, got {value!r}."
        return None


def answer(module: str, file: str) -> None:
    """Answers `--help`, and refuses options that there are not, where a recipe is run; called above its imports.

    Off a terminal, progress bars then print a line a minute at most.

    Args:
        module (`str`): `__name__` of the recipe; nothing is done where it is only imported.
        file (`str`): its `__file__`.

    Raises:
        SystemExit: after the help, and for a mistake, which is told.
    """
    if module != "__main__":
        return
    arguments, options = sys.argv[1:], recipe_options(Path(file))
    if {"-h", "--help"} & set(arguments):
        tell(help_text(Path(file).stem, described(Path(file)), options))
        raise SystemExit(0)
    if mistake := find_mistake(arguments, options):
        raise SystemExit(f"{Path(file).name}: {mistake}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(file).stem}: loading PyTorch and its libraries", file=sys.stderr, flush=True)  # for seconds
    if not sys.stderr.isatty():
        # seconds, of bars of other libraries, which have their first line then; tqdm reads them when it is imported
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_DELAY"):
            os.environ.setdefault(name, "60")


def tell(text: str) -> None:
    """Prints; a reader that has seen enough, such as `head`, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at exit, when the rest would be written


def described(file: Path) -> str:
    """What a recipe says of itself: its first lines, with examples."""
    return ast.get_docstring(_tree(file)) or ""


def help_text(name: str, description: str, options: Sequence[Option]) -> str:
    """`--help`: what a recipe does, with its examples, and all options by group, each once."""
    lines = [f"usage: {name} [--config FILE] [--OPTION VALUE ...]", "", description.strip(), ""]
    lines += ["--config FILE", "      YAML file with any of the options below; those given beside it go first"]
    for group in dict.fromkeys(option.group for option in options):
        lines += ["", f"{group}:"]
        members = [option for option in options if option.group == group]
        for meaning, alike in itertools.groupby(members, key=lambda option: option.meaning):
            for option in alike:
                default = "required" if option.default is None else f"default: {option.default}"
                lines.append(f"  {option.shown}  ({default})")
            lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "Several values are given as `16 32` or `16,32`; `none` takes a number or a text away."]
    lines += ["The quick way to this text is `dsco RECIPE --help`: `accelerate launch` imports PyTorch first."]
    return "\n".join(lines)


def find_mistake(arguments: Sequence[str], options: Sequence[Option]) -> str | None:
    """What is wrong with a command line as far as names and plain values go; None if nothing is."""
    known = {option.name: option for option in options}
    known |= {option.alias: option for option in options if option.alias}
    known |= {f"no_{name}": option for name, option in known.items() if option.kind == "bool"}
    missing = {option.name: option for option in options if option.default is None}
    for position, argument in enumerate(arguments):
        if not re.match(r"--[A-Za-z]", argument):
            continue
        name, has_value, value = argument[2:].partition("=")
        name = renamed().get(name, name).replace("-", "_")
        if name in ("config", "help"):
            missing.clear()  # they may be there
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
            advice = f" Did you mean {' or '.join(f'--{one}' for one in near)}?" if near else ""
            return f"Unknown option {argument.split('=')[0]!r}.{advice} `--help` lists all {len(options)}."
        after = arguments[position + 1 :]
        values = [value] if has_value else list(_values(after))
        option = known[name]
        missing.pop(option.name, None)
        if not values and option.kind != "bool":
            return f"`--{name}` takes a value: {option.shown}."
        for text in values if option.many or has_value else values[:1]:
            if refusal := option.refusal(text):
                return refusal
    return f"Not given: {', '.join(option.shown for option in missing.values())}." if missing else None


def _values(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        if re.match(r"--[A-Za-z]", argument):
            return
        yield argument


@functools.cache
def renamed() -> dict[str, str]:
    """Options by the names that they had in earlier versions."""
    for node in _tree(NAMES).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RENAMED":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise LookupError(f"{NAMES} has no RENAMED.")


def recipe_options(file: Path) -> list[Option]:
    """The options of a recipe: those of the dataclass that it hands to `parse_config`."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "parse_config":
            return class_options(file, ast.unparse(node.args[0]))
    raise LookupError(f"{file} calls no `parse_config`.")


def class_options(file: Path, name: str) -> list[Option]:
    """The options of a dataclass in a file, its own before those of its bases."""
    order = [kind for kind in _class(file.resolve(), name).__mro__ if issubclass(kind, _Seen) and kind is not _Seen]
    found: dict[str, Option] = {}
    for kind in reversed(order):
        own = kind is order[0] and len(order) > 1
        group = "Of this recipe" if own else kind.title
        for one in kind.own:
            before = found.get(one.name, dataclasses.replace(one, group=group))
            found[one.name] = dataclasses.replace(one, group=before.group, meaning=before.meaning)
        for option, text in kind.meanings.items():
            if option in found:
                found[option] = dataclasses.replace(found[option], meaning=text)
    groups = ["Of this recipe", *dict.fromkeys(kind.title for kind in order)]
    return sorted(found.values(), key=lambda option: groups.index(option.group))


class _Seen:
    """A dataclass as its source has it: stands in its place among bases, so that Python finds their order."""

    title = ""
    own: tuple[Option, ...] = ()
    meanings: dict[str, str] = {}


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def _class(file: Path, name: str) -> type[_Seen]:
    """The stand-in of a class; `_Seen` for one that is none of ours."""
    tree = _tree(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            bases = [_class(file, ast.unparse(base)) for base in node.bases]
            bases = [base for base in bases if base is not _Seen] or [_Seen]
            doc = ast.get_docstring(node) or ""
            fields = tuple(_option(item, tree) for item in node.body if _is_field(item))
            title = doc.partition("\n")[0].rstrip(".")
            return type(name, tuple(bases), {"title": title, "own": fields, "meanings": meanings(doc)})
        if isinstance(node, ast.ImportFrom) and any((each.asname or each.name) == name for each in node.names):
            original = next(each.name for each in node.names if (each.asname or each.name) == name)
            module = _module(file, node)
            return _Seen if module is None else _class(module, original)
    return _Seen


def _module(file: Path, node: ast.ImportFrom) -> Path | None:
    """The file of a module of ours, or None."""
    parts = (node.module or "").split(".") if node.module else []
    start = file.parents[node.level - 1] if node.level else ROOT
    if not node.level and parts[:1] != ["dsco_hf"]:
        return None
    place = start.joinpath(*parts)
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in files if path.is_file()), None)


def _is_field(item: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    return isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)


def _option(item: ast.AnnAssign, tree: ast.Module) -> Option:
    value = item.value
    if isinstance(value, ast.Name):  # a constant of the file
        named = [node.value for node in tree.body if isinstance(node, ast.Assign) and _names(node, value.id)]
        value = named[0] if named else value
    return Option(ast.unparse(item.target), ast.unparse(item.annotation), _default(value))


def _names(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _default(value: ast.expr | None) -> str | None:
    """A default as a command line would give it; as the source has it, where that is no plain value."""
    if value is None:
        return None
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        made = {keyword.arg: keyword.value for keyword in value.keywords}
        value = made.get("default", made.get("default_factory"))
        value = value.body if isinstance(value, ast.Lambda) else value
        if value is None:
            return None
    if isinstance(value, ast.Name) and value.id in ("list", "dict", "tuple"):
        return "none"
    try:
        plain = ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)
    if isinstance(plain, list | tuple):
        return " ".join(map(str, plain)) or "none"
    return str(plain).lower() if plain is None or isinstance(plain, bool) else str(plain) or "''"


def meanings(doc: str) -> dict[str, str]:
    """What a docstring says of fields: the lines under `Attributes:`."""
    block = inspect.cleandoc(doc).partition("Attributes:\n")[2].split("\n\n")[0]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}([\w, ]+?)(?: \([^)]*\))?: (.*(?:\n {8}.*)*)", block, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
