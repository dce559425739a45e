"""The command `dsco`: recipes by name; their help and their mistakes are told before anything heavy is imported."""

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsco import command
from dsco.command import ALONE, NICKNAMES, RECIPES, _commands, main
from dsco.options import answer, class_options, find_mistake, help_text, recipe_options
from dsco_hf.evaluators import get_protocol
from dsco_hf.utils.configs import parse_config
from recipes.train_classifier import ClassifierRecipe


ROOT = Path(__file__).parents[2]
SMALL = """
from dataclasses import dataclass, field
from dsco_hf.utils.configs import parse_config
from dsco_hf.studies.options import OutputOptions

@dataclass(frozen=True, kw_only=True)
class Mine(OutputOptions):
    '''Options of mine.

    Attributes:
        sizes: of all.
        rate: "high" or a number.
        name, other: of it.
    '''

    sizes: list[int] = field(default_factory=lambda: [1, 3])
    rate: float | None = 1e-3
    name: str = ""
    other: str
    fast: bool = True

parse_config(Mine)
"""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SMALL, encoding="utf-8")
    return file


def test_options_are_read_from_the_source(recipe):
    options = {option.name: option for option in recipe_options(recipe)}
    assert list(options) == ["sizes", "rate", "name", "other", "fast", "resume", "output_dir"]
    assert [option.default for option in options.values()][:5] == ["1 3", "0.001", "''", None, "true"]
    assert options["name"].meaning == options["other"].meaning == "of it." and options["fast"].meaning == ""
    assert options["output_dir"].group == "Where a run writes, and whether it goes on"
    text = help_text("mine", "Does it.", list(options.values()))
    assert "  --sizes INTEGER ...  (default: 1 3)\n      of all.\n" in text and "--other TEXT  (required)" in text
    assert text.count("of it.") == 1  # alike options are told together


@pytest.mark.parametrize("name", _commands())
def test_what_is_read_is_what_the_recipe_has(name):
    path = _commands()[name]
    options = recipe_options(path)
    module = __import__(f"recipes.{path.stem}", fromlist=["main"])
    kinds = [kind for kind in vars(module).values() if dataclasses.is_dataclass(kind)]
    found = [{field.name: field for field in dataclasses.fields(kind)} for kind in kinds]
    fields = next(fields for fields in found if set(fields) == {option.name for option in options})
    for option in options:
        field = fields[option.name]
        missing = field.default is field.default_factory is dataclasses.MISSING
        assert (option.default is None) == missing
        if isinstance(field.default, int | float | str) and option.default is not None:
            shown = str(field.default)
            shown = shown.lower() if isinstance(field.default, bool) else shown or "''"
            assert option.default == shown
    text = help_text(name, "", options)
    for option in options:
        assert text.count(f"  {option.shown}  (") == 1
    assert help_text(name, "x", class_options(path, "NoSuchClass"))  # of a class that is none of ours: no options


MISTAKES = {
    "--siezs 1": "Unknown option '--siezs'. Did you mean --sizes? `--help` lists all 7.",
    "--sizes 1 two": "`--sizes` must be an integer, got 'two'.",
    "--sizes": "`--sizes` takes a value: --sizes INTEGER ....",
    "--rate=fast": "`--rate` must be a number, got 'fast'.",
    "--fast perhaps": "`--fast` must be true or false, got 'perhaps'.",
    "folder --fast": "Not given: --other TEXT.",
}
FINE = (
    "--other x --sizes 1,3 --rate none", "--sizes 1, 3 --other=x", "--rate=-1e-3 --other x --fast",
    "--no_fast --name x --other x", "--config c.yaml", "--output-dir x --other x",
)  # fmt: skip


@pytest.mark.parametrize("given", MISTAKES)
def test_mistakes_are_told(recipe, given):
    assert find_mistake(given.split(), recipe_options(recipe)) == MISTAKES[given]


@pytest.mark.parametrize("given", FINE)
def test_what_is_right_is_let_through(recipe, given):
    assert find_mistake(given.split(), recipe_options(recipe)) is None


def test_a_recipe_answers_before_its_imports(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--help"])
    answer("mine", str(recipe))  # imported: nothing happens
    with pytest.raises(SystemExit) as raised:
        answer("__main__", str(recipe))
    assert raised.value.code == 0 and "--sizes INTEGER" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["mine.py", "--siezs=1"])
    with pytest.raises(SystemExit, match="mine.py: Unknown option '--siezs'"):
        answer("__main__", str(recipe))


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_rare_off_a_terminal(recipe, monkeypatch, capsys, terminal):
    environment = {"TQDM_MININTERVAL": "5"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(sys, "argv", ["mine.py", "--other", "x"])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    answer("__main__", str(recipe))
    rare = {"TQDM_MAXINTERVAL": "60", "TQDM_DELAY": "60"}
    assert environment == {"TQDM_MININTERVAL": "5"} | ({} if terminal else rare)
    assert capsys.readouterr().err == "mine: loading PyTorch and its libraries\n"


def test_help_and_mistakes_import_nothing_heavy():
    """The help of all recipes, by the command and as scripts, in a process that may not import torch."""
    lines = [
        "import runpy, sys", "from pathlib import Path", "sys.modules['torch'] = sys.modules['dsco_hf'] = None",
        "from dsco.command import main, _commands",
        "for name, path in _commands().items():",
        "    assert main([name, '--help']) == 0",
        "    assert main([name, '--no-such-option', '1']) == 2",
        "    sys.argv = [str(path), '--help']",
        "    try: runpy.run_path(str(path), run_name='__main__')",
        "    except SystemExit as end: assert end.code == 0, path",
        "    else: raise AssertionError(path)",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys\nfrom dsco.command import main\nsys.exit(main(['lossless', '--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_overview_names_every_recipe(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    for name in ("concentrate", "evaluate", "publish", "plan", "lossless", "copy"):
        assert f"\n  {name} " in told
    assert {recipe for recipe in NICKNAMES.values()} | set(ALONE) <= {path.stem for path in RECIPES.glob("*.py")}


def test_what_is_not_there_is_refused(capsys):
    assert main(["concentrat"]) == main(["--processes", "0", "plan"]) == main(["copy", "nothing"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "There are compare, concentrate," in told[0] and "before the name of the recipe" in told[1]
    assert "concentrate_digits" in told[2]


def test_copies_are_there_to_be_edited(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["copy", "concentrate_digits"]) == main(["copy", "evaluate"]) == 0
    assert "dsco concentrate --config concentrate_digits.yaml" in capsys.readouterr().out
    stored = RECIPES / "configs" / "concentrate_digits.yaml"
    assert (tmp_path / stored.name).read_text() == stored.read_text() and (tmp_path / "train_evaluator.py").is_file()
    assert main(["copy", "concentrate_digits"]) == 2 and "is here already" in capsys.readouterr().err


def test_a_config_finds_its_protocol_in_an_installation_and_copied(tmp_path, monkeypatch, capsys):
    """As a wheel lays them out, used by name from another folder, and after `dsco copy`."""
    monkeypatch.setattr(command, "RECIPES", tmp_path / "site-packages" / "dsco" / "recipes")
    shutil.copytree(RECIPES / "configs", command.RECIPES / "configs")
    for recipe in RECIPES.glob("*.py"):
        shutil.copy(recipe, command.RECIPES)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: started.append(words) or subprocess.CompletedProcess([], 0)
    )
    for name, steps in {"classifier_digits": "digits", "classifier_cifar10": "full_data"}.items():
        stored = get_protocol(RECIPES / "configs" / "protocols" / f"{steps}.yaml")
        for given in (name, f"{name}.yaml"):  # the second time it is here
            assert main(["train_classifier", "--config", given]) == 0
            recipe = parse_config(ClassifierRecipe, started[-1][started[-1].index("--config") :])
            protocol = get_protocol(recipe.protocol)
            assert protocol == stored and Path(recipe.protocol).is_absolute() == (given == name)
            assert main(["copy", name]) == (0 if given == name else 2)
    assert sorted(path.name for path in Path("protocols").iterdir()) == ["digits.yaml", "full_data.yaml"]


def test_it_says_what_it_starts_and_starts_it(tmp_path, monkeypatch, capfd):
    """`plan` runs alone; a stored config is found by its name."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: started.append(command) or subprocess.CompletedProcess([], 3)
    )
    assert main(["--processes", "2", "concentrate", "--config", "concentrate_digits", "--seed", "1"]) == 3
    assert main(["plan", "--preset", "imagenet1k"]) == 3
    told = capfd.readouterr().err.splitlines()
    assert told[0].startswith("+ accelerate launch --multi_gpu --main_process_port 0 --num_processes 2 ")
    assert told[0].endswith(f"concentrate.py --config {RECIPES}/configs/concentrate_digits.yaml --seed 1")
    assert started[0][1:3] == ["-m", "accelerate.commands.launch"]
    assert started[1] == [sys.executable, str(RECIPES / "plan.py"), "--preset", "imagenet1k"]


def test_help_of_a_parsed_config_is_the_same(capsys):
    from dsco_hf.studies.lossless.options import SearchOptions

    with pytest.raises(SystemExit):
        parse_config(SearchOptions, ["--help"], description="Does it.")
    told = capsys.readouterr().out
    assert "Does it." in told and all(
        told.count(f"  {option.shown}  (") == 1 for option in recipe_options(RECIPES / "lossless.py")
    )


def test_a_wheel_brings_recipes_configs_card_and_pipeline(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {*RECIPES.glob("*.py"), *RECIPES.glob("configs/**/*.yaml")}
    assert {f"dsco/recipes/{path.relative_to(RECIPES).as_posix()}" for path in wanted} <= names
    weights = "dsco_hf/sampling/embedded/digits/transformer/diffusion_pytorch_model.safetensors"
    assert {"dsco_hf/hub/templates/pipeline_card.md", "dsco_hf/py.typed", weights} <= names
    assert not [name for name in names if "results" in name or name.startswith(("tests", "recipes"))]
    assert wheel.stat().st_size < 3e6
