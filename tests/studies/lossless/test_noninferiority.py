"""The test of non-inferiority against the ones it is made of, by SciPy and by hand."""

import numpy as np
import pytest
from scipy import stats

from dsco_hf.studies.lossless.noninferiority import compare, images_needed


def trainings(seeds, images, share, seed=0):
    return np.random.default_rng(seed).random((seeds, images)) < share


def test_with_as_many_seeds_it_is_the_paired_t_test():
    small, full = trainings(6, 400, 0.8), trainings(6, 400, 0.9, 1)
    look = compare(small, full, level=0.05)
    difference = small.mean(1) - full.mean(1)
    # of the paired test but for the degrees of freedom, which both groups give
    error = difference.std(ddof=1) / np.sqrt(6)
    assert look.difference == pytest.approx(difference.mean())
    assert look.by_seed == pytest.approx(stats.t.ppf(0.95, 10) * error)


def test_over_images_it_is_mcnemars():
    small, full = trainings(2, 1000, 0.8), trainings(2, 1000, 0.8, 1)
    look = compare(small[[0, 0]], full[[0, 0]], level=0.05)
    lost, won = (full[0] & ~small[0]).sum(), (small[0] & ~full[0]).sum()
    expected = stats.norm.ppf(0.95) * np.sqrt(lost + won - (won - lost) ** 2 / 1000) / 1000
    assert look.by_image == pytest.approx(expected, rel=1e-3) and look.by_seed == 0
    assert look.half_width == look.by_image and look.lower < look.difference < look.upper


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="at least 2 seeds, got 1 of the small set and 3"):
        compare(trainings(1, 10, 0.5), trainings(3, 10, 0.5), level=0.05)
    compare(trainings(2, 10, 0.5), trainings(3, 10, 0.5), level=0.05)  # more trainings, as it says
    with pytest.raises(ValueError, match="tested on 10 and 11 images"):
        compare(trainings(2, 10, 0.5), trainings(2, 11, 0.5), level=0.05)


def test_images_needed_grow_with_the_square_of_a_narrower_margin():
    full = trainings(4, 2000, 0.9)
    wide, narrow = images_needed(full, 0.02, 0.05), images_needed(full, 0.01, 0.05)
    assert narrow == pytest.approx(4 * wide, rel=0.05)
