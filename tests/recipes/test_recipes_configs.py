"""Every config in recipes/configs runs as it stands, at small size, where what its first lines make is there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import DatasetDict
from diffusers import DDIMScheduler, UNet2DModel

from conftest import NAMES, striped_images, tiny_convnet, tiny_resnet, tiny_vae
from dsco_hf import DsCoPipeline
from dsco_hf.evaluators import get_protocol
from dsco_hf.hub.folder import save_dataset_folder
from dsco_hf.sampling.loading import embedded_folder
from dsco_hf.utils.configs import check_made, parse_config
from recipes import (
    compare,
    compute_targets,
    concentrate,
    experiment,
    lossless,
    plan,
    train_classifier,
    train_evaluator,
    train_generator,
)


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
RECIPES = {
    "bench": (experiment, experiment.ExperimentRecipe),
    "classifier": (train_classifier, train_classifier.ClassifierRecipe),
    "compare": (compare, compare.ComparisonRecipe),
    "concentrate": (concentrate, concentrate.ConcentrateRecipe),
    "evaluator": (train_evaluator, train_evaluator.EvaluatorRecipe),
    "experiment": (experiment, experiment.ExperimentRecipe),
    "generator": (train_generator, train_generator.GeneratorRecipe),
    "lossless": (lossless, lossless.SearchOptions),
    "targets": (compute_targets, compute_targets.TargetsRecipe),
}
INPUTS = ("generator", "classifier", "finetune_from")  # folders that other commands make
SPECS = '[{}, {"network": "untrained", "architecture": "convnet-2", "width": 4}]'
HUB = ("uoft-cs/cifar10", "frgfm/imagenette")
IMAGENETTE = ("tench", "chain saw")
SMALL = {
    "classifier": "--epochs none --steps 2 --batch_size 4",
    "compare": "--budgets 1 --steps 2 --batch_size 4 --seeds 2",
    "concentrate": "--images_per_class 1 --num_inference_steps 2",
    "evaluator": "--steps 2 --batch_size 4 --seeds 2",
    "experiment": "--budgets 1 --synthesis_seeds 1 --training_seeds 1 --num_inference_steps 2 --samples_per_class 2 "
    "--template_steps 2 --quantile_iterations 1 --steps 2 --epochs none --batch_size 4",
    "generator": "--train_steps 2 --batch_size 4 --layers_per_block 1 --num_layers 1 --num_attention_heads 2 "
    "--attention_head_dim 8 --num_samples_per_class 1 --num_inference_steps 2 --evaluate_every none",
    "lossless": "--epochs none --steps 60 --batch_size 32 --margin 0.1 --trainings 6 --reference_seeds 2 "
    "--compile false",
    "targets": "--embedding_dim 32",
}


SMALL["bench"] = SMALL["experiment"]


def kind_of(path):
    return path.stem.split("_")[0]


def fresh():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def tiny_pipeline(names, channels):
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
        num_class_embeds=len(names) + 1,
    )  # fmt: skip
    return DsCoPipeline(unet=unet, scheduler=DDIMScheduler(), id2label=dict(enumerate(names)))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder like a clone after the commands of the first lines: tiny data and models where configs name them."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for name, names in (("cifar10", NAMES), ("imagenette", IMAGENETTE)):
        parts = {
            split: striped_images((12 // len(names),) * len(names), names=names, seed=seed).map(
                lambda row: {"image": row["image"].convert("RGB").resize((16, 16))}
            )
            for seed, split in enumerate(("train", "test" if name == "cifar10" else "validation"))
        }
        configs = ["default"] if name == "cifar10" else ["160px", "320px"]
        save_dataset_folder({config: DatasetDict(parts) for config in configs}, folder / name)
    tiny_vae(channels=3).save_pretrained(folder / "vae")
    digits = [str(digit) for digit in range(10)]
    for path in CONFIGS:
        values = yaml.safe_load(path.read_text())
        names = digits if values.get("dataset") == "digits" else IMAGENETTE if "imagenette" in path.stem else NAMES
        channels = 1 if names == digits else 3
        for option in INPUTS:
            name = values.get(option)
            if name is None or embedded_folder(name) or (folder / name).exists():
                continue
            if option == "classifier":
                tiny_convnet(names=names, channels=channels).save_pretrained(folder / name)
            else:
                tiny_pipeline(NAMES if option == "finetune_from" else names, channels).save_pretrained(folder / name)
    sets = striped_images((1,) * 10, names=digits)
    save_dataset_folder({f"ipc{n}": sets for n in (1, 3, 10)}, folder / "outputs" / "quickstart" / "dataset")
    return folder


def arguments(path, folder):
    """The command line of a config at small size, without the Hub."""
    kind, values = kind_of(path), yaml.safe_load(path.read_text())
    given = ["--config", str(path.relative_to(ROOT)), *SMALL[kind].split()]
    dataset = values.get("dataset", values.get("real"))
    if dataset in HUB:
        given += [
            "--real" if kind == "compare" else "--dataset",
            str(folder / dataset.split("/")[1]),
        ]
    if kind == "generator":
        if "block_out_channels" in values:
            widths = ["8"] * len(values["block_out_channels"].split(","))
            given += ["--block_out_channels", ",".join(widths)]
        if values.get("image_size", 0) > 16:
            given += ["--image_size", "16"]
        given += ["--vae", str(folder / "vae")] if "vae" in values else []
    if kind == "compare" and values["real"] in HUB:
        given += ["--model_options", '{"width": 4}']
    if kind in ("bench", "experiment"):
        given += [
            "--model_options",
            '{"width": 4}',
            "--architecture",
            "convnet-2",
        ]
        given += ["--features", SPECS, "--images_per_call", "4", "--batch_size", "4"]
    if kind == "classifier" and values["architecture"] == "resnet-18":
        given += ["--model_options", '{"width": 4}']
    return given


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name != "protocols"], ids=lambda path: path.stem
)
def test_runs_as_it_stands(path, work, monkeypatch):
    monkeypatch.chdir(work)
    module, _ = RECIPES[kind_of(path)]
    given = arguments(path, work)
    if "px" in path.stem:  # these have one output folder, as only one of them is wanted
        shutil.rmtree("outputs/generator-checkpoints", ignore_errors=True)
    if path.stem == "concentrate_imagenette":
        tiny_pipeline(IMAGENETTE, 3).save_pretrained(work / "dit")
        tiny_resnet(names=IMAGENETTE, image_size=8).save_pretrained(work / "resnet")
        given += ["--generator", "dit", "--classifier", "resnet"]
    try:
        module.main(given)
    finally:
        fresh()
    output = Path(yaml.safe_load(path.read_text())["output_dir"])
    written = "lossless.json" if module is lossless else "results.json"
    assert (output / written).is_file()
    if kind_of(path) == "concentrate":
        models = given[given.index("--generator") :] if "--generator" in given else []
        found = plan.main(["--run_config", str(path.relative_to(ROOT)), "--images_per_class", "1", *models])
        assert found["rows"][0]["images"] == 10  # of ten digits, and of the ten classes of the label set
    if path.stem == "lossless_digits":  # a plan reads the dataset itself
        found = plan.main(["--search_config", str(path.relative_to(ROOT)), "--num_processes", "1", "4"])
        assert found["trainings"]["fewer images"] == 20 and found["seconds"][1] > 2 * found["seconds"][4]
        fresh()


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "protocols"], ids=lambda path: path.stem
)
def test_protocols_load(path):
    assert get_protocol(str(path)).source


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_it_needs_is_made_by_a_command_that_is_told(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load(path.read_text())
    for option in INPUTS:
        if str(values.get(option)).startswith("outputs/"):
            with pytest.raises(FileNotFoundError, match=r"It is made by this command:\n.*recipes/train_\w+\.py"):
                check_made(ROOT / "recipes", {option: values[option]})


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name != "protocols"], ids=lambda path: path.stem
)
def test_its_own_commands_are_ones_that_the_recipes_take(path, monkeypatch):
    """Every command of the first lines, with its options."""
    monkeypatch.chdir(ROOT)
    shown = re.sub(r"\\\n#? *", "", path.read_text())
    commands = re.findall(
        r"^#? +(?:[A-Z_]+=\S+ )*(?:accelerate|python) .*?recipes/(\w+)\.py (.*)$", shown, re.MULTILINE
    )
    assert any(f"configs/{path.name}" in options for _, options in commands)
    for name, options in commands:
        recipe = next(made for module, made in RECIPES.values() if module.__name__.endswith(f".{name}"))
        parse_config(recipe, shlex.split(options))
