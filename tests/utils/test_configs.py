import ctypes
import os
import platform
import sys
from dataclasses import dataclass, field

import pytest

from dsco_hf.utils.configs import check_made, parse_config
from launches import run


@dataclass(frozen=True)
class Recipe:
    dataset: str
    steps: int = 10
    rate: float = 1.0
    minutes: float | None = None
    flip: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_file_then_command_line(tmp_path):
    path = write(tmp_path, "dataset: digits\nrate: 1e-3\nsteps: 7\n")
    assert parse_config(Recipe, ["--config", path]) == Recipe("digits", 7, 1e-3)
    assert parse_config(Recipe, [f"--config={path}", "--steps", "3", "--flip"]) == Recipe("digits", 3, 1e-3, flip=True)
    assert parse_config(Recipe, ["--dataset", "a/b", "--minutes", "2"]) == Recipe("a/b", minutes=2.0)
    assert parse_config(Recipe, ["--config", write(tmp_path, "dataset: x\nminutes: null\nflip: true")]).flip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: x\nstepz: 3", "unknown field 'stepz'.*Nearest: 'steps'"),
        ("dataset: x\nsteps: many", "`steps` must be int, got 'many'"),
        ("dataset: x\nsteps: 2.5", "`steps` must be int, got 2.5"),
        ("dataset: x\nsteps: true", "`steps` must be int, got True"),
        ("dataset: x\nflip: 1", "`flip` must be bool"),
        ("dataset: x\nrate: null", "`rate` must be float, got None"),
        ("- a\n- b", "must hold `field: value` lines, got list"),
        ("a: [", "not valid YAML"),
        ("dataset: x\nsteps: 0", "at least 1, got 0"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse_config(Recipe, ["--config", write(tmp_path, text)])


def test_bad_command_lines_are_explained(tmp_path):
    with pytest.raises(ValueError, match="Unknown option '--step'.*Nearest: 'steps'"):
        parse_config(Recipe, ["--dataset", "x", "--step", "3"])
    with pytest.raises(ValueError, match="invalid int value: 'x'"):
        parse_config(Recipe, ["--dataset", "x", "--steps", "x"])
    with pytest.raises(ValueError, match="required: --dataset"):
        parse_config(Recipe, [])
    with pytest.raises(ValueError, match="needs a file"):
        parse_config(Recipe, ["--config"])
    write(tmp_path, "")
    with pytest.raises(FileNotFoundError, match="Nearest: 'recipe.yaml'"):
        parse_config(Recipe, ["--config", str(tmp_path / "recipes.yaml")])


@dataclass(frozen=True)
class Lists:
    sizes: list[int]
    widths: str = "8"
    names: list[str] = field(default_factory=list)
    limit: float | None = 3.0
    folder: str | None = None


@pytest.mark.parametrize("given", [["16", "32"], ["16,32"], ["16,", "32"]])
def test_lists_of_numbers_apart_or_with_commas(given):
    assert parse_config(Lists, ["--sizes", *given]).sizes == [16, 32]
    assert parse_config(Lists, ["--sizes=16,32", "--limit", "none"]) == Lists([16, 32], limit=None)
    assert parse_config(Lists, ["--sizes=4", "--limit=none", "--limit", "2"]).limit == 2.0


def test_text_on_the_command_line_is_what_was_written():
    names = ["tench, Tinca", "no", "2024-01-01", "1e3"]
    given = ["--sizes", "1", "--names", *names, "--widths=none", "--folder=./none"]
    assert parse_config(Lists, given) == Lists([1], "none", names, folder="./none")


def test_none_takes_a_text_of_the_file_away(tmp_path):
    path = write(tmp_path, "sizes: [1]\nfolder: there\n")
    assert parse_config(Lists, ["--config", str(path)]).folder == "there"
    assert parse_config(Lists, ["--config", str(path), "--folder", "none"]).folder is None


def test_a_second_value_says_how_to_give_one():
    with pytest.raises(ValueError, match="`--widths` takes one value, got '8 16'.*commas: --widths 8,16"):
        parse_config(Lists, ["--sizes", "1", "--widths", "8", "16"])
    assert parse_config(Lists, ["--sizes", "1", "--widths", "8,16"]).widths == "8,16"


def test_defaults_of_the_caller_come_before_the_file(tmp_path):
    path = write(tmp_path, "steps: 5\n")
    recipe = parse_config(Recipe, ["--config", path], defaults={"dataset": "x", "steps": 3, "rate": 2.0})
    assert recipe == Recipe("x", 5, 2.0)


def test_what_is_missing_is_told_with_the_command_that_makes_it(tmp_path):
    recipes = tmp_path / "recipes"
    (recipes / "configs" / "deep").mkdir(parents=True)
    (recipes / "configs" / "deep" / "small.yaml").write_text(
        "# A small one.\n#   accelerate launch recipes/train.py \\\n#       --config recipes/configs/deep/small.yaml\n"
        "#   accelerate launch recipes/other.py --output_dir outputs/b --resume\noutput_dir: outputs/a\n"
    )
    (recipes / "train.py").write_text(
        '"""Trains.\n\n    python recipes/train.py --dataset x --output_dir outputs/c\n"""\n'
    )
    (tmp_path / "here").mkdir()
    check_made(recipes, {"generator": str(tmp_path / "here"), "classifier": None, "dataset": "outputs/unknown"})
    for missing, command in {
        "outputs/a": "accelerate launch recipes/train.py --config recipes/configs/deep/small.yaml",
        "outputs/b": "accelerate launch recipes/other.py --output_dir outputs/b --resume",
        "outputs/c": "python recipes/train.py --dataset x --output_dir outputs/c",
        "outputs/a/dataset": "accelerate launch recipes/train.py --config recipes/configs/deep/small.yaml",
    }.items():
        with pytest.raises(FileNotFoundError) as caught:
            check_made(recipes, {"generator": missing})
        assert str(caught.value) == (
            f"There is no folder {missing!r} (`generator`). It is made by this command:\n    {command}"
        )


HEAP = """
import ctypes, os, sys, torch
for name in [n for n in os.environ if n in ("LD_PRELOAD", "GLIBC_TUNABLES") or n.startswith("MALLOC_")]:
    del os.environ[name]
from dsco_hf.utils.configs import make_accelerator, keep_freed_memory
if sys.argv[1] == "told":
    os.environ["MALLOC_ARENA_MAX"] = "2"
    assert not keep_freed_memory()
else:
    make_accelerator(cpu=True)

class Heap(ctypes.Structure):  # struct mallinfo2 of malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Heap
before = mallinfo2()
tensor = torch.ones(10_000_000)  # 40 MB
during = mallinfo2()
del tensor
after = mallinfo2()
print(during.hblkhd - before.hblkhd, after.arena - before.arena + before.keepcost)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="needs version 2.33 or newer of the GNU C library",
)
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kept"), [("recipe", True), ("told", False)])
def test_what_a_step_frees_is_there_for_the_next(kind, kept):
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    done = run([sys.executable, "-c", HEAP, kind], env=environment)
    assert done.returncode == 0, done.stderr
    mapped, kept_bytes = map(int, done.stdout.split()[-2:])
    # Large blocks either come from the heap, which keeps them, or are mapped for this use only.
    assert (mapped, kept_bytes >= 40_000_000) == (0, True) if kept else mapped >= 40_000_000 > kept_bytes
