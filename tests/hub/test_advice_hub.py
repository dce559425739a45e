"""What errors about published datasets and models, their records and cards say to do is done, and works."""

import json

import pytest
from datasets import ClassLabel, Dataset, Value

from advice import FAST, entries, follow
from dsco_hf import DsCoPipeline, MatchingTargets, concentrate, save_dataset_folder
from dsco_hf.concentration.config_records import by_config, to_json
from dsco_hf.concentration.records import concentration_record
from dsco_hf.data.shards import as_configs
from dsco_hf.hub.folder import parse_record, read_folder
from dsco_hf.hub.push import PushOptions, make_target, refuse_secrets
from dsco_hf.hub.remake import load_recorded
from dsco_hf.utils.markdown import merge_cards


SECRET = "hf_" + "Z" * 34
NUMBERS = Value("int64")
CARD = "---\nlicense: mit\n---\n\n# Mine\n"


def columns(w, **names):
    """The real images with other names of columns."""
    rows = w.real
    for old, new in names.items():
        rows = rows.rename_column(old, new)
    return rows


def published(w, configs=None, name="set", **options):
    """What is recorded of a folder that was written."""
    folder = save_dataset_folder(w.real if configs is None else configs, w.folder / name, **options)
    return json.loads((folder / "concentration.json").read_text(encoding="utf-8"))


def as_rows(found):
    return {name: len(splits["train"]) for name, splits in as_configs(found).items()}


def softened(w, lengths):
    return w.real.select(range(len(lengths))).add_column("soft_label", [[1.0] + [0.0] * (n - 1) for n in lengths])


def blocked(w, path, kind):
    """Something else at the place of a dataset's folder."""
    if kind == "file" and not path.exists():
        path.write_text("a", encoding="utf-8")
    if kind == "foreign" and not path.exists():
        path.mkdir()
        (path / "notes.txt").write_text("mine", encoding="utf-8")
    return path


def damaged(w, remove=None):
    """A published dataset that lacks one of its files."""
    published(w)
    for path in (w.folder / "set").rglob(remove):
        path.unlink()
    return w.folder / "set"


def fewer(w):
    return MatchingTargets.from_dataset(
        w.real.select(range(9)), w.pipe, features={}, embedding_dim=256, progress=False
    )


def plain(w):
    return concentrate(w.pipe, None, 1, progress=False, method="plain", **FAST)


def told(w, **source):
    """The recorded source of targets that know which data they are of."""
    w.targets.provenance |= {"population": "data", "dataset": "user/a"}
    parameters = {"images_per_class": 1, **FAST}
    return concentration_record(w.pipe, w.targets, method="nopt", seed=0, parameters=parameters, source=source)[
        "source"
    ]


def without_targets(w, targets=None):
    """The folder of a set beside its pipeline, and what it was drawn with."""
    w.saved("pipe", w.pipe)
    pipe = DsCoPipeline.from_pretrained(w.folder / "pipe")
    pipe.set_progress_bar_config(disable=True)
    small = concentrate(pipe, w.targets, 1, progress=False, **FAST)
    save_dataset_folder(small, w.folder / "set", targets=targets)
    return load_recorded(w.folder / "set")


ROWS = {
    "a stream": (
        lambda w: as_configs(w.real.to_iterable_dataset()),
        r"Turn a stream into one with `Dataset.from_generator\(stream.__iter__, features=stream.features\)`",
        lambda w: as_rows(generated(w.real.to_iterable_dataset())),
        {"default": 21},
    ),
    "a stream of a config": (
        lambda w: as_configs({"a": w.real.to_iterable_dataset()}),
        r"Turn a stream into one with `Dataset.from_generator\(stream.__iter__, features=stream.features\)`",
        lambda w: as_rows({"a": generated(w.real.to_iterable_dataset())}),
        {"a": 21},
    ),
    "a name that Windows does not have": (
        lambda w: as_configs({"aux": w.real}),
        "Choose another, for example 'set-aux'",
        lambda w: as_rows({"set-aux": w.real}),
        {"set-aux": 21},
    ),
    "names that differ by case": (
        lambda w: as_configs({"a": w.real, "A": w.real}),
        "Rename all but one of them",
        lambda w: as_rows({"a": w.real, "A-2": w.real}),
        {"a": 21, "A-2": 21},
    ),
    "a column of another name": (
        lambda w: as_configs(columns(w, image="photo")),
        r"Rename 'photo' to it: `dataset.rename_column\('photo', 'image'\)`",
        lambda w: as_rows(columns(w, image="photo").rename_column("photo", "image")),
        {"default": 21},
    ),
    "the plausible column, not the source": (
        lambda w: as_configs(with_source(w).rename_column("label", "species")),
        r"Rename 'species' to it: `dataset.rename_column\('species', 'label'\)`",
        lambda w: as_rows(with_source(w).rename_column("label", "species").rename_column("species", "label")),
        {"default": 21},
    ),
    "a column of another type": (
        lambda w: as_configs(w.real.cast_column("label", NUMBERS)),
        r"`dataset.class_encode_column\('label'\)`",
        lambda w: as_rows(w.real.cast_column("label", NUMBERS).class_encode_column("label")),
        {"default": 21},
    ),
    "soft labels of other classes": (
        lambda w: as_configs(softened(w, [3, 2])),
        "needs one probability per class",
        lambda w: as_rows(softened(w, [3, 3])),
        {"default": 2},
    ),
    "labels that are missing": (
        lambda w: published(w, unlabelled(w)),
        "Filter those rows out",
        lambda w: published(w, unlabelled(w).filter(lambda row: row["label"] >= 0))["configs"]["default"]["splits"][
            "train"
        ]["rows"],
        20,
    ),
}

FOLDERS = {
    "a file in the way": (
        lambda w: published(w, name=blocked(w, w.folder / "x", "file")),
        "Choose another path",
        lambda w: published(w, name="y")["default_config"],
        "default",
    ),
    "other files in the way": (
        lambda w: published(w, name=blocked(w, w.folder / "x", "foreign")),
        "Choose another folder, or move them away",
        lambda w: [
            published(w, name="y")["default_config"],
            (w.folder / "x" / "notes.txt").rename(w.folder / "notes.txt") and published(w, name="x")["default_config"],
        ],
        ["default", "default"],
    ),
    "default is the default": (
        lambda w: published(w, {"default": w.real, "a": w.real}, default_config="a"),
        "so default_config cannot be 'a'. Rename it",
        lambda w: published(w, {"all": w.real, "a": w.real}, default_config="a")["default_config"],
        "a",
    ),
    "a folder of something else": (
        lambda w: read_folder(w.folder),
        "Write it with `save_dataset_folder`",
        lambda w: list(read_folder(save_dataset_folder(w.real, w.folder / "set"))["configs"]),
        ["default"],
    ),
    "a file that is missing": (
        lambda w: read_folder(damaged(w, "*.parquet")),
        "is missing, but .* lists it. Write the folder again",
        lambda w: list(read_folder(save_dataset_folder(w.real, w.folder / "set"))["configs"]),
        ["default"],
    ),
    "configs that are a list": (
        lambda w: parse_record('{"configs": []}', "x.json"),
        "`configs` of x.json must be a JSON object. Delete the file there",
        lambda w: parse_record("{}", "x.json"),
        {},
    ),
    "metadata that are no YAML": (
        lambda w: merge_cards("---\nlicense: [\n---\n\n# Mine\n", CARD),
        "Correct it, or remove the block: it is made anew",
        lambda w: [
            merge_cards(text, CARD).split("\n")[1] for text in ("---\nlicense: mit\n---\n\n# Mine\n", "# Mine\n")
        ],
        ["license: mit"] * 2,
    ),
    "metadata that are a list": (
        lambda w: merge_cards("---\n- mit\n---\n\n# Mine\n", CARD),
        "must be a mapping, but is a list. Remove it",
        lambda w: merge_cards("# Mine\n", CARD).split("\n")[1],
        "license: mit",
    ),
    "a record that is no JSON": (
        lambda w: parse_record("{", "x.json"),
        "Correct or delete it there",
        lambda w: parse_record("{}", "x.json"),
        {},
    ),
    "a record that is a list": (
        lambda w: parse_record("[]", "x.json"),
        "must be a JSON object, but is a list. Delete it there",
        lambda w: parse_record("{}", "x.json"),
        {},
    ),
}

RECORDS = {
    "a record of no config": (
        lambda w: by_config({"configs": {"ipc_7": {"seed": 1}}}, ["ipc7"]),
        "Call it as the config is called, or leave it out",
        lambda w: [by_config({"configs": one}, ["ipc7"]) for one in ({"ipc7": {"seed": 1}}, {})],
        [{"ipc7": {"seed": 1}}, {"ipc7": {}}],
    ),
    "a value that cannot be recorded": (
        lambda w: to_json({"x": object()}),
        "give numbers, text, lists or dicts",
        lambda w: json.loads(to_json({"x": [1, "a", [2.5], {"b": 3}]})),
        {"x": [1, "a", [2.5], {"b": 3}]},
    ),
    "a record that contradicts the set": (
        lambda w: published(w, w.small(), concentration={"parameters": {"guidance_scale": 4.0}}),
        "leave 'parameters.guidance_scale' out of `concentration`, and what the set says is recorded",
        lambda w: published(w, w.small(), concentration={"parameters": {}})["parameters"]["guidance_scale"],
        1.0,
    ),
    "targets of another set": (
        lambda w: published(w, w.small(), targets=fewer(w)),
        "pass the targets that it was drawn for, or leave `targets` out",
        lambda w: [
            "path" in published(w, w.small(), targets=w.targets)["targets"],
            "path" in published(w, w.small())["targets"],
        ],
        [True, False],
    ),
    "targets of other classes": (
        lambda w: published(w, w.make.images((2, 2), names=("cat", "dog")), targets=w.targets),
        "Pass the targets that it was drawn for, or leave `targets` out",
        lambda w: "targets" in published(w, w.make.images((2, 2), names=("cat", "dog"))),
        False,
    ),
    "targets of a plain set": (
        lambda w: published(w, plain(w), targets=w.targets),
        "was drawn without targets .*: leave `targets` out",
        lambda w: "targets" in published(w, plain(w)),
        False,
    ),
    "a source that is not that of the targets": (
        lambda w: told(w, dataset="user/b"),
        "pass the targets of that data, or leave 'dataset' out of `source`: it is recorded as the targets say",
        lambda w: told(w)["dataset"],
        "user/a",
    ),
    "targets that were not published": (
        lambda w: without_targets(w),
        r"`publish\(..., targets=targets\)` does that.*or make them anew from the recorded source with "
        "`MatchingTargets.from_dataset`",
        lambda w: [
            without_targets(w, w.targets)[1].num_classes,
            MatchingTargets.from_dataset(w.real, w.pipe, progress=False).num_classes,
        ],
        [3, 3],
    ),
}

PUSHES = {
    "a pull request of a branch": (
        lambda w: PushOptions(revision="x", create_pr=True),
        "Leave one of them out",
        lambda w: [
            make_target("a/b", "dataset", PushOptions(dry_run=True, **one)).revision
            for one in ({"revision": None, "create_pr": True}, {"revision": "x", "create_pr": False})
        ],
        ["main", "x"],
    ),
    "a token in a record": (
        lambda w: refuse_secrets(note(w, SECRET), ["note.json"], None),
        "contains an access token of the Hub, so nothing was sent. Remove it from the records",
        lambda w: [refuse_secrets(note(w, ""), ["note.json"], None)],
        [None],
    ),
}


def note(w, text):
    (w.folder / "note.json").write_text(json.dumps({"note": text}), encoding="utf-8")
    return w.folder


def generated(stream):
    return Dataset.from_generator(stream.__iter__, features=stream.features)


def with_source(w):
    """Classes of their own say where rows are from, before the label."""
    rows = w.real.add_column("source", [0] * len(w.real)).cast_column("source", ClassLabel(names=["real"]))
    return rows.select_columns(["source", "image", "label"])


def unlabelled(w):
    """The first row has no label."""
    return w.real.remove_columns("label").add_column("label", [-1, *w.real["label"][1:]]).cast(w.real.features)


TABLE = ROWS | FOLDERS | RECORDS | PUSHES


@pytest.mark.parametrize("name", entries(TABLE, "targets that were not published"))
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
