"""Pipelines and evaluators on the Hub; see `test_hub.py` for datasets."""

import json

import huggingface_hub
import pytest

from hub import Client, ClientError
from hub.cards import validate_card


pytestmark = pytest.mark.slow  # clients are processes, and each imports what it needs


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
    from dsco_hf.sampling.pipeline import DsCoPipeline
    from dsco_hf.matching.targets import MatchingTargets
    from hub.tiny import draw
    pipe = DsCoPipeline.from_pretrained("ann/pipe")
    targets = MatchingTargets.from_pretrained("ann/pipe")
    targets.check_pipeline(pipe)
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
        assert fresh.run(code) == ["dsco_hf.sampling.pipeline", published["pixels"]]


def test_own_text_in_the_model_card_survives(hub, ann, published):
    ann.run(PUBLISH, repo_id="ann/pipe2", options={"with_targets": False})
    card = hub.files("ann/pipe2", kind="models")["README.md"].decode()
    assert "This repository holds none" in card
    hub.put("ann/pipe2", {"README.md": (card + "\nMy own words.\n").encode()}, kind="models")
    assert ann.run(PUBLISH, repo_id="ann/pipe2", options={})["commit"]
    card = hub.files("ann/pipe2", kind="models")["README.md"].decode()
    assert "My own words." in card and "one mean embedding per class" in card


# Our own classes as components.


@pytest.fixture(scope="module")
def own(hub, ann):
    return ann.run(PUBLISH, repo_id="ann/own", options={"own_classifier": True})


LOAD_OWN = """
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.matching.targets import MatchingTargets
from hub.tiny import draw
pipe = DsCoPipeline.from_pretrained("ann/own", **options)
MatchingTargets.from_pretrained("ann/own").check_pipeline(pipe)
return [type(pipe.classifier).__name__, pipe.classifier.training, draw(pipe)]
"""


def test_a_pipeline_with_our_own_classifier_needs_no_trust(hub, stranger, own):
    files = hub.files("ann/own", kind="models")
    line = files["classifier/dsco_hf.evaluators.models.py"].decode()
    assert line.count("\n") == 1 and "ConvNetForImageClassification" in line
    with hub.recorded() as log:
        assert stranger.run(LOAD_OWN, options={}) == ["ConvNetForImageClassification", False, own["pixels"]]
    assert not hub.requests("GET", r"classifier/.*\.py", log=log)
    assert not stranger.run("import sys\nreturn [name for name in sys.modules if 'diffusers_modules' in name]")
    assert stranger.run(LOAD_OWN, options={"revision": own["commit"], "local_files_only": True})[2] == own["pixels"]


def test_a_classifier_is_named_by_its_id_and_recorded_with_its_commit(hub, ann, stranger, own):
    classifier = hub.files("ann/own", kind="models")
    files = {
        name.removeprefix("classifier/"): classifier[name] for name in classifier if name.startswith("classifier/")
    }
    hub.store.create("models", "ann/convnet", private=False)
    hub.put("ann/convnet", {name: files[name] for name in files if not name.endswith(".py")}, kind="models")
    code = """
    from dsco_hf import DsCoPipeline
    from dsco_hf.concentration.set_records import drawn_record
    pipe = DsCoPipeline.from_pretrained("ann/own", classifier="ann/convnet", classifier_revision="main")
    record = drawn_record(pipe, None, method="plain", seed=0, parameters={})
    return [type(pipe.classifier).__name__, pipe.classifier.training, record["classifier"]]
    """
    name, training, told = stranger.run(code)
    assert (name, training, told["id"]) == ("ConvNetForImageClassification", False, "ann/convnet")
    assert len(told["revision"]) == 40 and len(told["sha256"]) == 64


def test_diffusers_alone_finds_our_own_classes_too(hub, tmp_path, own):
    code = """
    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("ann/own", custom_pipeline="pipeline", trust_remote_code=True)
    from hub.tiny import draw
    return [type(pipe).__module__, type(pipe.classifier).__module__, draw(pipe)]
    """
    with Client(hub.url, tmp_path / "diffusers") as fresh:
        assert fresh.run(code) == ["dsco_hf.sampling.pipeline", "dsco_hf.evaluators.models", own["pixels"]]


def test_options_of_loading_reach_our_own_classes(hub, ann, stranger, own, tmp_path):
    code = """
    import torch
    from dsco_hf.sampling.pipeline import DsCoPipeline
    half = DsCoPipeline.from_pretrained("ann/own", dtype=torch.float16)
    without = DsCoPipeline.from_pretrained("ann/own", classifier=None, cache_dir=cache_dir)
    return [str(half.classifier.dtype), str(half.transformer.dtype), without.classifier is None]
    """
    with hub.recorded() as log:
        assert stranger.run(code, cache_dir=str(tmp_path / "cache")) == ["torch.float16", "torch.float16", True]
    assert len(hub.requests("GET", "/ann/own/resolve/.*/classifier/", log=log)) == 0
    assert (tmp_path / "cache" / "models--ann--own").is_dir()
    repo = hub.store.load("models", "ann/own")
    hub.store.save("models", "ann/own", {**repo, "private": True})
    try:
        with pytest.raises(ClientError, match="no such repository, or it is private") as raised:
            stranger.run(LOAD_OWN, options={"cache_dir": str(tmp_path / "empty")})
        assert raised.value.kind == "FileNotFoundError"
        with Client(hub.url, tmp_path / "friend", token="hf_" + "F" * 34) as friend:
            hub.add_user("ann", "hf_" + "F" * 34, role="read")
            assert friend.run(LOAD_OWN, options={})[2] == own["pixels"]
    finally:
        hub.store.save("models", "ann/own", repo)


def test_what_cannot_be_loaded_is_explained(hub, stranger, tmp_path, published):
    code = "from dsco_hf.sampling.pipeline import DsCoPipeline\nDsCoPipeline.from_pretrained(name, **options)"
    for name, options, kind, message in [
        ("ann/gone", {}, "FileNotFoundError", "no such repository"),
        ("ann/pipe", {"revision": "gone"}, "FileNotFoundError", "no such revision"),
        ("./gone", {}, "FileNotFoundError", "There is no file or folder ./gone"),
        ("ann/never", {"local_files_only": True}, "FileNotFoundError", "not in the cache"),
        ("a b", {}, "ValueError", "not a repository id"),
    ]:
        with pytest.raises(ClientError, match=message) as raised:
            stranger.run(code, name=name, options=options)
        assert raised.value.kind == kind
    with Client(hub.url, tmp_path / "offline", HF_HUB_OFFLINE="1") as offline:
        with pytest.raises(ClientError, match=r"Cannot load ann/pipe: .*offline.*hub"):
            offline.run(code, name="ann/pipe", options={})


def test_foreign_components_are_refused(ann):
    code = """
    import torch
    from dsco_hf.hub import publish_pipeline
    from hub.tiny import tiny_pipeline
    pipe = tiny_pipeline()
    class Own(type(pipe.classifier)):
        pass
    Own.__module__ = "mine.models"
    pipe.register_modules(classifier=Own(pipe.classifier.config).eval())
    publish_pipeline(pipe, "ann/foreign")
    """
    with pytest.raises(ClientError, match="'classifier' is a Own of 'mine'.*register_modules") as raised:
        ann.run(code)
    assert raised.value.kind == "ValueError"
    as_it_says = """
    pipe.register_modules(classifier=None)
    publish_pipeline(pipe, "ann/foreign")
    own = Own(tiny_pipeline().classifier.config).eval()
    return type(type(pipe).from_pretrained("ann/foreign", classifier=own).classifier).__name__
    """
    assert ann.run(code.replace('publish_pipeline(pipe, "ann/foreign")', "").rstrip() + as_it_says) == "Own"
    with pytest.raises(ClientError, match="Expected a DsCoPipeline, but got a dict"):
        ann.run("from dsco_hf.hub import publish_pipeline\npublish_pipeline({}, 'ann/x')")


# The pipeline's own methods.


def test_push_to_hub_sends_card_and_shim(hub, ann, own):
    code = """
    from hub.tiny import tiny_pipeline, tiny_targets
    pipe = tiny_pipeline(own_classifier=True)
    first = pipe.push_to_hub("ann/pushed", targets=tiny_targets(pipe), license="mit", private=True)
    pipe.save_pretrained("saved", push_to_hub=True, repo_id="ann/pushed2", commit_message="Mine")
    return [first.commit, pipe.push_to_hub("ann/pushed2").commit]
    """
    first, again = ann.run(code)
    files = hub.files("ann/pushed", kind="models")
    assert first and again is None and hub.store.load("models", "ann/pushed")["private"]
    assert {"pipeline.py", "targets.safetensors", "classifier/dsco_hf.evaluators.models.py"} <= set(files)
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and 'from_pretrained("ann/pushed")' in card.content
    assert hub.history("ann/pushed2", kind="models")[0] == "Mine"


# Pickles.


def test_pickled_weights_are_refused_unless_asked_for(hub, ann, stranger, published):
    code = """
    from pathlib import Path
    from hub.tiny import pickle_weights, tiny_pipeline
    tiny_pipeline().save_pretrained("pickled")
    pickle_weights("pickled")
    return {str(p.relative_to("pickled")): p.read_bytes().hex() for p in Path("pickled").rglob("*") if p.is_file()}
    """
    files = {path: bytes.fromhex(content) for path, content in ann.run(code).items()}
    hub.store.create("models", "ann/pickled", private=False)
    hub.put("ann/pickled", files, kind="models")
    load = """
    from dsco_hf.sampling.pipeline import DsCoPipeline
    from hub.tiny import draw
    return draw(DsCoPipeline.from_pretrained(name, **options))
    """
    for client, name in ((stranger, "ann/pickled"), (ann, "pickled")):
        with hub.recorded() as log, pytest.raises(ClientError, match=f"{name} has .*pickles can run code.*refs/pr/N"):
            client.run(load, name=name, options={})
        assert not hub.requests("GET", r"\.bin", log=log)
        assert client.run(load, name=name, options={"use_safetensors": False}) == published["pixels"]
    with pytest.raises(ClientError, match="safetensors only"):
        ann.run("from hub.tiny import tiny_pipeline\ntiny_pipeline().save_pretrained('x', safe_serialization=False)")


def test_the_converted_weights_of_a_known_generator_are_found(hub, ann, stranger, published):
    """As on the Hub: `main` of facebook/DiT-XL-2-256 holds pickles, and `refs/pr/1` the conversion."""
    hub.store.create("models", "facebook/DiT-XL-2-256", private=False)
    files = hub.files("ann/pipe", kind="models")
    plain = {path: content for path, content in files.items() if not path.endswith(".safetensors")}
    hub.put("facebook/DiT-XL-2-256", {**plain, "transformer/diffusion_pytorch_model.bin": b"no"}, kind="models")
    head = hub.store.resolve(hub.store.load("models", "facebook/DiT-XL-2-256"), "main")
    hub.store.add_ref("models", "facebook/DiT-XL-2-256", "refs/pr/1", head)
    hub.put("facebook/DiT-XL-2-256", files, kind="models", revision="refs/pr/1")
    code = """
    from dsco_hf.sampling.pipeline import DsCoPipeline
    from hub.tiny import draw
    return draw(DsCoPipeline.from_pretrained("facebook/DiT-XL-2-256", **options))
    """
    assert stranger.run(code, options={}) == published["pixels"]
    with pytest.raises(ClientError, match="pickles can run code"):
        stranger.run(code, options={"revision": "main"})


def test_a_repository_with_a_variant_only(hub, ann, stranger, published):
    files = hub.files("ann/pipe", kind="models")
    variant = {path.replace(".safetensors", ".fp16.safetensors"): content for path, content in files.items()}
    hub.store.create("models", "ann/half", private=False)
    hub.put("ann/half", variant, kind="models")
    code = """
    from dsco_hf.sampling.pipeline import DsCoPipeline
    from hub.tiny import draw
    return draw(DsCoPipeline.from_pretrained("ann/half", **options))
    """
    with pytest.raises(
        ClientError, match="ann/half has the weights of `.*` only as variant 'fp16': pass `variant='fp16'`"
    ):
        stranger.run(code, options={})
    assert stranger.run(code, options={"variant": "fp16"}) == published["pixels"]  # as it says


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


TELLTALE = """
import os
from pathlib import Path
from dsco_hf import DsCoPipeline, publish_evaluator, publish_pipeline
from hub.tiny import draw, tiny_pipeline, tiny_targets
from transformers import AutoModelForImageClassification
home = Path("home-of-telltale").absolute()
tiny_pipeline().save_pretrained(home / "pipe")
tiny_pipeline().classifier.save_pretrained(home / "net")
net = AutoModelForImageClassification.from_pretrained(home / "net")
pipe = DsCoPipeline.from_pretrained(home / "pipe", classifier=net.eval())
publish_pipeline(pipe, "ann/placeless", targets=tiny_targets(pipe))
publish_evaluator(net, "ann/placeless-net", dataset_id="ann/set", protocol={"dataset": str(home / "photos")})
again = DsCoPipeline.from_pretrained("ann/placeless")
publish_pipeline(again, "ann/placeless-again")
return [draw(pipe), draw(again), again.config._name_or_path]
"""


def test_no_published_file_says_where_models_lay(hub, ann):
    before, after, name = ann.run(TELLTALE)
    assert before == after and "placeless" in name
    names = ("ann/placeless", "ann/placeless-net", "ann/placeless-again")
    published = {(name, path): content for name in names for path, content in hub.files(name, kind="models").items()}
    assert ("ann/placeless", "transformer/config.json") in published and len(published) > 15
    for place, content in published.items():
        assert b"telltale" not in content and b"/snapshots/" not in content, place
    index = json.loads(published["ann/placeless", "model_index.json"])
    assert index["_class_name"] == "DsCoPipeline" and "_name_or_path" not in index
    # the place of a component of the Hub's cache becomes the repository that it came from
    assert json.loads(published["ann/placeless-again", "transformer/config.json"])["_name_or_path"] == "ann/placeless"
