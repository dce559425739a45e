"""What errors of selections say to do is done, and works."""

import math

import pytest
import torch

from advice import follow, is_of
from dsco_hf import EL2N, DynUnc, Herding, KCenter, RidgeRule, TrainingLog, get_protocol, log_training, select


def logged(w, folder="log", epochs=3, **options):
    protocol = get_protocol("quick", epochs=epochs)
    return log_training(w.real, w.folder / folder, protocol=protocol, progress=False, **options)


def chosen(w, rule, rows=None, **options):
    return select(w.real if rows is None else rows, rule, images_per_class=1, progress=False, **options)


def one_class(w):
    return w.real.filter(lambda row: row["label"] == 1)


def broken(w):
    model = w.make.convnet()
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    return model


TABLE = {
    "no log": (
        lambda w: chosen(w, "el2n"),
        r"pass `training=log_training\(real, folder\)`, or a kept one, `training=TrainingLog.load\(folder\)`",
        lambda w: [
            *chosen(w, EL2N(logged(w)))["label"],
            *chosen(w, EL2N(TrainingLog.load(w.folder / "log")))["label"],
        ],
        [0, 1, 2, 0, 1, 2],
    ),
    "a short log": (
        lambda w: chosen(w, DynUnc(logged(w))),
        r"needs 10 epochs, and the training was logged for 3: log a longer one, "
        r"`protocol=get_protocol\('quick', epochs=30\)`, or give the rule a smaller `window`",
        lambda w: [len(chosen(w, DynUnc(logged(w, "long", 12)))), len(chosen(w, DynUnc(logged(w), window=3)))],
        [3, 3],
    ),
    "another log": (
        lambda w: [logged(w), logged(w, seed=1)],
        "holds the log of another training .* Set them as they were, remove the folder, or log to another one",
        lambda w: [logged(w).epochs, logged(w, "another", seed=1).epochs],
        [3, 3],
    ),
    "no features": (
        lambda w: chosen(w, "k_center"),
        "goes by what a classifier sees, and there is none: pass a pipeline that has one as `pipe`, or `features=`, a "
        "classifier or 'pixels', to the rule",
        lambda w: [*chosen(w, "k_center", pipe=w.pipe)["label"], *chosen(w, KCenter("pixels"))["label"]],
        is_of(6),
    ),
    "features that are no numbers": (
        lambda w: chosen(w, KCenter(broken(w))),
        "needs finite features, and 21 of 21 images have others, the first in row 0: check the weights of the "
        "classifier, or pass another one as `features=`",
        lambda w: chosen(w, KCenter(w.make.convnet())),
        is_of(3),
    ),
    "one class": (
        lambda w: chosen(w, RidgeRule("pixels"), one_class(w)),
        r"chooses what tells classes apart, and the pool has one: choose another rule, such as "
        r"`Herding\(features='pixels'\)`, or add images of a second class",
        lambda w: [len(chosen(w, Herding(features="pixels"), one_class(w))), len(chosen(w, RidgeRule("pixels")))],
        [1, 3],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])
