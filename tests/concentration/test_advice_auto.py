"""What errors say to do where real images are to take the place of synthetic ones is done, and works."""

import pytest

from advice import follow
from dsco_hf import dope, efficiency, recommended_doping, select
from dsco_hf.utils.files import write_json


def row(method, budget, accuracy):
    """Of a study; real images gain a tenth with every decade."""
    return {
        "method": method, "images_per_class": budget, "images": budget, "accuracies": [accuracy] * 2,
        "accuracy_mean": accuracy,
    }  # fmt: skip


def study(*accuracies):
    """A study whose synthetic images reach these accuracies, at 1, 10 and 100 per class."""
    sizes = (1, 10, 100)
    rows = [row("random", budget, 0.1 * place) for place, budget in enumerate(sizes, start=1)]
    return {"rows": rows + [row("nopt", *pair) for pair in zip(sizes, accuracies, strict=False)]}


def told(w, *accuracies):
    """The efficiency.json of that study."""
    write_json(w.folder / "efficiency.json", efficiency(study(*accuracies), draws=50))
    return w.folder / "efficiency.json"


def mixed(w, begin=None, images="auto", small=None, **options):
    small = w.small(images_per_class=4, block_size=2) if small is None else small
    given = {"images_per_class": images, "strategy": "random", "progress": False, **options}
    return dope(small, w.real, begin_doping=begin, **given)


TABLE = {
    "no moment": (
        lambda w: mixed(w),
        r"needs the moment at which doping should begin: pass `begin_doping=recommended_doping\('figures/efficiency"
        r".json'\)`, a number, or the `images_per_class` wanted",
        lambda w: [
            *mixed(w, recommended_doping(told(w, 0.15, 0.2, 0.21)))["source"],
            *mixed(w, 2)["source"],
            *mixed(w, images=5)["source"],
        ],
        [0] * 6 + [1] * 6 + [0] * 6 + [1] * 6 + [0] * 12 + [1] * 3,
    ),
    "a number and a moment": (
        lambda w: mixed(w, 2, images=5),
        r"must be a number or 'auto', which alone has `begin_doping`; got 5 and 2: pass `images_per_class='auto'` "
        r"with `begin_doping`, or a number alone",
        lambda w: [len(mixed(w, 2, images="auto")), len(mixed(w, images=5))],
        [12, 15],
    ),
    "a moment beyond the set": (
        lambda w: mixed(w, 9),
        "Doping should begin at 9 images per class, and the set has 4: every synthetic image is worth more than a "
        "real one. Keep it as it is, draw more, or pass a number as `images_per_class`",
        lambda w: [len(mixed(w, 9, small=w.small(images_per_class=10, block_size=3))), len(mixed(w, images=5))],
        [30, 15],
    ),
    "a moment within the first block": (
        lambda w: mixed(w, 1),
        r"Doping should begin at 1 images per class, before the first block ends, of 2: draw the set with a smaller "
        r"`block_size`, or choose real images alone, `select\(real, ...\)`",
        lambda w: [
            *mixed(w, 1, small=w.small(images_per_class=2, block_size=1))["source"],
            len(select(w.real, "random", images_per_class=4, progress=False)),
        ],
        [0, 0, 0, 1, 1, 1, 12],
    ),
    "a doped set": (
        lambda w: mixed(w, 2, small=mixed(w, images=5)),
        "The set has real images already: pass the set that they were added to, or a number",
        lambda w: [len(mixed(w, 2)), len(mixed(w, small=mixed(w, images=5), images=6))],
        [12, 18],
    ),
    "a study that saw no moment": (
        lambda w: recommended_doping(told(w, 0.15)),
        "The study saw no moment from which on a real image is worth more than the next of 'nopt': evaluate sets at "
        "two budgets or more and at larger ones, or pass `images_per_class` as a number",
        lambda w: [recommended_doping(told(w, 0.15, 0.2, 0.21)) < 10, len(mixed(w, images=5))],
        [True, 15],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_what_the_error_says_is_done_and_works(world, name):
    follow(world, TABLE[name])


def test_a_moment_is_of_a_method_that_was_drawn(tmp_path, caplog):
    report = efficiency(study(0.15, 0.2, 0.21), draws=50)
    assert recommended_doping(report) == report["methods"]["nopt"]["doping"]["images_per_class"]
    with pytest.raises(ValueError, match="`method` must be one of .*, got 'plain'"):
        recommended_doping(report, "plain")
    report["methods"]["nopt"]["doping"]["extrapolated"] = True
    assert recommended_doping(report) and "which is extrapolated" in caplog.text
