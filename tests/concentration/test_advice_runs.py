"""What errors about matching, drawing, doping and runs say to do is done, and works."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset

from advice import FAST, follow, is_of
from dsco_hf import (
    Clarity,
    MatchingTargets,
    QuantileTargets,
    Released,
    add_learned_labels,
    add_soft_labels,
    concentrate,
    dope,
    get_protocol,
    load_image_set,
    save_dataset_folder,
    train_evaluator,
)
from dsco_hf.concentration.concentrate import plan_units
from dsco_hf.concentration.run_folder import RunFolder, check_settings
from dsco_hf.evaluators.augmentation import RandomShift
from dsco_hf.generators.denoisers import GeneratorTrainingConfig
from dsco_hf.matching.kernels import herd
from dsco_hf.studies.metrics import Coverage
from dsco_hf.studies.plans import StudyPlan
from dsco_hf.utils.files import locked
from dsco_hf.utils.origins import fingerprint


RUN = {"num_classes": 3, "images_per_class": 5, "block_size": 2, "images_per_call": 4, "options": {"eta": 1.0}}
GENERATOR = GeneratorTrainingConfig(num_layers=1)


def targets_of(w, rows=None, **options):
    rows = w.real if rows is None else rows
    return MatchingTargets.from_dataset(rows, w.pipe, **{"embedding_dim": 8, "progress": False, **options})


def quiet(w, given, **options):
    return concentrate(w.pipe, given, 1, **{"progress": False, **FAST, **options})


def relabelled(w, labels, names):
    """The rows of the classes that are kept, under these names."""
    rows = w.real.filter(lambda row: row["label"] in labels)
    kept = [labels[label] for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", kept).cast_column("label", ClassLabel(names=names))


def filtered(w, labels):
    return w.real.filter(lambda row: row["label"] in labels)


def streamed(w, labels=(0, 1, 2)):
    return filtered(w, labels).to_iterable_dataset()


def others(w):
    """A pipeline whose classifier knows other classes."""
    return w.make.pipe(classifier=w.make.convnet(names=("cat", "dog", "bird")))


def samples(w, pipe, **options):
    chosen = {"samples_per_class": 2, "embedding_dim": 8, "progress": False, **FAST, **options}
    return MatchingTargets.from_generator(pipe, **chosen).class_names


def doped(w, pipe=None, **options):
    return dope(w.small(), w.real, pipe, images_per_class=2, progress=False, **options)


def worked(w, folder, **options):
    return targets_of(w, work_dir=w.folder / folder, **options).num_classes


def without_pass(w):
    """A folder of features that lost what tells which they are."""
    (w.folder / "a").mkdir(exist_ok=True)
    (w.folder / "a" / "features-0.x.safetensors").write_bytes(b"")
    return "a"


def begun(w, name="run", **changes):
    """A folder in which a run was begun."""
    folder = RunFolder(w.folder / name)
    with folder.locked():
        folder.begin({**RUN, **changes})
    return folder.settings()["images_per_class"]


def headless(w):
    """A folder of units that lost its `run.json`."""
    begun(w, "units")
    (w.folder / "units" / "run.json").unlink()
    (RunFolder(w.folder / "units").units / "group-00000-block-00000.parquet").write_bytes(b"")
    return begun(w, "units")


def twice(w, name="a"):
    with locked(w.folder / "a"), locked(w.folder / name):
        return name


MATCHING = {
    "no targets": (
        lambda w: quiet(w, 3),
        r"Make them of real images with `MatchingTargets.from_dataset\(dataset, pipe\)`, data-free with "
        r"`MatchingTargets.from_generator\(pipe\)`",
        lambda w: [
            *quiet(w, MatchingTargets.from_dataset(w.real, w.pipe)),
            *quiet(w, MatchingTargets.from_generator(w.pipe, samples_per_class=2, weighting="none", **FAST)),
        ],
        is_of(6),
    ),
    "all splits": (
        lambda w: quiet(w, w.both),
        r"choose one, for example `dataset\['train'\]`",
        lambda w: quiet(w, w.both["train"]),
        is_of(3),
    ),
    "nothing to match": (
        lambda w: quiet(w, w.real, objective="classifier"),
        "pass None, and classes as `class_labels=`",
        lambda w: quiet(w, None, class_labels=[0, 2], objective="classifier"),
        is_of(2),
    ),
    "quantiles of classes": (
        lambda w: quiet(w, ["circle"], method="released"),
        "pass a dataset, or another method",
        lambda w: [
            *quiet(w, w.real, method=Released(iterations=1)),
            *quiet(w, targets_of(w), method="nopt"),
        ],
        is_of(6),
    ),
    "a class without a target": (
        lambda w: w.pipe([2], targets_of(w, filtered(w, [0, 1])), **FAST),
        "Make targets that include them",
        lambda w: w.pipe([2], targets_of(w, filtered(w, [0, 1, 2])), **FAST).images,
        is_of(1),
    ),
    "one class of the generator for two": (
        lambda w: quiet(w, targets_of(w, mapping={"circle": 0, "square": 0, "triangle": 2})),
        r"give each dataset class a generator class of its own \(`mapping=`\), or merge them first",
        lambda w: [
            *quiet(w, targets_of(w, mapping={"circle": 1, "square": 0, "triangle": 2})),
            *quiet(w, targets_of(w, merged(w), mapping={"both": 0, "triangle": 2})),
        ],
        is_of(5),
    ),
    "an empty class of a stream": (
        lambda w: targets_of(w, streamed(w, [0, 1])),
        "Give each class at least one image, or leave it out: of a dataset that is not streamed such classes are left "
        "out by themselves, of samples by `class_labels`",
        lambda w: [
            targets_of(w, streamed(w)).num_classes,
            targets_of(w, filtered(w, [0, 1])).num_classes,
            len(samples(w, w.pipe, class_labels=[0, 1], weighting="none")),
        ],
        [3, 2, 2],
    ),
    "samples of other classes": (
        lambda w: samples(w, others(w)),
        "Or pass `weighting='none'`, which uses its features only",
        lambda w: samples(w, others(w), weighting="none"),
        is_of(3),
    ),
    "samples that nobody weighs": (
        lambda w: samples(w, w.without, features={"network": "random"}),
        "asks the pipeline's classifier, and there is none: pass `weighting='none'`",
        lambda w: samples(w, w.without, features={"network": "random"}, weighting="none"),
        is_of(3),
    ),
    "features of another pass": (
        lambda w: [worked(w, "a", seed=0), other_pass(w, "a")],
        "Choose another `work_dir`, or set them as they were",
        lambda w: [other_pass(w, "b"), worked(w, "c")],
        [3, 3],
    ),
    "features of no pass": (
        lambda w: worked(w, without_pass(w)),
        "choose another `work_dir`",
        lambda w: worked(w, "b"),
        3,
    ),
    "more rows than there are": (
        lambda w: herd(torch.eye(3), torch.ones(3), 4),
        "Cannot pick 4 rows out of 3 candidates: pass 0 <= count <= 3",
        lambda w: [len(herd(torch.eye(3), torch.ones(3), count)) for count in (0, 3)],
        [0, 3],
    ),
    "features of two classifiers": (
        lambda w: Coverage().compute(predictions=np.zeros((2, 2)), real_features=np.eye(9)[:, :3]),
        "The features have 2 and 3 dimensions; use one classifier for both",
        lambda w: Coverage().compute(predictions=np.zeros((2, 2)), real_features=np.eye(9)[:, :2]),
        is_of(2),
    ),
    "what cannot be told from another": (
        lambda w: fingerprint(object()),
        "give what it depends on as numbers, text, tensors, models, dataclasses, lists or mappings",
        lambda w: {fingerprint(1, "a", torch.ones(2), w.pipe.classifier, GENERATOR, [1], {"a": 1}) for _ in "ab"},
        is_of(1),
    ),
}

SETS = {
    "more images than a set can have": (
        lambda w: w.small(images_per_class=10**9),
        "ask for at most 33333333 per class",
        lambda w: plan_units(3, 33333333, block_size=33333333),
        is_of(3),
    ),
    "clarity by a classifier of other classes": (
        lambda w: doped(w, others(w), strategy="clarity"),
        r"Or pass a `student` of the dataset's classes, `Clarity\(student=...\)`, leave `pipe` out to train one on "
        "hard labels, or choose strategy='herding'",
        lambda w: [
            *doped(w, others(w), strategy=Clarity(student=w.make.convnet())),
            *doped(w, strategy=Clarity(architecture="convnet-1", protocol=get_protocol("quick", steps=1))),
            *doped(w, others(w), strategy="herding"),
        ],
        is_of(18),
    ),
    "targets of a quantile set": (
        lambda w: save_dataset_folder(quantile_set(w), w.folder / "set", targets=w.targets),
        "leave `targets` out",
        lambda w: [save_dataset_folder(quantile_set(w), w.folder / "set").name],
        ["set"],
    ),
}

RUNS = {
    "a run of other settings": (
        lambda w: [begun(w), begun(w, options={"eta": 0.5})],
        "Choose another folder, or set them as they were",
        lambda w: [begun(w, "another", options={"eta": 0.5}), begun(w)],
        [5, 5],
    ),
    "a run of another model": (
        lambda w: check_settings({**RUN, "models": {"a": 1}}, {**RUN, "models": {"a": 2}}, w.folder),
        r"To keep what is drawn all the same and go on: `accept_changed=\['models.a'\]`",
        lambda w: check_settings(
            {**RUN, "models": {"a": 1}}, {**RUN, "models": {"a": 2}}, w.folder, accept_changed=["models.a"]
        ),
        {"models.a": [1, 2]},
    ),
    "a run of half blocks": (
        lambda w: [begun(w), begun(w, images_per_class=8)],
        "the smaller number must be a multiple of 2. Choose another folder or number",
        lambda w: [begun(w, "another", images_per_class=8), begun(w, images_per_class=4)],
        [8, 5],
    ),
    "units of no run": (
        headless,
        "Choose another folder",
        lambda w: begun(w, "another"),
        5,
    ),
    "two runs at once": (
        lambda w: twice(w),
        "Wait until it has ended, or choose another folder",
        lambda w: [twice(w, "b"), locked(w.folder / "a").__enter__()],
        ["b", None],
    ),
    "several values for no budgets": (
        lambda w: StudyPlan(contrast=[0.0, 0.5]),
        "belong to as many `budgets`: give these, too",
        lambda w: StudyPlan(contrast=[0.0, 0.5], budgets=[1, 10]).contrast,
        [0.0, 0.5],
    ),
}


def merged(w):
    return relabelled(w, {0: 0, 1: 0, 2: 1}, ["both", "triangle"])


def other_pass(w, folder):
    return targets_of(w, filtered(w, [0, 1, 2]).select(range(20)), work_dir=w.folder / folder).num_classes


def quantile_set(w):
    targets = QuantileTargets.from_dataset(w.real, w.pipe, progress=False)
    return quiet(w, targets, method=Released(iterations=1))


def learned(w, values):
    """A training on the learned labels of three images."""
    rows = w.real.select(range(3)).add_column("learned_label", values)
    protocol = get_protocol("quick", steps=2, label_type="learned")
    images = load_image_set(rows, protocol=protocol, num_channels=1)
    return train_evaluator(w.make.convnet(norm="instance"), images, protocol=protocol).steps


def labelled(w, rows=None, **options):
    return add_soft_labels(w.real if rows is None else rows, w.pipe.classifier, progress=False, **options)


def taught(w, targets):
    return add_learned_labels(w.real, w.pipe, targets, progress=False)


LABELS = {
    "views that do not differ": (
        lambda w: labelled(w, views=2, augmentation=[]),
        "pass `views=1`, or augmentations",
        lambda w: [labelled(w, views=1, augmentation=[]), labelled(w, views=2, augmentation=[RandomShift(1)])],
        is_of(2),
    ),
    "labels of a stream": (
        lambda w: labelled(w, streamed(w)),
        "choose one split, and make a stream one with `Dataset.from_generator`",
        lambda w: labelled(w, Dataset.from_generator(streamed(w).__iter__, features=w.real.features)),
        is_of(21),
    ),
    "labels that are there already": (
        lambda w: labelled(w, labelled(w)),
        r"remove it with `dataset.remove_columns\('soft_label'\)`",
        lambda w: labelled(w, labelled(w).remove_columns("soft_label")),
        is_of(21),
    ),
    "labels of targets without a second moment": (
        lambda w: taught(w, targets_of(w, second_moment=False)),
        r"make them with `MatchingTargets.from_dataset\(dataset, pipe\)`",
        lambda w: taught(w, MatchingTargets.from_dataset(w.real, w.pipe, progress=False)),
        is_of(21),
    ),
    "learned labels that are no numbers": (
        lambda w: learned(w, [[float("nan"), 0.0, 1.0]] * 3),
        "no finite numbers: make them again with `add_learned_labels`",
        lambda w: learned(w, taught(w, w.targets)["learned_label"][:3]),
        2,
    ),
}
TABLE = MATCHING | SETS | RUNS | LABELS


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
