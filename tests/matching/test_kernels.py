import itertools

import pytest
import torch
from sklearn.kernel_ridge import KernelRidge

from dsco_hf.matching.kernels import (
    draw_frequencies,
    fourier_embedding,
    frechet_distance,
    gaussian_kernel,
    herd,
    learned_labels,
    median_bandwidth,
    mmd2,
    mmd2_exact,
    regression_errors,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embedded(x, dim=2048, bandwidth=2.0, seed=0):
    return fourier_embedding(
        x, draw_frequencies(x.shape[1], dim, bandwidth, generator=torch.Generator().manual_seed(seed))
    )


def test_median_bandwidth_is_the_median_of_all_distances():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]])  # distances 5, 8, 5
    assert median_bandwidth(x) == pytest.approx(5.0)
    y = normal(40, 3)
    pairs = sorted((y[i] - y[j]).norm().item() for i, j in itertools.combinations(range(40), 2))
    assert pairs[0] <= median_bandwidth(y) <= pairs[-1]
    assert median_bandwidth(y) == pytest.approx(pairs[(len(pairs) - 1) // 2], rel=1e-5)


@pytest.mark.parametrize("x", [torch.ones(1, 4), torch.ones(0, 4), torch.ones(6, 4)], ids=["one", "none", "equal"])
def test_bandwidth_of_a_sample_without_scale_is_one(x):
    assert median_bandwidth(x) == 1.0


def test_bandwidth_needs_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(n, d\), got \(4,\)"):
        median_bandwidth(torch.ones(4))


@pytest.mark.parametrize("dim", [0, 1, 7, -2])
def test_embedding_dimension_must_be_even(dim):
    with pytest.raises(ValueError, match=f"even number of at least 2, got {dim}"):
        draw_frequencies(3, dim, 1.0)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_bandwidth_must_be_positive(bandwidth):
    with pytest.raises(ValueError, match="`bandwidth` must be a positive finite number"):
        draw_frequencies(3, 8, bandwidth)


def test_embeddings_have_unit_norm_and_the_kernel_as_inner_product():
    x, y = normal(30, 5), normal(20, 5, seed=1)
    psi_x, psi_y = embedded(x, 8192), embedded(y, 8192)
    torch.testing.assert_close(psi_x.norm(dim=1), torch.ones(30))
    kernel = gaussian_kernel(x, y, 2.0)
    assert kernel.std() > 0.1  # not all alike, so the comparison below means something
    # a mean over 4096 frequencies of cosines has a standard error of at most 1/sqrt(2 * 4096) = 0.011
    assert (psi_x @ psi_y.T - kernel).abs().max() < 5 * 0.011


def test_gaussian_kernel_by_hand():
    kernel = gaussian_kernel(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 5.0)
    torch.testing.assert_close(kernel, torch.tensor([[torch.e**-0.5, 1.0]]))


def test_mmd_of_embeddings_is_the_exact_one_within_the_error_of_the_features():
    x, y = normal(60, 4), 0.7 * normal(80, 4, seed=1) + 0.8
    exact = mmd2_exact(x, y, 2.0)
    assert exact > 0.05
    few, many = (
        torch.stack([mmd2(embedded(x, dim, seed=s).mean(0), embedded(y, dim, seed=s).mean(0)) for s in range(20)])
        for dim in (32, 4096)
    )
    assert (many - exact).abs().max() < 0.03 * 5
    assert (many.mean() - exact).abs() < 0.1 * exact
    assert many.std() < 0.25 * few.std()  # the error falls as 1/sqrt(D): 11 times here
    assert mmd2_exact(x, x, 2.0).abs() < 1e-6


def test_mmd2_is_per_row():
    p = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(mmd2(p, torch.zeros(2)), torch.tensor([5.0, 0.0]))


def greedy(psi, mu, count, chosen_sum, chosen_count):
    """The definition, by trying every candidate."""
    picked = []
    for _ in range(count):
        distances = [
            float("inf") if j in picked else ((chosen_sum + psi[j]) / (chosen_count + 1) - mu).square().sum().item()
            for j in range(len(psi))
        ]
        picked.append(min(range(len(psi)), key=distances.__getitem__))
        chosen_sum, chosen_count = chosen_sum + psi[picked[-1]], chosen_count + 1
    return picked


@pytest.mark.parametrize("initial", [0, 3])
def test_herding_is_the_greedy_choice(initial):
    psi = torch.cat([embedded(normal(12, 3), 64), 1.7 * embedded(normal(6, 3, seed=2), 64)]).double()  # norms differ
    mu = embedded(normal(50, 3, seed=1) + 0.3, 64).double().mean(0)
    given = embedded(normal(initial, 3, seed=5), 64).double().sum(0)
    picked = herd(psi, mu, 7, initial_sum=given, initial_count=initial)
    assert picked.dtype == torch.int64
    assert picked.tolist() == greedy(psi, mu, 7, given, initial)


def test_herding_goes_on_from_what_is_there():
    psi = embedded(normal(40, 3), 128)
    mu = psi.mean(0)
    whole = herd(psi, mu, 9)
    assert len(set(whole.tolist())) == 9
    rest = torch.tensor([j for j in range(40) if j not in whole[:4].tolist()])
    later = herd(psi[rest], mu, 5, initial_sum=psi[whole[:4]].sum(0), initial_count=4)
    assert rest[later].tolist() == whole[4:].tolist()
    # what is there matters: without it another row comes first
    far = psi[whole[0]] * 4
    assert herd(psi, mu, 1, initial_sum=far, initial_count=4).tolist() != whole[:1].tolist()


def test_herding_beats_random_rows():
    psi = embedded(normal(200, 4), 512)
    mu = psi.mean(0)
    herded = mmd2(psi[herd(psi, mu, 10)].mean(0), mu)
    draws = [torch.randperm(200, generator=torch.Generator().manual_seed(s))[:10] for s in range(50)]
    assert herded < 0.5 * min(mmd2(psi[rows].mean(0), mu).item() for rows in draws)


def test_herding_all_none_and_ties():
    psi = torch.eye(4)
    assert sorted(herd(psi, psi.mean(0), 4).tolist()) == [0, 1, 2, 3]
    assert herd(psi, psi.mean(0), 0).tolist() == []
    assert herd(psi, psi.mean(0), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [-1, 5])
def test_herding_more_than_there_are(count):
    with pytest.raises(ValueError, match=f"Cannot pick {count} rows out of 4"):
        herd(torch.eye(4), torch.zeros(4), count)


@pytest.mark.parametrize("n", [1, 6])
def test_regression_errors_are_those_of_a_kernel_ridge_regression(n):
    generator = torch.Generator().manual_seed(0)
    few, labels, many, answers = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64)
        for rows, size in ((n, 4), (n, 3), (50, 4), (50, 3))
    )
    regularization = 0.3
    alpha = regularization * few.square().sum(1).mean().item()
    reference = KernelRidge(alpha=alpha, kernel="linear").fit(few.numpy(), labels.numpy())
    predicted = torch.from_numpy(reference.predict(many.numpy())).view(50, 3)
    expected = (predicted - answers).square().mean(0) - answers.square().mean(0)
    moment, cross = many.T @ many / 50, many.T @ answers / 50
    torch.testing.assert_close(regression_errors(few, labels, moment, cross, regularization), expected)
    assert not regression_errors(few, torch.zeros_like(labels), moment, cross, regularization).any()


def test_learned_labels_of_orthogonal_images_undo_the_regularisation():
    """Ψ = I: weights are labels / (1 + λ), and the population's own weights are b / m."""
    psi, moment = torch.eye(2), torch.diag(torch.tensor([0.5, 0.25]))
    cross = torch.tensor([[0.2, -0.1], [0.05, 0.1]])
    expected = 1.5 * torch.tensor([[0.4, -0.2], [0.2, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(learned_labels(psi, moment, cross, 0.5), expected)
    twice = learned_labels(torch.cat([psi, psi]), moment, cross, 0.5)  # ΨᵀΨ = 2I: weights are (y + y') / (2 + λ)
    torch.testing.assert_close(twice, torch.cat([expected, expected]) * 2.5 / 2 / 1.5)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_learned_labels_make_the_smallest_error_on_the_population(n):
    generator = torch.Generator().manual_seed(0)
    few, many, answers = (
        torch.randn(rows, size, generator=generator, dtype=torch.float64) for rows, size in ((n, 6), (50, 6), (50, 2))
    )
    moment, cross = many.T @ many / 50, many.T @ answers / 50
    found = learned_labels(few, moment, cross, 0.3).requires_grad_()
    (slope,) = torch.autograd.grad(regression_errors(few, found, moment, cross, 0.3).sum(), found)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_frechet_distance_of_diagonal_gaussians_is_that_of_means_and_deviations():
    mean1, mean2 = normal(2, 6)
    std1, std2 = normal(2, 6, seed=1).abs()
    found = frechet_distance(mean1, std1.square().diag(), mean2, std2.square().diag())
    expected = (mean1.double() - mean2.double()).square().sum() + (std1.double() - std2.double()).square().sum()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rows", [40, 5], ids=["full rank", "fewer samples than dimensions"])
def test_frechet_distance_is_that_of_the_matrix_square_root(rows):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(rows, 8).double(), (normal(rows, 8, seed=1) @ normal(8, 8, seed=2) + 1).double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    found = frechet_distance(a.mean(0), cov_a, b.mean(0), cov_b)
    root = linalg.sqrtm((cov_a @ cov_b).numpy()).real
    expected = float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * root.trace()
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(frechet_distance(b.mean(0), cov_b, a.mean(0), cov_a)) == pytest.approx(float(found), rel=1e-9)


def test_frechet_distance_of_equal_gaussians_is_zero_and_shapes_are_checked():
    x = normal(30, 4).double()
    assert float(frechet_distance(x.mean(0), x.T.cov(), x.mean(0), x.T.cov())) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match=r"one d, got .*\(4,\).*\(3, 3\)"):
        frechet_distance(x.mean(0), x.T.cov(), x.mean(0), torch.eye(3))
