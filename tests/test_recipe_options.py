"""Options that get lost: what one recipe can be told of a dataset or a model, all can; and it reaches what is read."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from dsco_hf.cards import DatasetCardFields
from dsco_hf.configs import parse_config
from recipes import (
    compare,
    compute_targets,
    concentrate,
    experiment,
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
    "datasets": ("datasets_image_column", "datasets_label_column"),  # config and revision are in its notation
    "from_dataset": ("from_config", "from_revision"),  # its record says the rest
}
MODELS = ("generator", "classifier", "preview_vae", "vae", "teacher", "targets", "finetune_from")
SOURCES = {path.stem: path for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.py"))}


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
    used |= {text.removeprefix("datasets_") for text in used} | inherited  # passed on as a whole
    if "DatasetCardFields" in used | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        used |= {field.name for field in dataclasses.fields(DatasetCardFields)}
    names = {option.removeprefix("datasets_") for option in options_of(name)}
    assert not names - used


@pytest.mark.parametrize("name", RECIPES)
def test_tokens_are_no_options(name):
    """Others can see command lines: the token is that of `hf auth login` or HF_TOKEN, which reach every read."""
    assert not [option for option in options_of(name) if "token" in option]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"plan", "publish"}))
def test_images_to_test_on_are_chosen_alike(name):
    options = options_of(name)
    assert (options["test_split"].default, options["holdout"].default) == ("auto", 0.2)
    recipe = parse_config(RECIPES[name], [*REQUIRED.get(name, ()), "--test_split", "none", "--holdout", "0.5"])
    assert (recipe.test_split, recipe.holdout) == ("none", 0.5)


REQUIRED = {"compute_targets": ["--generator", "g"], "experiment": ["--dataset", "d"]}
READERS = re.compile(r"load_(image_dataset|splits|test_split|model|classifier)|\w+\.from_pretrained")
# readers of what the recipe itself has written
OWN = {"MatchingTargets.from_pretrained(folder)", "DsCoPipeline.from_pretrained(folder)"}


@pytest.mark.parametrize("name", sorted(set(RECIPES) | {"quickstart"}))
def test_models_and_datasets_are_read_by_the_functions_that_explain_and_pin(name):
    for call in [node for node in ast.walk(ast.parse(SOURCES[name].read_text())) if isinstance(node, ast.Call)]:
        function = ast.unparse(call.func)
        assert not re.fullmatch(r"(Auto\w+|ResNet\w+)\.from_pretrained|load_dataset|load_from_disk", function)
        if READERS.fullmatch(function) and name not in ("publish", "quickstart") and ast.unparse(call) not in OWN:
            given = {keyword.arg for keyword in call.keywords}
            assert "revision" in given or None in given, f"{name}.py, line {call.lineno}: {ast.unparse(call)}"
