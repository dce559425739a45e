"""What a pipeline's folder holds, and what is refused; see `test_hub_models.py` for repositories."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from dsco_hf import DsCoPipeline
from dsco_hf.sampling.loading import own_class
from hub.tiny import pickle_weights


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([0], num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt").images


def test_our_own_classifier_comes_back_without_trust(pipe, folder):
    loaded = DsCoPipeline.from_pretrained(folder)
    assert type(loaded.classifier) is type(pipe.classifier) and not loaded.classifier.training
    assert torch.equal(draw(loaded), draw(pipe))
    for name, tensor in pipe.classifier.state_dict().items():
        assert torch.equal(loaded.classifier.state_dict()[name], tensor)
    assert DsCoPipeline.from_pretrained(folder, classifier=None).classifier is None


def test_a_classifier_is_named_by_its_folder(make, folder, tmp_path):
    make.resnet(channels=1, image_size=8).save_pretrained(tmp_path / "resnet")
    named = DsCoPipeline.from_pretrained(folder, classifier=tmp_path / "resnet", dtype={"classifier": torch.float16})
    assert type(named.classifier).__name__ == "ResNetForImageClassification" and not named.classifier.training
    assert named.classifier.dtype == torch.float16 and named.denoiser.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="nowhere"):
        DsCoPipeline.from_pretrained(folder, classifier=str(tmp_path / "nowhere"))
    (tmp_path / "resnet" / "model.safetensors").rename(tmp_path / "resnet" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles can run code"):
        DsCoPipeline.from_pretrained(folder, classifier=str(tmp_path / "resnet"))


@pytest.mark.parametrize("place", ["vae", "preview_vae", "classifier", "classifier_2", "scheduler"])
def test_a_component_in_the_place_of_another_is_refused(make, place):
    with pytest.raises(TypeError, match=f"`{place}` must be an? .*, got UNet2DModel: pass components by name"):
        DsCoPipeline(make.transformer(), **{"scheduler": DDIMScheduler(), place: make.unet()})


def test_files_of_code_follow_the_components(pipe, make, folder):
    shim = "classifier/dsco_hf.evaluators.models.py"
    assert (folder / "pipeline.py").read_text().count("\n") == 1 and (folder / shim).is_file()
    pipe.register_modules(classifier=make.resnet())
    pipe.save_pretrained(folder)
    assert not (folder / shim).exists()


def test_pickles_are_refused(folder):
    first = pickle_weights(folder)[0]
    with pytest.raises(ValueError, match=f"{first} but no safetensors.*use_safetensors=False"):
        DsCoPipeline.from_pretrained(folder)


def test_folders_that_hold_no_pipeline(tmp_path, pipe, folder):
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        DsCoPipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        DsCoPipeline.from_pretrained(tmp_path / "gone")
    index = json.loads((folder / "model_index.json").read_text())
    for text, message in (("{", "is damaged: it may be truncated"), ("[]", "a JSON object is needed")):
        (folder / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            DsCoPipeline.from_pretrained(folder)
    index["classifier"] = ["dsco_hf.utils.safety", "ambient_token"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no model 'ambient_token'"):
        DsCoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("module", ["os", "dsco_hf", "dsco_hf.gone", "dsco_hf_evil.models", "dsco_hf..evaluators"])
def test_only_models_of_this_package_are_imported_by_name(module):
    with pytest.raises(ValueError, match="has no model"):
        own_class(module, "PreTrainedModel")


def test_diffusers_is_not_told_to_trust_anything(folder):
    with pytest.raises((ValueError, AttributeError)):
        DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline")
