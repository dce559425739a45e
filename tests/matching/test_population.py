import math

import pytest
import torch

from dsco_hf.matching import population as population_module
from dsco_hf.matching.kernels import fourier_embedding, median_bandwidth, single_precision
from dsco_hf.matching.population import (
    Population,
    dataset_units,
    merge_moments,
    mix_keys,
    moments_of,
    refuse_empty_classes,
)


OPTIONS = {"embedding_dim": 64, "bandwidth": None}


def features(n, d=5, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x * torch.arange(1, d + 1) + torch.tensor(100.0)  # far from zero: sums of squares would lose digits


def embed(x, rows, weights=None, *, chunk=7, names=("a", "b", "c"), seed=0, **options):
    with Population(names, seed=seed) as population:
        for part in torch.arange(len(x)).split(chunk):
            population.add(x[part], rows[part], None if weights is None else weights[part])
        return population.embed(**OPTIONS | options)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_the_second_moment_has_classes_of_equal_weight(chunk):
    x, rows = features(60), torch.arange(60) % 3
    rows[:20], weights = 0, torch.rand(60, generator=torch.Generator().manual_seed(1))
    found = embed(x, rows, weights, chunk=chunk, second_moment=True)
    psi = fourier_embedding((x - found["feature_mean"]) / found["feature_std"], found["frequencies"])
    moments = [
        (psi[rows == row] * weights[rows == row, None]).T @ psi[rows == row] / weights[rows == row].sum()
        for row in range(3)
    ]
    torch.testing.assert_close(found["second_moment"], torch.stack(moments).mean(0), atol=1e-5, rtol=0)
    assert embed(x, rows, weights, chunk=chunk)["second_moment"] is None


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_statistics_equal_those_of_everything_in_memory(chunk):
    x, rows = features(60), torch.arange(60) % 3
    rows[:5] = 0
    found = embed(x, rows, chunk=chunk)
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False)
    torch.testing.assert_close(found["feature_mean"], mean.float())
    torch.testing.assert_close(found["feature_std"], std.float())
    standardised = ((x - mean) / std).float()
    assert found["bandwidth"] == pytest.approx(median_bandwidth(standardised), rel=1e-4)
    psi = fourier_embedding(standardised, found["frequencies"])
    expected = torch.stack([psi[rows == row].mean(0) for row in range(3)])
    torch.testing.assert_close(found["embeddings"], expected, atol=2e-5, rtol=0)
    assert found["counts"].tolist() == torch.bincount(rows).tolist()


def test_batches_do_not_matter():
    x, rows = features(50), torch.arange(50) % 3
    a, b = (embed(x, rows, chunk=chunk) for chunk in (3, 50))
    torch.testing.assert_close(a["embeddings"], b["embeddings"], atol=1e-5, rtol=0)
    assert torch.equal(a["frequencies"] * a["bandwidth"], b["frequencies"] * b["bandwidth"])


def test_whole_weights_are_repeated_rows():
    x, rows = features(30), torch.arange(30) % 3
    weights = torch.tensor([0, 1, 3, 2, 1]).repeat(6).float()
    weighted = embed(x, rows, weights, bandwidth=2.0)
    times = weights.long()
    repeated = embed(x.repeat_interleave(times, 0), rows.repeat_interleave(times), bandwidth=2.0)
    for name in ("embeddings", "feature_mean", "feature_std", "counts"):
        torch.testing.assert_close(weighted[name], repeated[name], atol=2e-5, rtol=1e-5)
    plain = embed(x, rows, bandwidth=2.0)
    assert (plain["embeddings"] - weighted["embeddings"]).abs().max() > 0.01


def test_rows_of_no_weight_leave_no_trace():
    x, rows, weights = features(30), torch.arange(30) % 3, torch.ones(30)
    x[20:], weights[20:] = 1e6, 0
    a, b = embed(x, rows, weights, chunk=10), embed(x[:20], rows[:20])
    assert a["bandwidth"] == pytest.approx(b["bandwidth"], rel=1e-5)
    torch.testing.assert_close(a["embeddings"], b["embeddings"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 6])
def test_features_that_do_not_vary(n):
    found = embed(torch.full((n, 4), 7.0), torch.zeros(n, dtype=torch.int64), names=("a",))
    assert found["bandwidth"] == 1.0 and found["feature_std"].tolist() == [1.0] * 4
    assert found["embeddings"].isfinite().all()
    assert found["embeddings"][0].norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_constant_dimension_is_left_as_it_is():
    x = features(20)
    x[:, 2] = -3.0
    found = embed(x, torch.arange(20) % 3)
    assert found["feature_std"][2] == 1 and (found["feature_std"][[0, 1, 3, 4]] > 0.5).all()
    assert found["embeddings"].isfinite().all()


def test_bandwidth_of_a_large_population_is_that_of_a_sample_by_seed():
    x, rows = features(2600, 2), torch.arange(2600) % 3
    first, again, other = (embed(x, rows, chunk=500, seed=seed)["bandwidth"] for seed in (0, 0, 1))
    assert first == again != other
    standardised = (x - x.mean(0)) / x.std(0, unbiased=False)
    assert math.isclose(first, median_bandwidth(standardised), rel_tol=0.05)


def test_the_sample_does_not_depend_on_order_or_units(monkeypatch):
    monkeypatch.setattr(population_module, "BANDWIDTH_IMAGES", 20)
    x, rows = features(90), torch.arange(90) % 3
    keys = torch.randint(0, 2**62, (90,), generator=torch.Generator().manual_seed(1))
    found = []
    for order, size in ((torch.arange(90), 90), (torch.arange(90).flip(0), 7), (torch.randperm(90), 30)):
        with Population(["a", "b", "c"]) as population:
            for number, part in enumerate(order.split(size)):
                population.add(x[part], rows[part], keys=keys[part], unit=str(number))
            found.append(population.embed(**OPTIONS))
            sample = population._sample.over(population.team)
        assert sample.shape == (20, 5)
    chosen = mix_keys(keys, 0).argsort()[:20]
    assert torch.equal(sample, x[chosen])
    for other in found[1:]:
        assert other["bandwidth"] == pytest.approx(found[0]["bandwidth"], rel=1e-6)
        for name in ("embeddings", "feature_mean", "feature_std"):
            torch.testing.assert_close(other[name], found[0][name], atol=1e-6, rtol=1e-6)


def test_mixed_keys_are_spread_evenly_and_depend_on_the_seed():
    keys = torch.arange(10_000)
    a, b = mix_keys(keys, 0), mix_keys(keys, 1)
    assert len(a.unique()) == 10_000 and a.min() >= 0
    for mixed in (a, b):
        assert 0.48 < (mixed.double() / 2**63).mean() < 0.52
        assert abs(torch.corrcoef(torch.stack([keys.double(), mixed.double()]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1]) < 0.03


@pytest.mark.parametrize(("rows", "batch_size", "units", "size"), [
    (0, 4, 0, 0), (1, 4, 1, 1), (21, 4, 6, 4), (1437, 256, 6, 256), (50_000, 256, 98, 512),
    (1_281_167, 256, 2503, 512),
    (100_000, 4096, 25, 4096),
])  # fmt: skip
def test_units_are_whole_batches_whatever_the_number_of_processes(rows, batch_size, units, size):
    made = dataset_units(rows, batch_size)
    assert len(made) == units and sum(map(len, made.values())) == rows
    assert all(len(unit) == size for unit in list(made.values())[:-1])
    assert [unit.start for unit in list(made.values())[1:]] == [unit.stop for unit in list(made.values())[:-1]]


def test_moments_merge_as_if_taken_at_once():
    x, w = features(40).double() + 1e6, torch.rand(40)
    merged = None
    for part in torch.arange(40).split(9):
        merged = merge_moments(merged, moments_of(x[part], w[part]))
    whole = moments_of(x, w)
    assert merged.total == pytest.approx(whole.total, rel=1e-12)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.squares, whole.squares, rtol=1e-9, atol=0)
    assert moments_of(x, torch.zeros(40)) is None and merge_moments(whole, None) is whole


def test_classes_without_image_are_named():
    with pytest.raises(ValueError, match=r"1 of 3 classes have no image.*\['b'\]"):
        embed(features(10), torch.zeros(10, dtype=torch.int64).index_fill(0, torch.arange(5), 2))
    with pytest.raises(ValueError, match=r"2 of 3 classes"):
        refuse_empty_classes([1.0, 0.0, float("nan")], ["a", "b", "c"])
    refuse_empty_classes([1.0, 0.5], ["a", "b"])


def test_temporary_file_is_closed():
    with Population(["a"]) as population:
        population.add(features(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="closed file"):
        population.embed(**OPTIONS)


def test_a_tie_of_float32_does_not_hang_on_the_last_bit_of_float64():
    tie = torch.tensor([1 + 2**-24, 0.5303244888782501, 0.0, -(1 + 2**-24)], dtype=torch.float64)
    above, below = torch.nextafter(tie, tie + 1), torch.nextafter(tie, tie - 1)
    assert not torch.equal(above.float(), below.float())
    assert torch.equal(single_precision(above), single_precision(below))
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-20
    torch.testing.assert_close(single_precision(values), values.float(), rtol=1.2e-7, atol=0)
