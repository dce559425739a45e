"""Options that get lost: what one recipe can be told of a dataset or a model, all can; and it reaches what is read."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import dsco_hf.evaluators.training as train_evaluation
from dsco.options import recipe_options
from dsco_hf.hub.cards import DatasetCardFields
from dsco_hf.sampling.flat import FLAT
from dsco_hf.studies import options
from dsco_hf.utils.configs import check_anew, parse_config
from recipes import (
    compare,
    compute_targets,
    concentrate,
    experiment,
    look,
    plan,
    publish,
    train_classifier,
    train_evaluator,
    train_generator,
)


RECIPES = {
    "compare": compare.ComparisonRecipe,
    "compute_targets": compute_targets.TargetsRecipe,
    "concentrate": concentrate.ConcentrateRecipe,
    "experiment": experiment.ExperimentRecipe,
    "look": look.LookRecipe,
    "plan": plan.PlanRecipe,
    "publish": publish.PublishRecipe,
    "train_classifier": train_classifier.ClassifierRecipe,
    "train_evaluator": train_evaluator.EvaluatorRecipe,
    "train_generator": train_generator.GeneratorRecipe,
}
# what is read, with the names of what can be said of it
DATASETS = {
    "dataset": ("dataset_name", "revision", "image_column", "label_column"),
    "test_dataset": ("test_name", "test_revision", "test_image_column", "test_label_column"),
    "real": ("real_name", "revision", "image_column", "label_column"),
    "datasets": (
        "datasets_image_column",
        "datasets_label_column",
        "datasets_classes",
    ),  # config and revision are in its notation
    "from_dataset": ("from_config", "from_revision"),  # its record says the rest
}
MODELS = ("generator", "classifier", "preview_vae", "vae", "teacher", "targets", "finetune_from")
SOURCES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))}
SOURCES["options"] = Path(options.__file__)


def options_of(name):
    return {field.name: field for field in dataclasses.fields(RECIPES[name])}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"publish"}))
def test_what_is_read_can_be_pinned_and_its_columns_chosen(name):
    options = options_of(name)
    for dataset, further in DATASETS.items():
        assert dataset not in options or not set(further) - set(options)
    shorter = {"finetune_from": "finetune_revision"}
    for model in MODELS:
        assert model not in options or shorter.get(model, f"{model}_revision") in options


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_is_used(name):
    """A field that its recipe never reads is an option that gets lost."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    inherited = {field for base in RECIPES[name].__mro__[1:] for field in getattr(base, "__dataclass_fields__", ())}
    used |= {text.removeprefix("datasets_") for text in used | inherited} | inherited  # passed on as a whole
    if "DatasetCardFields" in used | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        used |= {field.name for field in dataclasses.fields(DatasetCardFields)}
    if "from_flat" in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        used |= set(FLAT)  # taken as a whole
    names = {option.removeprefix("datasets_") for option in options_of(name)}
    assert not names - used


@pytest.mark.parametrize("name", RECIPES)
def test_help_says_what_every_option_is(name):
    options = recipe_options(SOURCES[name])
    assert {option.name for option in options} == set(options_of(name))
    assert not [option.name for option in options if len(option.meaning) < 5 or not option.group]


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_are_no_options(name):
    """Others can see command lines: the token is that of `hf auth login` or HF_TOKEN, which reach every read."""
    assert not [option for option in options_of(name) if "token" in option]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"look", "plan", "publish"}))
def test_images_to_test_on_are_chosen_alike(name):
    options = options_of(name)
    assert (options["test_split"].default, options["holdout"].default) == ("auto", 0.2)
    recipe = parse_config(RECIPES[name], [*REQUIRED.get(name, ()), "--test_split", "none", "--holdout", "0.5"])
    assert (recipe.test_split, recipe.holdout) == ("none", 0.5)


RESUMED = sorted(set(RECIPES) - {"look", "plan", "publish"})
RESUME = 'go on with what a stopped run of the same options left; "false" starts anew, where nothing was left.'


@pytest.mark.parametrize("name", RESUMED)
def test_to_resume_means_the_same_everywhere(name):
    assert options_of(name)["resume"].default is True
    assert next(option.meaning for option in recipe_options(SOURCES[name]) if option.name == "resume") == RESUME
    assert "check_anew(recipe.resume, accelerator, " in SOURCES[name].read_text(encoding="utf-8")


def test_starting_anew_where_a_run_has_left_something(tmp_path):
    accelerator, left = Accelerator(), [tmp_path / "jobs", tmp_path / "work"]
    check_anew(False, accelerator, left)
    left[1].mkdir()
    with pytest.raises(FileExistsError, match=f"`--resume false` starts anew, and {left[1]} is what a run has left"):
        check_anew(False, accelerator, left)
    check_anew(True, accelerator, left)  # what it says: without the option, or
    left[1].rmdir()  # deleted
    check_anew(False, accelerator, left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_classifier", "train_evaluator", "compare", "train_generator"])
def test_another_run_in_the_folder_names_the_option_with_both_values(name, tmp_path, monkeypatch):
    """A run that was cut by a signal, then run with another option, as it was, and anew."""
    main = {"train_classifier": train_classifier, "train_evaluator": train_evaluator, "compare": compare}
    main = main.get(name, train_generator).main
    given = ["--num_channels", "1", "--output_dir", str(tmp_path / "out"), "--mixed_precision", "no"]
    if name == "train_generator":
        given += ["--train_steps", "4", "--num_layers", "1", "--num_attention_heads", "1", "--attention_head_dim", "8"]
        given += ["--max_minutes", "0"]
    else:
        given += [
            "--steps",
            "24",
            "--batch_size",
            "128",
            "--checkpoint_seconds",
            "0",
            "--model_options",
            '{"width": 4}',
        ]
        given += ["--architecture" if name == "train_classifier" else "--architectures", "convnet-2"]
        given += [] if name == "train_classifier" else ["--seeds", "1"]
        saved = train_evaluation.Checkpoint.save

        def cut(*arguments, **options):
            saved(*arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(train_evaluation.Checkpoint, "save", cut)

    def run(*more):
        try:
            main([*given, *more])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()

    if name == "train_generator":
        run()
    else:
        with pytest.raises(KeyboardInterrupt):
            run()
        monkeypatch.undo()
    with pytest.raises(ValueError, match=r"learning_rate.* 0\.125"):
        run("--learning_rate", "0.125")
    with pytest.raises(FileExistsError, match="`--resume false` starts anew"):
        run("--resume", "false")
    if name == "train_generator":
        given[-1] = "10"
    run()  # set as it was
    assert (tmp_path / "out" / "results.json").is_file()


REQUIRED = {"compute_targets": ["--generator", "g"], "experiment": ["--dataset", "d"]}
READERS = re.compile(r"load_(image_dataset|splits|test_split|model|classifier)|\w+\.from_pretrained")
# readers of what the recipe itself has written
OWN = {"MatchingTargets.from_pretrained(folder)", "DsCoPipeline.from_pretrained(folder)"}


@pytest.mark.parametrize("name", sorted({*RECIPES, "quickstart", "options"}))
def test_models_and_datasets_are_read_by_the_functions_that_explain_and_pin(name):
    for call in [node for node in ast.walk(ast.parse(SOURCES[name].read_text())) if isinstance(node, ast.Call)]:
        function = ast.unparse(call.func)
        assert not re.fullmatch(r"(Auto\w+|ResNet\w+)\.from_pretrained|load_dataset|load_from_disk", function)
        if READERS.fullmatch(function) and name not in ("publish", "quickstart") and ast.unparse(call) not in OWN:
            given = {keyword.arg for keyword in call.keywords}
            assert "revision" in given or None in given, f"{name}.py, line {call.lineno}: {ast.unparse(call)}"
