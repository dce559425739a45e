"""Folders of models with files that are damaged, missing, a variant, or of another model: named, with a way out."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTImageProcessor

from dsco_hf import DsCoPipeline
from dsco_hf.evaluators.preprocessing import ensure_preprocessing
from dsco_hf.sampling.models import check_weights, explained_model, load_classifier, load_model, variants_of
from dsco_hf.utils.files import DamagedFileError


WEIGHTS = {"transformer": "diffusion_pytorch_model.safetensors", "classifier": "model.safetensors"}
FILES = [f"{part}/{name}" for part, weights in WEIGHTS.items() for name in ("config.json", weights)]


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def rename(folder, old, new):
    for path in list(folder.glob(f"*/*{old}")):
        path.rename(path.with_name(path.name.replace(old, new)))


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", *FILES])
@pytest.mark.parametrize("share", [0, 0.3, 0.97])
def test_a_truncated_file_of_a_pipeline_is_named(folder, file, share):
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(DamagedFileError, match=f"^{folder / file} is damaged: .* again"):
        DsCoPipeline.from_pretrained(folder)


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", *FILES])
def test_a_missing_file_of_a_pipeline_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"`{file.split('/')[0]}`|{folder / file} is missing"):
        DsCoPipeline.from_pretrained(folder)


def test_a_folder_in_place_of_a_file(folder):
    path = folder / "classifier" / "model.safetensors"
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedFileError, match=f"{path} is a folder, and a file is needed there"):
        DsCoPipeline.from_pretrained(folder)


def test_only_a_variant_of_the_weights_is_there(folder):
    rename(folder, ".safetensors", ".fp16.safetensors")
    with pytest.raises(
        ValueError, match="of `(transformer|classifier)` only as variant 'fp16': pass `variant='fp16'`"
    ):
        DsCoPipeline.from_pretrained(folder)
    assert DsCoPipeline.from_pretrained(folder, variant="fp16").classifier is not None  # as it says
    with pytest.raises(
        ValueError, match="only as variant 'fp16' and none of the variant 'bf16': pass `variant='fp16'`"
    ):
        DsCoPipeline.from_pretrained(folder, variant="bf16")


def test_a_variant_that_is_not_there(folder):
    with pytest.raises(ValueError, match="has no variant 'fp16': leave `variant` out"):
        DsCoPipeline.from_pretrained(folder, variant="fp16")


def test_weights_of_another_model_are_not_left_at_random(folder):
    shutil.copyfile(folder / "classifier" / "model.safetensors", folder / "transformer" / WEIGHTS["transformer"])
    with pytest.raises(
        DamagedFileError, match=r"holds the weights of another model: of \d+ tensors of a DiT.* it has 0"
    ):
        DsCoPipeline.from_pretrained(folder)


def test_pickled_weights_are_told_from_damaged_ones(folder):
    rename(folder, "model.safetensors", "model.bin")
    with pytest.raises(ValueError, match=r"\.bin but no safetensors beside it, and pickles can run code"):
        DsCoPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["config.json", "model.safetensors"], {None}),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], {None}),
        (["model.fp16.safetensors", "model.safetensors"], {"fp16", None}),
        (["model.fp16-00001-of-00002.safetensors"], {"fp16"}),
        (["diffusion_pytorch_model-00001-of-00002.non_ema.safetensors"], {"non_ema"}),
        (["weights.safetensors"], {None}),
        (["model.bin"], set()),
    ],
)
def test_variants_by_file_name(files, found):
    assert variants_of(files) == found


def test_weights_in_no_format_that_is_read():
    with pytest.raises(
        FileNotFoundError, match=r"x has no weights: a safetensors file is needed, and there are \['m.onnx'"
    ):
        check_weights(["m.onnx"], name="x", component="")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_damaged_classifier_is_named(make, tmp_path, file):
    make.resnet().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    with pytest.raises(DamagedFileError, match=f"{tmp_path / file} is damaged"), explained_model(str(tmp_path)):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_part_of_the_weights_is_missing(make, tmp_path):
    make.resnet().save_pretrained(tmp_path, max_shard_size="1KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"{first} is missing, of 6 parts"), explained_model(str(tmp_path)):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not the folder of a model: it has no config.json"):
        with explained_model(str(tmp_path)):
            AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_damaged_image_processor_is_no_reason_to_guess(make, tmp_path):
    model = make.resnet()
    for name in ("image_size", "image_mean", "image_std"):
        delattr(model.config, name)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    assert json.loads(path.read_text())["size"]["height"] == 16
    path.write_text(path.read_text()[:50])
    with pytest.raises(DamagedFileError, match=f"{path} is damaged"):
        ensure_preprocessing(loaded)


def test_a_classifier_is_loaded_or_its_fault_is_named(make, tmp_path):
    model = make.resnet()
    model.save_pretrained(tmp_path / "plain")
    found = load_classifier(str(tmp_path / "plain"))
    assert not found.training and same_weights(found, model)
    model.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ValueError, match="only as variant 'fp16': pass `variant='fp16'` to `from_pretrained`"):
        load_classifier(str(tmp_path / "half"))
    AutoModelForImageClassification.from_pretrained(tmp_path / "half", variant="fp16").save_pretrained(
        tmp_path / "new"
    )
    assert same_weights(load_classifier(str(tmp_path / "new")), model)  # as it says
    with pytest.raises(FileNotFoundError, match="has no 'plane'. Nearest: 'plain'"):
        load_classifier(str(tmp_path / "plane"))
    make.convnet(channels=3).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "plain" / "model.safetensors")
    with pytest.raises(DamagedFileError, match="holds the weights of another model"):
        load_classifier(str(tmp_path / "plain"))


def test_pickled_weights_of_a_classifier(make, tmp_path):
    model = make.resnet()
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles can run code .* pass `use_safetensors=False` to `from_pretrained`"):
        load_classifier(str(tmp_path / "old"))
    trusted = AutoModelForImageClassification.from_pretrained(tmp_path / "old", use_safetensors=False)
    trusted.save_pretrained(tmp_path / "new")
    assert same_weights(load_classifier(str(tmp_path / "new")), model)  # as it says


def test_a_model_in_a_subfolder_with_its_own_processor(make, tmp_path):
    model = make.resnet()
    for name in ("image_size", "image_mean", "image_std"):
        delattr(model.config, name)
    model.save_pretrained(tmp_path / "part")
    ViTImageProcessor(size={"height": 20, "width": 20}).save_pretrained(tmp_path / "part")
    assert load_classifier(str(tmp_path), subfolder="part").config.image_size == 20
    (tmp_path / "part" / "model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=f"{tmp_path / 'part' / 'model.safetensors'} is damaged"):
        load_model(AutoModelForImageClassification, str(tmp_path), subfolder="part")


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
