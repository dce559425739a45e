"""What tables of advice work with: each entry does something wrong, and then what the error said, literally."""

import functools

import datasets
import pytest
from datasets import ClassLabel, DatasetDict, Image

from dsco_hf import concentrate


FAST = {"num_inference_steps": 2, "guidance_scale": 1.0}


def entries(table, *slow):
    """The names in a table, those of `slow` marked as slow."""
    assert set(slow) <= set(table)
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in table]


class World:
    """What the entries work with."""

    def __init__(self, pipe, targets, real, make, folder):
        self.pipe, self.targets, self.real, self.make, self.folder = pipe, targets, real, make, folder

    @functools.cached_property
    def without(self):
        """A pipeline without a classifier."""
        return self.make.pipe()

    @functools.cached_property
    def mixed(self):
        """Images of two sizes."""
        odd = self.real.select([0]).map(lambda row: {"image": row["image"].resize((16, 16))})
        return datasets.concatenate_datasets([self.real, odd])

    @functools.cached_property
    def broken(self):
        """A first image that cannot be decoded."""
        good = self.real.cast_column("image", Image(decode=False))["image"][1:]
        stored = [{"bytes": b"no image", "path": None}, *good]
        return self.real.remove_columns("image").add_column("image", stored).cast_column("image", Image())

    @functools.cached_property
    def two(self):
        """Two columns of labels."""
        two = self.real.add_column("other", self.real["label"]).cast_column("other", ClassLabel(names=list("abc")))
        return two.rename_column("label", "shape")

    @property
    def both(self):
        """Two splits."""
        return DatasetDict(train=self.real, test=self.real)

    def small(self, targets=None, **options):
        """A set of one image per class."""
        chosen = {"images_per_class": 1, "progress": False, **FAST, **options}
        return concentrate(self.pipe, self.targets if targets is None else targets, **chosen)

    def saved(self, name, pipe=None):
        """The folder of a pipeline."""
        path = self.folder / name
        if not path.exists():
            (pipe or self.without).save_pretrained(path)
        return str(path)

    def changed(self, place, **components):
        """The pipeline with other components, or other attributes of one: `place` is "" or the component's name."""
        if place:
            for name, value in components.items():
                getattr(getattr(self.pipe, place), name)(value)
        else:
            self.pipe.register_modules(**components)
        return self.pipe


def is_of(count):
    """Whether something has so many items."""
    return lambda found: len(found) == count


def follow(world, entry):
    """Does what is wrong, reads the error, does what it says, and looks at what comes of it.

    Args:
        world (`World`): what is worked with.
        entry (`tuple`): what is done wrong, a pattern of the error, what it says to do, and what that gives, or a
            function that tells whether it is right.
    """
    wrong, message, right, works = entry
    with pytest.raises((ValueError, TypeError, OSError, RuntimeError), match=message):
        wrong(world)
    found = right(world)
    assert works(found) if callable(works) else found == works
