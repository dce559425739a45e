"""Learning curves: what a fit finds again, and what a bootstrap leaves open."""

import numpy as np
import pytest

from dsco_hf.studies.lossless.curves import bootstrap_curves, fit_curves, seed_std


SIZES = np.array([1000, 3000, 6000, 10000])


def test_a_power_law_is_found_again():
    accuracy = 0.8 - 0.05 * ((SIZES / 10000) ** -0.5 - 1)
    curves = fit_curves(SIZES, accuracy[None], np.full(4, 0.001))
    assert curves(SIZES)[0] == pytest.approx(accuracy, abs=5e-4)
    assert curves(2000)[0, 0] == pytest.approx(0.8 - 0.05 * (0.2**-0.5 - 1), abs=2e-3)


def test_a_curve_never_falls_with_more_images():
    curves = fit_curves(SIZES, np.array([[0.9, 0.8, 0.7, 0.6]]), np.full(4, 0.001))
    assert curves.drop[0] == 0 and curves(SIZES)[0] == pytest.approx(0.75)


def test_one_size_is_no_curve():
    with pytest.raises(ValueError, match="at least 2 sizes, got 1"):
        fit_curves(SIZES[:1], np.array([[0.9]]), np.ones(1))


def test_more_seeds_leave_less_open():
    random = np.random.default_rng(0)

    def width(seeds):
        right = {int(n): random.random((seeds, 2000)) < 0.8 - 0.05 * ((n / 10000) ** -0.5 - 1) for n in SIZES}
        return bootstrap_curves(right)(2000).std()

    assert width(16) < 0.6 * width(2)


def test_seeds_of_all_sizes_tell_their_deviation():
    assert seed_std([np.array([0.1, 0.3]), np.array([0.5])]) == pytest.approx(np.sqrt(0.02))
