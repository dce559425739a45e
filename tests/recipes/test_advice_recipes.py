"""What errors of the recipes say to do is done, literally, and works; and every error that says so is listed."""

import pytest
from accelerate import Accelerator

from advice import entries, follow
from dsco_hf import get_protocol
from dsco_hf.evaluators import load_image_set
from dsco_hf.utils.configs import parse_config
from recipes import compare, publish, train_evaluator, train_generator
from recipes import concentrate as concentrating
from recipes import plan as planning


def tables(w, *, size=8):
    """Two compared sets: one of one image per class, one of other images."""
    rows = w.real.select(range(3))
    rows.to_parquet(w.folder / "one1.parquet")
    w.real.select(range(6)).to_parquet(w.folder / "one2.parquet")
    rows.map(lambda row: {"image": row["image"].resize((size, size))}).to_parquet(w.folder / "other.parquet")
    w.two.to_parquet(w.folder / "two.parquet")
    return w.folder


def comparison(w, *options, datasets=("a=one1.parquet",)):
    folder = tables(w, size=16)
    named = [f"{name}={folder}/{path}" for name, path in (item.split("=") for item in datasets)]
    return parse_config(compare.ComparisonRecipe, ["--budgets", "1", "--datasets", *named, *options])


def sizes(w, *options):
    recipe = comparison(w, *options, datasets=("a=one1.parquet", "b=other.parquet"))
    if recipe.image_size is not None:
        return recipe.image_size  # as `main` does
    return recipe.size_of_all(recipe.open_compared())


def loaded(w, *options, path="one2.parquet"):
    recipe = comparison(w, *options, datasets=(f"a={path}",))
    protocol = get_protocol("quick")
    real = load_image_set(w.real, protocol=protocol)
    found = recipe.load_compared(recipe.open_compared(), real, protocol=protocol)
    return [len(images.labels) for images in found.values()]


def columns(w, *options):
    recipe = comparison(w, *options, datasets=("a=two.parquet",))
    return [rows.column_names for rows in recipe.open_compared().values()]


def real(label_type):
    recipe = parse_config(compare.ComparisonRecipe, ["--label_type", label_type, "--num_channels", "1"])
    return compare.described_study(recipe, Accelerator())[0].protocol.label_type


def checked(*options):
    return concentrating.check_recipe(parse_config(concentrating.ConcentrateRecipe, [*options]))


def planned(*options):
    return planning.main([*options, "--tiny", "true"])["rows"]


def evaluated(w, *options):
    w.small().to_parquet(w.folder / "small.parquet")
    w.real.to_parquet(w.folder / "real.parquet")
    recipe = parse_config(train_evaluator.EvaluatorRecipe, ["--dataset", f"{w.folder}/small.parquet", *options])
    return [len(own.labels) for own in train_evaluator.load_sets(recipe, get_protocol("quick"), shown=False)[:2]]


def card(w, *options):
    w.make.convnet().save_pretrained(w.folder / "model")
    recipe = parse_config(
        publish.PublishRecipe,
        ["--folder", f"{w.folder}/model", "--repo_id", "user/model", "--dry_run", "true", *options],
    )
    return publish.publish_folder(recipe)


def base(w, *options):
    recipe = parse_config(train_generator.GeneratorRecipe, ["--finetune_from", w.saved("plain"), *options])
    return recipe.load_base().num_classes


def new_base(w, *options):
    recipe = parse_config(train_generator.GeneratorRecipe, ["--block_out_channels", "32", *options])
    recipe.check_new(recipe, ["x", "y"])
    found = recipe.new_base(recipe, ["x", "y"], (1, 8))
    return None if found is None else found.prompts.config.texts


COMPARE = {
    "stored labels": (
        lambda w: real("stored"),
        "Use --label_type hard, or teacher with --teacher",
        lambda w: [real("hard"), real("teacher")],
        ["hard", "teacher"],
    ),
    "sets of several sizes": (
        lambda w: sizes(w),
        "choose one with --image_size, such as 8",
        lambda w: sizes(w, "--image_size", "8"),
        8,
    ),
    "a set of another budget": (
        lambda w: loaded(w),
        r"Compare at equal size, with \{budget\} in the path or config, or pass --allow_unequal true",
        lambda w: [loaded(w, path="one{budget}.parquet"), loaded(w, "--allow_unequal", "true")],
        [[3], [6]],
    ),
    "columns of a compared set": (
        lambda w: columns(w),
        "Here these are --datasets_image_column and --datasets_label_column",
        lambda w: columns(w, "--datasets_label_column", "shape"),
        [["image", "shape", "other"]],
    ),
    "a name of a compared set": (
        lambda w: parse_config(compare.ComparisonRecipe, ["--datasets", "digits"]),
        r"takes name=path\[@config\[@split\[@revision\]\]\] with a name of its own",
        lambda w: parse_config(compare.ComparisonRecipe, ["--datasets", "ours=digits@x@y@z"]).datasets,
        ["ours=digits@x@y@z"],
    ),
}

OPTIONS = {
    "an unknown option": (
        lambda w: checked("--images_per_class", "three"),
        "`--help` lists all options",
        lambda w: helped(checked),
        0,
    ),
    "more than a record": (
        lambda w: checked("--from_dataset", "user/name", "--seed", "3"),
        r"leave \['seed'\] out, or leave `--from` out",
        lambda w: [checked("--from_dataset", "user/name"), checked("--seed", "3", "--data_free")],
        [None, None],
    ),
    "nothing is matched": (
        lambda w: checked("--objective", "classifier", "--data_free"),
        "matches nothing: leave 'data_free' out",
        lambda w: checked("--objective", "classifier"),
        None,
    ),
    "quantiles of a dataset": (
        lambda w: checked("--objective", "quantile", "--data_free"),
        "matches real images: give `dataset`",
        lambda w: checked("--objective", "quantile", "--dataset", "digits"),
        None,
    ),
    "nothing to match": (
        lambda w: checked(),
        "give `dataset`, `targets` or `data_free`, or `optimization_steps: 0`",
        lambda w: [
            checked(*options)
            for options in (
                ["--dataset", "digits"],
                ["--targets", "t"],
                ["--data_free"],
                ["--optimization_steps", "0"],
            )
        ],
        [None] * 4,
    ),
    "nothing to plan": (
        lambda w: planned(),
        r"Give either `--generator` \(a folder or Hub id\) or `--preset`, one of \['imagenet1k'",
        lambda w: planned("--preset", "imagenet1k", "--device", "a100"),
        lambda found: len(found) > 0,
    ),
    "a file of no run": (
        lambda w: planning.of_run_config(w.folder / "c.yaml"),
        "`--run_config` is that of recipes/concentrate.py",
        lambda w: planning.of_run_config(planning.Path("recipes/configs/concentrate_digits.yaml"))["guidance_scale"],
        lambda found: found > 0,
    ),
    "a set without a test split": (
        lambda w: evaluated(w),
        "name the real dataset that its networks are to be tested on with --test_dataset",
        lambda w: evaluated(w, "--test_dataset", f"{w.folder}/real.parquet"),
        [3, 4],
    ),
    "an evaluator's dataset": (
        lambda w: card(w),
        "add --dataset_id user/name",
        lambda w: card(w, "--dataset_id", "user/name").repo_id,
        "user/model",
    ),
    "an autoencoder of its own": (
        lambda w: base(w, "--vae", "x"),
        "leave `vae` out",
        lambda w: base(w),
        3,
    ),
    "prompts of a new network of classes": (
        lambda w: new_base(w, "--architecture", "unet", "--prompts", "a {}"),
        "takes no prompts: leave `prompts` out, or choose `architecture='stable-diffusion'`",
        lambda w: [
            new_base(w, "--architecture", "unet"),
            new_base(w, "--architecture", "stable-diffusion", "--prompts", "a {}"),
        ],
        [None, [["a x"], ["a y"]]],
    ),
}


def helped(command):
    with pytest.raises(SystemExit) as raised:
        command("--help")
    return raised.value.code


TABLE = COMPARE | OPTIONS


@pytest.mark.parametrize("name", entries(TABLE, "nothing to plan", "stored labels"))
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
