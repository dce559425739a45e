"""Names of libraries that are not public: the few that are used, which have no public twin, are still there."""

import ast
from pathlib import Path

import datasets
import diffusers
import pytest
import transformers

import dsco_hf


ROOT = Path(dsco_hf.__file__).parent
USED = {
    "_resolve_features": datasets.IterableDataset,  # types of a stream that declares none
    "_execution_device": diffusers.DiffusionPipeline,  # where an offloaded pipeline computes
    "_callback_tensor_inputs": None,  # what diffusers asks of a pipeline class; ours
    "_threshold_sample": diffusers.DDIMScheduler,  # dynamic thresholding, as the scheduler itself does it
    "_init_weights": transformers.PreTrainedModel,  # the hook of model classes
    "_actions": None,  # of argparse
}


def private_names(path):
    """Attributes with a leading underscore, other than of `self`, `cls` and what is made in the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if not is_self(node.value) and node.attr not in own and not of_torch(node):
                yield node.attr


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def of_torch(node):
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("torch", "_ATEN")


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_private_names_are_used(path):
    assert set(private_names(path)) <= set(USED)


@pytest.mark.parametrize("name", [name for name, owner in USED.items() if owner is not None])
def test_those_that_are_used_exist(name):
    assert hasattr(USED[name], name)


def test_what_diffusers_asks_of_a_pipeline_class_is_ours():
    assert "_callback_tensor_inputs" in vars(dsco_hf.DsCoPipeline)
