"""Kernel mean embeddings: random Fourier features, maximum mean discrepancy and herding.

Free functions, tensor → tensor, in the notation of the papers they come from. ``x`` are (standardised) features,
``psi`` their embedding ψ(x), ``mu`` a mean embedding μ = E[ψ(x)].
"""

from __future__ import annotations

import math

import torch


def median_bandwidth(x: torch.Tensor) -> float:
    """Bandwidth of a Gaussian kernel by the median heuristic (Gretton et al. 2012, "A Kernel Two-Sample Test").

    Args:
        x (`torch.Tensor` of shape `(n, d)`): features of a sample; memory is O(n²), so pass one or two thousand rows
            at most.

    Returns:
        `float`: the median of all pairwise Euclidean distances; 1.0 if it is zero or there is only one row, where no
        scale can be read off the sample.
    """
    if x.ndim != 2:
        raise ValueError(f"`x` must have shape (n, d), got {tuple(x.shape)}.")
    if x.shape[0] < 2:
        return 1.0
    median = torch.pdist(x.float()).median().item()
    return median if median > 0 else 1.0


def draw_frequencies(
    feature_dim: int, embedding_dim: int, bandwidth: float, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws the frequencies of random Fourier features for a Gaussian kernel (Rahimi & Recht 2007).

    Args:
        feature_dim (`int`): d, the dimension of the features.
        embedding_dim (`int`): D, the dimension of the embedding: even, as every frequency gives a cosine and a sine.
        bandwidth (`float`): standard deviation of the kernel exp(-‖x - y‖² / (2·bandwidth²)), in units of the
            features.
        generator (`torch.Generator`, *optional*): a CPU generator; the frequencies are drawn on CPU so that they do
            not depend on the device.

    Returns:
        `torch.Tensor` of shape `(d, D / 2)`.
    """
    if embedding_dim < 2 or embedding_dim % 2:
        raise ValueError(f"`embedding_dim` must be an even number of at least 2, got {embedding_dim}.")
    if not bandwidth > 0 or not math.isfinite(bandwidth):
        raise ValueError(f"`bandwidth` must be a positive finite number, got {bandwidth}.")
    return torch.randn(feature_dim, embedding_dim // 2, generator=generator) / bandwidth


def fourier_embedding(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Embeds features with random Fourier features: ψ(x) = √(2/D) [cos(Wᵀx), sin(Wᵀx)] (Rahimi & Recht 2007).

    The cosine/sine pair has less variance than a cosine with a random phase (Sutherland & Schneider 2015) and ‖ψ(x)‖ =
    1 exactly, as k(x, x) = 1.

    Args:
        x (`torch.Tensor` of shape `(n, d)`): features.
        frequencies (`torch.Tensor` of shape `(d, D / 2)`): W, from [`draw_frequencies`].

    Returns:
        `torch.Tensor` of shape `(n, D)`: ⟨ψ(x), ψ(y)⟩ ≈ exp(-‖x - y‖² / (2·bandwidth²)).
    """
    projection = x @ frequencies  # (n, D / 2)
    return torch.cat([projection.cos(), projection.sin()], dim=1) / math.sqrt(frequencies.shape[1])  # (n, D)


def gaussian_kernel(x: torch.Tensor, y: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Gaussian kernel matrix k(x, y) = exp(-‖x - y‖² / (2·bandwidth²)).

    Args:
        x (`torch.Tensor` of shape `(n, d)`): features.
        y (`torch.Tensor` of shape `(m, d)`): features.
        bandwidth (`float`): standard deviation of the kernel.

    Returns:
        `torch.Tensor` of shape `(n, m)`, range (0, 1].
    """
    return torch.exp(-torch.cdist(x, y).square() / (2 * bandwidth**2))


def mmd2_exact(x: torch.Tensor, y: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """Squared maximum mean discrepancy of samples `(n, d)` and `(m, d)`, biased (Gretton et al. 2012, eq. 5).

    Lower is better. This needs all pairs; [`mmd2`] on mean embeddings gives the same number within the error of the
    random features.
    """
    k_xx, k_yy, k_xy = (gaussian_kernel(a, b, bandwidth).mean() for a, b in ((x, x), (y, y), (x, y)))
    return k_xx + k_yy - 2 * k_xy


def mmd2(mu_p: torch.Tensor, mu_q: torch.Tensor) -> torch.Tensor:
    """Squared maximum mean discrepancy of mean embeddings: ‖μ_p - μ_q‖², `(…, D)` → `(…,)`. Lower is better."""
    return (mu_p - mu_q).square().sum(dim=-1)


def regression_errors(
    psi: torch.Tensor, labels: torch.Tensor, second_moment: torch.Tensor, cross: torch.Tensor, regularization: float
) -> torch.Tensor:
    """Squared errors, on a population, of a kernel ridge regression that knows a few images only. Lower is better.

    The loss of "Dataset Meta-Learning from Kernel Ridge-Regression" (Nguyen, Chen & Lee 2021, arXiv 2011.00050),
    written in the embedding: with W = Ψᵀ(ΨΨᵀ + λI)⁻¹Y the error of output k is E(w_kᵀψ - y_k)² = w_kᵀ M w_k - 2 w_kᵀ
    b_k + E y_k², and M = E ψψᵀ and b_k = E y_k ψ are all that has to be known of the population.

    Args:
        psi (`torch.Tensor` of shape `(n, D)`): Ψ, embeddings of the few images; with gradient, if wanted.
        labels (`torch.Tensor` of shape `(n, K)`): Y, what is to be predicted of them.
        second_moment (`torch.Tensor` of shape `(D, D)`): M.
        cross (`torch.Tensor` of shape `(D, K)`): b_k as columns.
        regularization (`float`): λ > 0, in units of the mean ‖ψ‖² of the few images, which is 1 for random Fourier
            features.

    Returns:
        `torch.Tensor` of shape `(K,)`: the errors less E y_k², so 0 for W = 0.
    """
    gram = psi @ psi.T  # (n, n)
    ridge = regularization * gram.diagonal().mean().detach()
    weights = psi.T @ torch.linalg.solve(gram + torch.diag(ridge.expand(len(gram))), labels)  # (D, K)
    return ((second_moment @ weights - 2 * cross) * weights).sum(dim=0)


def learned_labels(
    psi: torch.Tensor, second_moment: torch.Tensor, cross: torch.Tensor, regularization: float
) -> torch.Tensor:
    """The labels of a few images from which a kernel ridge regression learns most: those of the smallest error.

    The "label solve" of "Dataset Meta-Learning from Kernel Ridge-Regression" (Nguyen, Chen & Lee 2021, arXiv
    2011.00050), min over Y of ‖Y_t - K_ts (K_ss + λI)⁻¹ Y‖², written in the embedding: with P = Ψᵀ(ΨΨᵀ +
    λI)⁻¹ and the weights W = PY of [`regression_errors`], E‖Wᵀψ - y‖² is smallest at Y = (PᵀMP)⁺ PᵀB. Of several such
    labels the pseudo-inverse takes the smallest; what it cuts off, 1e-6 of the largest eigenvalue, is the precision of
    M. The weights do not depend on λ where the images' embeddings are independent, but the range of the labels does.

    Args:
        psi (`torch.Tensor` of shape `(n, D)`): Ψ, embeddings of the few images.
        second_moment (`torch.Tensor` of shape `(D, D)`): M = E ψψᵀ of the population.
        cross (`torch.Tensor` of shape `(D, K)`): B = E ψyᵀ, y what is to be predicted.
        regularization (`float`): λ > 0, in units of the mean ‖ψ‖² of the few images.

    Returns:
        `torch.Tensor` of shape `(n, K)`: Y, float64, in units of y; any numbers.
    """
    psi, second_moment, cross = psi.double(), second_moment.double(), cross.double()
    gram = psi @ psi.T  # (n, n)
    ridge = regularization * gram.diagonal().mean()
    weights = torch.linalg.solve(gram + torch.diag(ridge.expand(len(gram))), psi).T  # P: (D, n)
    curvature = weights.T @ second_moment @ weights  # (n, n)
    return torch.linalg.pinv((curvature + curvature.T) / 2, rtol=1e-6, hermitian=True) @ (weights.T @ cross)


def frechet_distance(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> torch.Tensor:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson & Landau 1982): the formula of the FID.

    ‖m₁ - m₂‖² + tr(C₁ + C₂ - 2 (C₁ C₂)^½), in float64. The last trace is that of (C₁^½ C₂ C₁^½)^½, which is symmetric
    and has the same eigenvalues (Heusel et al. 2017 use the unsymmetric product). Covariances may be singular, as
    those of fewer samples than dimensions are.

    Args:
        mean1 (`torch.Tensor` of shape `(d,)`): m₁.
        cov1 (`torch.Tensor` of shape `(d, d)`): C₁, symmetric positive semi-definite.
        mean2 (`torch.Tensor` of shape `(d,)`): m₂.
        cov2 (`torch.Tensor` of shape `(d, d)`): C₂, likewise.

    Returns:
        `torch.Tensor`: a float64 scalar, at least 0, in squared units of the features; 0 for equal Gaussians.
        Estimated from n samples it is biased upwards, so compare figures of the same n.
    """
    dims = mean1.shape[0]
    if not mean1.shape == mean2.shape == (dims,) or not cov1.shape == cov2.shape == (dims, dims):
        raise ValueError(
            "Expected means of shape (d,) and covariances of shape (d, d) with one d, got "
            f"{[tuple(value.shape) for value in (mean1, cov1, mean2, cov2)]}."
        )
    mean1, cov1, mean2, cov2 = (value.double() for value in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # C₁^½
    product = root @ cov2 @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp_min(0)


def herd(
    psi: torch.Tensor,
    mu: torch.Tensor,
    count: int,
    *,
    initial_sum: torch.Tensor | None = None,
    initial_count: int = 0,
) -> torch.Tensor:
    """Kernel herding: greedily picks rows that bring the mean embedding closest to `mu` (Chen, Welling & Smola 2010).

    Every pick j minimises ‖(s + ψ_j) / (m + 1) - μ‖² given the sum s of the m rows that are already in the set; rows
    are picked without replacement, ties go to the lowest index.

    Args:
        psi (`torch.Tensor` of shape `(n, D)`): candidates' embeddings.
        mu (`torch.Tensor` of shape `(D,)`): the target mean embedding.
        count (`int`): how many rows to pick, at most n.
        initial_sum (`torch.Tensor` of shape `(D,)`, *optional*): sum of the embeddings that are in the set beforehand:
            herding then picks what *they* leave unmatched.
        initial_count (`int`): their number.

    Returns:
        `torch.Tensor` of shape `(count,)`: int64 indices in the order of picking.
    """
    if not 0 <= count <= psi.shape[0]:
        raise ValueError(
            f"Cannot pick {count} rows out of {psi.shape[0]} candidates: pass 0 <= count <= {psi.shape[0]}."
        )
    psi, mu = psi.double(), mu.double()
    # ‖(s + ψ)/(m + 1) - μ‖² = const + (2⟨s, ψ⟩ + ‖ψ‖²)/(m + 1)² - 2⟨ψ, μ⟩/(m + 1)
    to_target, norms = psi @ mu, psi.square().sum(dim=1)  # (n,), (n,)
    to_set = torch.zeros_like(to_target) if initial_sum is None else psi @ initial_sum.double()
    available = torch.ones(psi.shape[0], dtype=torch.bool, device=psi.device)
    picked = []
    for m in range(initial_count, initial_count + count):
        change = (2 * to_set + norms) / (m + 1) ** 2 - 2 * to_target / (m + 1)
        j = int(change.masked_fill(~available, math.inf).argmin())
        available[j] = False
        picked.append(j)
        to_set += psi @ psi[j]
    return torch.tensor(picked, dtype=torch.int64)


def single_precision(values: torch.Tensor) -> torch.Tensor:
    """Values of any shape in float32, shaped alike, that do not depend on the order in which float64 was summed up.

    Means of few images often lie right between two numbers of float32, where the last bit of float64 would choose: it
    is rounded away first.
    """
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2.0**44).round(), exponent - 44).float()
