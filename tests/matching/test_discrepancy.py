import pytest
import torch

from dsco_hf import MatchingTargets, measure_discrepancy
from dsco_hf.data.datasets import load_pixels
from dsco_hf.matching.discrepancy import MEASURED_BLOCKS, embed_pixels, measure_set, redundancy
from dsco_hf.matching.objectives import unexplained


@pytest.fixture
def population(pipe, real_images):
    targets = MatchingTargets.from_dataset(real_images, pipe, features={}, embedding_dim=64, progress=False)
    pixels, rows, _ = load_pixels(real_images, num_channels=1)
    return targets, pixels, rows, embed_pixels(pixels, pipe, targets)


def test_what_is_left_unexplained_by_hand(population):
    targets, _, classes, everything = population
    few, rows = everything[:5], torch.tensor([2, 0, 2, 0, 2])  # one class without an image
    weights = few.T @ torch.linalg.inv(few @ few.T + 0.5 * torch.eye(5)) @ (torch.eye(3)[rows] - 1 / 3)
    answers = torch.eye(3)[classes] - 1 / 3
    errors = (everything @ weights - answers).square()
    by_class = torch.stack([errors[classes == row].mean(0) for row in range(3)]).mean(0)
    nothing = torch.stack([answers[classes == row].square().mean(0) for row in range(3)]).mean(0)
    torch.testing.assert_close(unexplained(few, rows, targets, 0.5), by_class / nothing, atol=1e-4, rtol=1e-4)


def test_the_population_explains_nearly_all_and_wrong_labels_less_than_nothing(population):
    targets, _, rows, psi = population
    right, wrong = (unexplained(psi, labels, targets, 0.01).mean() for labels in (rows, (rows + 1) % 3))
    assert 0 <= right < 0.1 and wrong > 1


def test_a_copy_teaches_nothing_and_other_images_do(population):
    targets, _, rows, psi = population
    first = torch.cat([(rows == row).nonzero()[:2, 0] for row in range(3)])
    other = torch.cat([(rows == row).nonzero()[2:4, 0] for row in range(3)])
    copied = redundancy(psi[torch.cat([first, first])], rows[torch.cat([first, first])], targets, 2)
    assert copied[0][0] is copied[1][1] is None
    assert copied[0][1] == copied[1][0] == pytest.approx(1, abs=1e-4)
    new = redundancy(psi[torch.cat([first, other])], rows[torch.cat([first, other])], targets, 2)
    assert new[0][1] < 0.999 and new[1][0] < 0.999


def test_blocks_that_are_not_whole_are_left_out(population):
    targets, _, rows, psi = population
    assert redundancy(psi, rows, targets, len(rows)) is None  # one block that is not even whole
    assert redundancy(psi[:1], rows[:1], targets, 1) is None  # two classes have no image
    assert len(redundancy(psi.repeat(9, 1), rows.repeat(9), targets, 1)) == MEASURED_BLOCKS
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).sort().values
    assert redundancy(psi[shuffled], rows[shuffled], targets, 2) == redundancy(psi, rows, targets, 2)


def test_a_block_that_teaches_nothing_has_no_redundancy(population):
    targets, _, rows, psi = population
    first = torch.cat([(rows == row).nonzero()[:1, 0] for row in range(3)])
    labels = torch.cat([rows[first], (rows[first] + 1) % 3])  # the second block is mislabelled
    square = redundancy(psi[torch.cat([first, first])], labels, targets, 1)
    assert square[0][1] is None and square[1][0] is not None


def test_all_measures_of_a_set(pipe, population, real_images):
    targets, pixels, rows, psi = population
    found = measure_set(pixels, rows, pipe, targets, block_size=2)
    assert found.discrepancy == measure_discrepancy(pixels, rows, pipe, targets)
    assert found.unexplained == pytest.approx(unexplained(psi, rows, targets, 2.0).mean().item())
    assert found.redundancy == redundancy(psi, rows, targets, 2)
    without = MatchingTargets.from_dataset(real_images, pipe, features={}, second_moment=False, progress=False)
    bare = measure_set(pixels, rows, pipe, without)
    assert bare.unexplained is bare.redundancy is None and bare.discrepancy
