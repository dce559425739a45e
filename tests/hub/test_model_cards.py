import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from transformers import ResNetConfig, ResNetForImageClassification

from dsco_hf.hub.model_cards import FILL, pipeline_card_template, render_evaluator_card, render_pipeline_card
from dsco_hf.utils.markdown import MARKED_SECTION
from hub.cards import validate_card
from hub.golden import check_golden
from hub.samples import HOSTILE_NAMES


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, num_layers=1, sample_size=8, num_embeds_ada_norm=3
    )


def pipeline(transformer, names=("cat", "dog", "](javascript:alert(1))")):
    pipe = DiTPipeline(transformer, None, DDIMScheduler())
    pipe.register_to_config(id2label={str(i): name for i, name in enumerate(names)})
    return pipe


def evaluator(names=("cat", "dog")):
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_channels=1,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    config.image_size, config.image_mean = 8, [0.5]
    return ResNetForImageClassification(config)


def test_pipeline_card_md_is_a_complete_card():
    text = pipeline_card_template()
    assert validate_card(text, "model") == []
    data = huggingface_hub.ModelCard(text).data
    assert data.library_name == "diffusers" and "dataset-concentration" in data.tags
    assert len(MARKED_SECTION.findall(text)) == 1 and {match["name"] for match in FILL.finditer(text)} == {
        "summary",
        "components",
        "targets",
        "measured",
        "license",
    }
    for needed in (
        "DsCoPipeline.from_pretrained",
        "custom_pipeline",
        "trust_remote_code=True",
        "2603.27987",
        "## Limits",
    ):
        assert needed in text


def test_a_published_pipeline_is_described(transformer):
    text = render_pipeline_card(
        pipeline(transformer), repo_id="ann/pipe", has_targets=True, dataset_id="ann/digits", license="cc-by-nc-4.0"
    )
    check_golden("pipeline_card.md", text)
    assert validate_card(text, "model") == [] and "user/dsco-pipeline" not in text
    data = huggingface_hub.ModelCard(text).data
    assert data.license == "cc-by-nc-4.0" and data.datasets == ["ann/digits"]
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert f"| transformer | DiTTransformer2DModel | {count:,} | predicts the noise" in text
    assert "| vae |" not in text  # there is none in this one
    assert 'MatchingTargets.from_pretrained("ann/pipe")' in text and "Not for commercial use" in text
    assert "3 classes (cat, dog, " in text and "](javascript" not in text.replace("\\]", "")


def test_unknown_licences_and_missing_targets_are_said(transformer):
    text = render_pipeline_card(pipeline(transformer), repo_id="ann/pipe")
    assert "licence of these weights is not known" in text and "This repository holds none" in text
    assert huggingface_hub.ModelCard(text).data.license == "unknown"


def test_known_generators_bring_their_licence(transformer):
    pipe = pipeline(transformer)
    pipe.register_to_config(_name_or_path="facebook/DiT-XL-2-256")
    data = huggingface_hub.ModelCard(render_pipeline_card(pipe, repo_id="ann/pipe")).data
    assert data.license == "cc-by-nc-4.0" and data.base_model == "facebook/DiT-XL-2-256"


def test_evaluator_cards_have_a_model_index():
    text = render_evaluator_card(
        evaluator(),
        repo_id="ann/net",
        dataset_id="ann/small",
        accuracy=0.968,
        dataset_config="ipc10",
        dataset_revision="5" * 40,
        protocol={"steps": 400},
        seed=1,
        license="mit",
    )
    check_golden("evaluator_card.md", text)
    assert validate_card(text, "model") == []
    data = huggingface_hub.ModelCard(text).data
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_config, result.metric_value) == ("ann/small", "ipc10", 0.968)
    assert result.dataset_revision == "5" * 40 and data.model_name == "net" and data.license == "mit"
    assert "**96.80 %** (one run, seed 1)" in text and "| steps | 400 |" in text and "1 × 8 × 8 pixels" in text
    assert "import dsco_hf" not in text  # a stock architecture


def test_evaluator_cards_without_a_result():
    text = render_evaluator_card(evaluator(), repo_id="ann/net", dataset_id="ann/small")
    assert validate_card(text, "model") == [] and huggingface_hub.ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_class_names_harm_nothing(name):
    text = render_evaluator_card(
        evaluator(["ok", name]), repo_id="ann/net", dataset_id="ann/small", protocol={name: name}, license="other"
    )
    body = text.split("\n---\n", 1)[1]
    assert huggingface_hub.ModelCard(text).data.license == "other"
    assert "<script" not in body and "](javascript" not in body.replace("\\]", "") and "---" not in body.splitlines()
    assert body.count("<!-- dsco_hf:end") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy": 96.8}, "fraction in .0, 1., but is 96.8. Divide"),
        ({"accuracy": -0.1}, "fraction"),
        ({"dataset_id": "](javascript:x)"}, "Repo id"),
        ({"repo_id": '"); evil("'}, "Repo id"),
    ],
)
def test_bad_arguments_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        render_evaluator_card(evaluator(), **{"repo_id": "ann/net", "dataset_id": "ann/small", **options})
