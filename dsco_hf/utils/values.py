"""Plain values: numbers of Python, NumPy and torch alike as Python's own, and what is none of them refused by name."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Self, TypeAlias, TypeVar

import yaml

from .names import nearest


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

F = TypeVar("F", bound=Callable[..., Any])
Named: TypeAlias = Annotated[str, "a name, or the text of {name: ..., field: value}"]
"""An option that says which [`Choice`]; config files may hold the mapping itself."""
LARGEST_SEED = 2**63 - 1
LARGEST_SET = 10**8  # images; the plan alone of a larger one would fill the memory


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`; the nearest is suggested."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.{nearest(str(value), allowed)}")


def check_whole(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """A whole number, also one of NumPy or torch, as an `int`.

    Raises:
        ValueError: for anything else, bools and text among them, or a number below `least` or above `most`.
    """
    number = plain(value)
    whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not whole or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"`{name}` must be a whole number{_limits(least, most)}, got {value!r}{_hint(number, whole)}")
    return int(number)


def check_real(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False
) -> int | float:
    """A finite number from `low` to `high`, also one of NumPy or torch, as a number of Python.

    Args:
        name (`str`): of the argument, for errors.
        value: what was given; a whole number stays whole.
        low (`float`): the smallest.
        high (`float`): the largest.
        open_low (`bool`): whether `low` itself is refused.

    Raises:
        ValueError: for anything else: bools, text, NaN and infinity among them.
    """
    number = plain(value)
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not real or not _is_finite(number) or not low <= number <= high or (open_low and number == low):
        wanted = f"a number from {low:g} to {high:g}"
        if open_low:
            wanted = f"a finite number above {low:g}{f' and at most {high:g}' if high < math.inf else ''}"
        elif high == math.inf:
            wanted = "a finite number" if low == -math.inf else f"a finite number of at least {low:g}"
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}{_hint(number, real)}")
    return number if isinstance(number, int | float) else float(number)


class NumberLoader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as it is to everybody but YAML 1.1."""


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
NumberLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


class Limits(NamedTuple):
    """What a number may be: from `low`, which `open_low` refuses, to `high`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False


class Choice(abc.ABC):
    """Base of frozen dataclasses that are chosen by name or as objects, and recorded as their name and fields.

    A class directly below this one is a family, such as objectives; those below it are its kinds. Those of this
    package have short names, others are called by where they are imported from, "module:Class".
    """

    name: ClassVar[str] = ""
    argument: ClassVar[str]  # what callers name the family by, such as "objective"
    field_limits: ClassVar[Mapping[str, float | Limits]] = {}  # of its numbers, see `plain_fields`
    kinds: ClassVar[dict[str, type]]  # of the family, by name: those that were imported
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if Choice in cls.__bases__:
            cls.kinds = {}
            return
        if not cls.__module__.startswith(f"{__name__.split('.')[0]}."):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"
        elif "name" not in cls.__dict__:
            cls.name = cls.__name__.lower()
        cls.kinds[cls.name] = cls

    def __post_init__(self) -> None:
        """Takes the numbers of NumPy and torch, too."""
        plain_fields(self)

    @classmethod
    def of(cls, given: object) -> Self:
        """The object that is given, of the name that is given, or of a record (`as_record`), also as text.

        Raises:
            ValueError: for a name or a field that does not exist, or somebody's own class that is not imported.
            TypeError: for anything else.
        """
        if isinstance(given, cls):
            return given
        record = cls.told(given)
        kind = cls.kind_of(record["name"])
        fields = {key: value for key, value in record.items() if key != "name"}
        known = [field.name for field in dataclasses.fields(kind)]
        if unknown := [key for key in fields if key not in known]:
            raise ValueError(
                f"{kind.__name__} has no field {unknown[0]!r}.{nearest(unknown[0], known)} It has {known}."
            )
        return kind(**fields)

    @classmethod
    def told(cls, given: object) -> dict[str, Any]:
        """Name and fields that are given: a name, a record, or the text of one (YAML or JSON); errors as of `of`."""
        record: object = given
        if isinstance(given, str):
            try:
                record = NumberLoader(given).get_single_data() if given.lstrip().startswith("{") else {"name": given}
            except yaml.YAMLError as error:
                raise ValueError(f"`{cls.argument}` is not valid YAML: {error}") from error
        if not isinstance(record, Mapping) or not isinstance(record.get("name"), str):
            names = ", ".join(f"{name!r}" for name in cls.kinds if ":" not in name)
            raise TypeError(
                f"`{cls.argument}` must be one of {names}, or an object of a class below {cls.__name__}, got "
                f"{given!r}."
            )
        return dict(record)

    @classmethod
    def kind_of(cls, name: str) -> type[Self]:
        """The class of that name; nothing is imported because a name says so. See `of` for what is raised."""
        if name in cls.kinds:
            return cls.kinds[name]
        module, _, path = name.partition(":")
        if not path:
            check_choice(cls.argument, name, [known for known in cls.kinds if ":" not in known])
        found: object = sys.modules.get(module)
        for part in path.split("."):
            found = getattr(found, part, None)
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ValueError(
                f"`{cls.argument}` is {name!r}, and no class below {cls.__name__} is there: `import {module}` "
                f"first, as a name imports nothing; recipes do it for `--imports {module}`."
            )
        return found

    def as_record(self) -> dict[str, Any]:
        """Name and fields as plain JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"name": self.name} | {
            key: value.as_record() if isinstance(value, Choice) else plain(value) for key, value in fields.items()
        }


def plain(value: object) -> Any:
    """A number, array or tensor of no dimension as Python's own number; lists and dicts with all that is in them.

    Other arrays become lists; what is none of these is given back as it is.
    """
    if isinstance(value, Mapping):
        return {key if isinstance(key, str | tuple) else plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # NumPy's and torch's, without importing
        return value.tolist()
    return value


def plain_arguments(**least: int) -> Callable[[F], F]:
    """Decorates a function that takes numbers: those of NumPy and torch reach it as Python's own.

    Looks at the annotations: `int` takes whole numbers, `float` finite ones, `bool` yes or no; each also `| None`.
    What is called `seed` is from 0 to 2^63 - 1.

    Args:
        least: the smallest value of some arguments, by name.
    """

    def decorate(function: F) -> F:
        parameters = inspect.signature(function).parameters
        names = [name for name, one in parameters.items() if one.kind is not one.VAR_POSITIONAL]
        kinds = {name: kind for name, one in parameters.items() if (kind := _kind(one.annotation)) is not None}

        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            given = [
                _plain_value(name, value, kinds.get(name), least) for name, value in zip(names, args, strict=False)
            ]
            given += args[len(given) :]
            named = {name: _plain_value(name, value, kinds.get(name), least) for name, value in kwargs.items()}
            return function(*given, **named)

        return wrapper  # type: ignore[return-value]

    return decorate


def plain_fields(instance: DataclassInstance) -> None:
    """The same for the fields of a dataclass, also a frozen one: to be called in its `__post_init__`.

    The class and its bases say in `field_limits` what numbers may be: the smallest, or [`Limits`], by field.
    """
    annotations: dict[str, Any] = {}  # as written: HfArgumentParser takes the None out of `field.type`
    limits: dict[str, float | Limits] = {}
    for base in reversed(type(instance).__mro__):
        annotations |= base.__dict__.get("__annotations__", {})
        limits |= base.__dict__.get("field_limits", {})
    for field in dataclasses.fields(instance):
        kind = _kind(annotations[field.name])
        if kind is not None:
            value = _plain_value(field.name, getattr(instance, field.name), kind, limits)
            object.__setattr__(instance, field.name, value)


def _kind(annotation: object) -> str | None:
    """One of "int", "float" and "bool", with "?" if None is allowed; None for an annotation of anything else."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    parts = {part.strip() for part in text.split("|")}
    named = parts - {"None"}
    if not named or not named <= {"int", "float", "bool"}:
        return None
    found = "float" if "float" in named else named.pop()
    return found + "?" * ("None" in parts)


def _plain_value(name: str, value: object, kind: str | None, limits: Mapping[str, float | Limits]) -> object:
    if kind is None or (kind.endswith("?") and value is None):
        return value
    if kind.startswith("bool"):
        return _check_flag(name, value)
    given = limits.get(name, -math.inf)
    low, high, open_low = given if isinstance(given, Limits) else Limits(given)
    if kind.startswith("float"):
        return check_real(name, value, low, high, open_low=open_low)
    if name == "seed":
        return check_whole(name, value, 0, LARGEST_SEED)
    return check_whole(name, value, *(None if math.isinf(limit) else int(limit) for limit in (low, high)))


def _check_flag(name: str, value: object) -> bool:
    flag = plain(value)
    if not isinstance(flag, bool) and not (isinstance(flag, int) and flag in (0, 1)):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    return bool(flag)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False


def _limits(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""


def _hint(number: object, right_kind: bool) -> str:
    """The end of an error: the likely fix, where it is a matter of how the number is written."""
    if right_kind:
        return "."
    if isinstance(number, bool):
        return ", which is no number."
    if isinstance(number, str):
        return ", which is text: write the number without quotes."
    if isinstance(number, float) and number.is_integer():
        return f": write {int(number)}."
    if isinstance(number, Iterable):
        return ": one number is needed."
    return "."
