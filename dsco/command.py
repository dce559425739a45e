"""The command `dsco`: a recipe by its name, started as `accelerate launch` starts it.

    dsco concentrate --dataset path/to/images
    dsco evaluate --help
    dsco copy concentrate_digits
    dsco --processes 1 lossless --config lossless_digits.yaml

The recipes are those of `recipes/` in a checkout; an installation has a copy of them. Everything after the name goes
to the recipe as it is.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .options import described, find_mistake, help_text, recipe_options, tell


HERE = Path(__file__).parent
RECIPES = HERE / "recipes" if (HERE / "recipes").is_dir() else HERE.parent / "recipes"
NICKNAMES = {"evaluate": "train_evaluator", "targets": "compute_targets"}
ALONE = ("plan", "publish", "figures", "look")  # nothing in them is shared out over processes


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    processes = None
    if arguments[:1] == ["--processes"]:
        if len(arguments) == 1 or not arguments[1].isdecimal() or int(arguments[1]) < 1:
            return _refuse("`--processes` takes a number of processes, before the name of the recipe.")
        processes, arguments = int(arguments[1]), arguments[2:]
    if not arguments or arguments[0] in ("-h", "--help"):
        tell(_overview())
        return 0
    name, *given = arguments
    if name == "copy":
        return _copy(given)
    if name not in (commands := _commands()):
        return _refuse(f"There is no recipe {name!r}. There are {', '.join(commands)}, and `dsco copy`.")
    options, given = recipe_options(commands[name]), _with_config(given)
    if {"-h", "--help"} & set(given):
        tell(help_text(f"dsco {name}", described(commands[name]), options))
        return 0
    if mistake := find_mistake(given, options):
        return _refuse(mistake, name)
    return _run(commands[name], given, processes)


def _run(recipe: Path, given: Sequence[str], processes: int | None) -> int:
    """Starts a recipe, and says how that would be typed."""
    place = os.path.relpath(recipe) if Path.cwd() in recipe.parents else str(recipe)
    if recipe.stem in ALONE:
        shown, started = ["python"], [sys.executable]
    else:
        processes = processes or _processes()
        options = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []  # --multi_gpu: also on CPUs
        options += ["--num_processes", str(processes), "--num_machines", "1"]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        shown = ["accelerate", "launch", *options]
        started = [sys.executable, "-m", "accelerate.commands.launch", *options]
    print(f"+ {shlex.join([*shown, place, *given])}", file=sys.stderr, flush=True)
    return subprocess.run([*started, place, *given], check=False).returncode


def _processes() -> int:
    """How many processes the machine has work for: one for each accelerator; one, with all cores, without any."""
    import torch  # takes seconds: not before help and mistakes

    return max(1, torch.accelerator.device_count())


def _commands() -> dict[str, Path]:
    """The recipes by the names that the command takes."""
    found = {path.stem: path for path in sorted(RECIPES.glob("*.py")) if "parse_config(" in path.read_text("utf-8")}
    short = {name: found.pop(recipe) for name, recipe in NICKNAMES.items()}
    return dict(sorted({**found, **short}.items()))


def _overview() -> str:
    """`dsco --help`: the recipes, each with its first line."""
    lines = ["usage: dsco [--processes N] RECIPE [OPTIONS]", "       dsco RECIPE --help", "       dsco copy NAME", ""]
    for name, path in _commands().items():
        lines.append(f"  {name:16} {described(path).partition(chr(10))[0]}")
    lines += ["  copy             Copies a recipe or a config, such as `concentrate_digits`, here, to be edited.", ""]
    lines += ["A recipe runs in one process for each accelerator, or in one; `--processes N` says how many."]
    lines += ["`dsco RECIPE --help` answers at once; `accelerate launch`, which imports PyTorch first, does not."]
    return "\n".join(lines)


def _stored() -> dict[str, Path]:
    """All recipes and configs by name."""
    return {path.stem: path for path in sorted([*RECIPES.glob("*.py"), *RECIPES.glob("configs/**/*.yaml")])}


def _with_config(given: Sequence[str]) -> list[str]:
    """The arguments, with a stored config in the place of its name, where no such file is here."""
    written, stored = list(given), _stored()
    for position, argument in enumerate(given):
        inside = argument.startswith("--config=")
        name = argument.removeprefix("--config=")
        if inside or given[position - 1 : position] == ["--config"]:
            found = stored.get(Path(name).stem)
            if found is not None and not Path(name).exists():
                written[position] = f"--config={found}" if inside else str(found)
    return written


def _copy(given: Sequence[str]) -> int:
    """`dsco copy NAME`."""
    stored = {**_stored(), **_commands()}
    found = stored.get(Path(given[0]).stem) if len(given) == 1 else None
    if found is None:
        return _refuse(f"`dsco copy NAME` takes the name of a recipe or config: {', '.join(stored)}.")
    if Path(found.name).exists():
        return _refuse(f"{found.name} is here already: move it, or work in another folder.")
    shutil.copyfile(found, found.name)
    for name in re.findall(r"^\w+: (\S+\.yaml)$", found.read_text("utf-8"), re.MULTILINE):  # files beside it
        if (beside := found.parent / name).is_file() and not Path(name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(beside, name)
    text, place = found.read_text("utf-8"), f"--config recipes/{found.relative_to(RECIPES).as_posix()}"
    takers = [name for name, recipe in _commands().items() if f"recipes/{recipe.name} {place}" in text]
    use = f"accelerate launch {found.name} --help" if found.suffix == ".py" else f"--config {found.name}"
    print(f"Copied {found.name}. Use it: {f'dsco {takers[0]} {use}' if found.suffix == '.yaml' and takers else use}")
    return 0


def _refuse(message: str, name: str = "") -> int:
    print(f"dsco {name}".strip() + f": {message}", file=sys.stderr)
    return 2
