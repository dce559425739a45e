from pathlib import Path

import pytest

from dsco_hf.evaluators import get_protocol
from dsco_hf.utils.configs import parse_config
from recipes import run_all_gpu
from recipes.experiment import ExperimentRecipe
from recipes.train_classifier import ClassifierRecipe
from recipes.train_generator import GeneratorRecipe


CONFIGS = {
    "train_classifier.py": ClassifierRecipe,
    "train_generator.py": GeneratorRecipe,
    "experiment.py": ExperimentRecipe,
}
DATA = {"cifar10": ["--dataset", "uoft-cs/cifar10"], "imagenette64": ["--dataset", "x/y", "--dataset_name", "160px"]}


def test_every_command_is_one_that_its_recipe_takes(tmp_path):
    made = {}
    for step in run_all_gpu.steps(tmp_path, DATA, "bf16"):
        _, script, *options = step.command(5)
        recipe = parse_config(CONFIGS[Path(script).name], options)
        assert Path(script).is_file() and recipe.mixed_precision == "bf16"
        assert step.result.parent == Path(recipe.output_dir)
        for needed in ("generator", "classifier"):  # made by an earlier step
            if (path := getattr(recipe, needed, None)) is not None:
                assert path in made
        if isinstance(recipe, ExperimentRecipe):
            get_protocol(recipe.protocol)
            assert set(recipe.budgets) == {1, 10, 50} and recipe.training_seeds >= 3
            assert "nopt-quantile" in recipe.methods and recipe.quantile_iterations == 200
            assert recipe.features == ExperimentRecipe.features  # hard and soft labels share their sets
        made[recipe.output_dir] = step
    assert len(made) == 8


@pytest.fixture
def two_steps(tmp_path, monkeypatch):
    """Two steps of a script that needs two starts to be done."""
    script = tmp_path / "step.py"
    script.write_text(
        "import sys, pathlib\n"
        "begun, done = map(pathlib.Path, sys.argv[1:3])\n"
        "assert sys.argv[3] == '--max_minutes'\n"
        "done.touch() if begun.exists() else begun.touch()\n"
    )

    def steps(outputs, data, mixed_precision):
        done = {name: outputs / f"{name}-done" for name in ("first", "second")}
        return [
            run_all_gpu.Step(name, str(script), (str(outputs / name), str(path)), path) for name, path in done.items()
        ]

    monkeypatch.setattr(run_all_gpu, "steps", steps)
    return steps


def test_slices_go_on_until_all_is_done(two_steps, tmp_path, capsys):
    arguments = ["--outputs", str(tmp_path)]
    assert run_all_gpu.main([*arguments, "--minutes", "0.5"]) == 3 and not (tmp_path / "first").exists()
    codes = [run_all_gpu.main(arguments) for _ in range(4)]
    assert codes == [3, 3, 0, 0]
    assert (tmp_path / "second-done").exists() and capsys.readouterr().out.count("All is done.") == 2
    assert run_all_gpu.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.count("[done]") == 2


def test_a_result_of_other_options_is_not_taken_for_done(tmp_path, monkeypatch, capsys):
    script = tmp_path / "step.py"
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[1]).touch()\n")
    for number, expected in (("1", 0), ("1", 0), ("2", 1)):
        step = run_all_gpu.Step("a", str(script), (str(tmp_path / "done"), "--steps", number), tmp_path / "done")
        monkeypatch.setattr(run_all_gpu, "steps", lambda *rest, step=step: [step])
        assert run_all_gpu.main(["--outputs", str(tmp_path)]) == expected
    assert "done was made with other options (1 2). Remove it" in capsys.readouterr().out


def test_a_failing_step_ends_the_slice(tmp_path, monkeypatch):
    script = tmp_path / "bad.py"
    script.write_text("import sys; sys.exit(7)\n")
    bad = run_all_gpu.Step("bad", str(script), (), tmp_path / "never")
    monkeypatch.setattr(run_all_gpu, "steps", lambda *rest: [bad])
    assert run_all_gpu.main(["--outputs", str(tmp_path)]) == 7
