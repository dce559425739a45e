"""Pipelines and evaluators on the Hub; see `test_hub.py` for datasets."""

import json

import huggingface_hub
import pytest

from hub import Client, ClientError, LoopbackHub
from hub.cards import validate_card
from hub.samples import TOKEN


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("server")) as hub:
        hub.add_user("ann", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def ann(hub, tmp_path_factory):
    with Client(hub.url, tmp_path_factory.mktemp("ann"), token=TOKEN) as client:
        yield client
        assert TOKEN not in client.output()


@pytest.fixture(scope="module")
def stranger(hub, tmp_path_factory):
    with Client(hub.url, tmp_path_factory.mktemp("stranger")) as client:
        yield client


PUBLISH = "from hub.tiny import publish_tiny_pipeline\nreturn publish_tiny_pipeline(repo_id, **options)"


@pytest.fixture(scope="module")
def published(hub, ann):
    return ann.run(PUBLISH, repo_id="ann/pipe", options={"dataset_id": "ann/digits", "license": "cc-by-4.0"})


def test_a_pipeline_is_one_commit_of_components_targets_card_and_shim(hub, ann, published):
    files = hub.files("ann/pipe", kind="models")
    assert hub.history("ann/pipe", kind="models") == ["Publish a pipeline with dsco_hf", "initial commit"]
    assert {"README.md", "model_index.json", "pipeline.py", "targets.json", "targets.safetensors"} <= set(files)
    assert files["pipeline.py"].decode().count("\n") == 1
    assert not [path for path in files if path.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads(files["model_index.json"])["_class_name"] == "DsCoPipeline"
    card = files["README.md"].decode()
    assert validate_card(card, "model") == [] and huggingface_hub.ModelCard(card).data.datasets == ["ann/digits"]
    assert 'DsCoPipeline.from_pretrained("ann/pipe")' in card
    again = ann.run(PUBLISH, repo_id="ann/pipe", options={"dataset_id": "ann/digits", "license": "cc-by-4.0"})
    assert again["commit"] is None


def test_others_load_it_with_our_class_and_draw_the_same(stranger, published):
    code = """
    from dsco_hf.pipeline import DsCoPipeline
    from dsco_hf.targets import MatchingTargets
    from hub.tiny import draw
    pipe = DsCoPipeline.from_pretrained("ann/pipe")
    targets = MatchingTargets.from_pretrained("ann/pipe")
    targets.check_classifier(pipe.classifier)
    return [draw(pipe), targets.class_names]
    """
    assert stranger.run(code) == [published["pixels"], ["cat", "dog"]]


def test_others_load_it_with_diffusers_alone(hub, tmp_path, published):
    code = """
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("ann/pipe", custom_pipeline="pipeline", trust_remote_code=True)
    from hub.tiny import draw
    return [type(pipe).__module__, draw(pipe)]
    """
    with Client(hub.url, tmp_path / "diffusers") as fresh:
        assert fresh.run(code) == ["dsco_hf.pipeline", published["pixels"]]


def test_own_text_in_the_model_card_survives(hub, ann, published):
    ann.run(PUBLISH, repo_id="ann/pipe2", options={"with_targets": False})
    card = hub.files("ann/pipe2", kind="models")["README.md"].decode()
    assert "This repository holds none" in card
    hub.put("ann/pipe2", {"README.md": (card + "\nMy own words.\n").encode()}, kind="models")
    assert ann.run(PUBLISH, repo_id="ann/pipe2", options={})["commit"]
    card = hub.files("ann/pipe2", kind="models")["README.md"].decode()
    assert "My own words." in card and "one mean embedding per class" in card


def test_components_that_nobody_could_load_are_refused(ann):
    code = """
    from dsco_hf.evaluators import build_evaluator
    from dsco_hf.hub import publish_pipeline
    from hub.tiny import tiny_pipeline
    pipe = tiny_pipeline()
    pipe.register_modules(
        classifier=build_evaluator("convnet", class_names=["cat", "dog"], image_size=8, num_channels=1, width=4).eval()
    )
    publish_pipeline(pipe, "ann/own")
    """
    with pytest.raises(ClientError, match="'classifier' is a ConvNet.*publish_evaluator") as raised:
        ann.run(code)
    assert raised.value.kind == "ValueError"
    with pytest.raises(ClientError, match="Expected a DsCoPipeline, but got a dict"):
        ann.run("from dsco_hf.hub import publish_pipeline\npublish_pipeline({}, 'ann/x')")


EVALUATOR = """
from hub.tiny import tiny_pipeline
from dsco_hf.hub import publish_evaluator
return vars(publish_evaluator(tiny_pipeline().classifier, repo_id, **options))
"""


def test_evaluators_carry_a_result_that_links_the_dataset(hub, ann, stranger):
    options = {
        "dataset_id": "ann/set",
        "dataset_config": "ipc10",
        "accuracy": 0.968,
        "protocol": {"steps": 9},
    }
    result = ann.run(EVALUATOR, repo_id="ann/evaluator", options=options)
    files = hub.files("ann/evaluator", kind="models")
    assert result["commit"] and {"README.md", "config.json", "model.safetensors"} <= set(files)
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert validate_card(card.content, "model") == []
    (evaluation,) = card.data.eval_results
    assert (evaluation.dataset_type, evaluation.dataset_config, evaluation.metric_value) == ("ann/set", "ipc10", 0.968)
    assert card.data.datasets == ["ann/set"] and "96.80 %" in card.content
    assert ann.run(EVALUATOR, repo_id="ann/evaluator", options=options)["commit"] is None
    code = """
    from transformers import AutoModelForImageClassification
    return AutoModelForImageClassification.from_pretrained("ann/evaluator").config.image_size
    """
    assert stranger.run(code) == 8
    with pytest.raises(ClientError, match="fraction"):
        ann.run(EVALUATOR, repo_id="ann/evaluator2", options={**options, "accuracy": 96.8})


RECIPE = """
import sys
from hub.client import ROOT
from hub.tiny import tiny_pipeline, tiny_targets
sys.path.insert(0, str(ROOT / "recipes"))
import publish as recipe
pipe = tiny_pipeline()
pipe.save_pretrained("pipe")
tiny_targets(pipe).save_pretrained("targets")
pipe.classifier.save_pretrained("evaluator")
recipe.main(["--folder", "pipe", "--repo_id", "ann/by-recipe", "--targets", "targets", "--license", "mit"])
options = ["--folder", "evaluator", "--repo_id", "ann/net-by-recipe"]
recipe.main([*options, "--dataset_id", "ann/set", "--accuracy", "0.5", "--seed", "1"])
try:
    recipe.main(options)
except SystemExit as error:
    return str(error)
"""


def test_the_recipe_publishes_pipelines_and_evaluators(hub, ann):
    assert "add --dataset_id user/name" in ann.run(RECIPE)
    files = hub.files("ann/by-recipe", kind="models")
    assert {"pipeline.py", "targets.safetensors", "transformer/diffusion_pytorch_model.safetensors"} <= set(files)
    assert huggingface_hub.ModelCard(files["README.md"].decode()).data.license == "mit"
    card = huggingface_hub.ModelCard(hub.files("ann/net-by-recipe", kind="models")["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.5
