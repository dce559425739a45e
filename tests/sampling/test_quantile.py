import pytest
import torch
from datasets import Image

from dsco_hf import QuantileTargets
from dsco_hf.data.datasets import load_pixels
from dsco_hf.sampling.methods.released import RandomExtractor, quantile_loss, quantile_pivots, shell_penalty
from dsco_hf.utils.origins import targets_sha256


def test_pivots_by_hand():
    features = torch.tensor([[4.0, 0.0], [1.0, 10.0], [3.0, 30.0], [2.0, 20.0]])
    found = quantile_pivots(features, 2)
    assert found.mean.tolist() == [2.5, 15.0]
    s = 1.25**0.5  # standard deviation of 1, 2, 3, 4
    torch.testing.assert_close(found.std, torch.tensor([s, 10 * s]))
    # sorted and standardised: (-1.5, -.5, .5, 1.5)/s in both dimensions; chunks of two
    torch.testing.assert_close(found.pivots, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) / s)


def test_loss_by_hand():
    target = quantile_pivots(torch.tensor([[4.0, 0.0], [1.0, 10.0], [3.0, 30.0], [2.0, 20.0]]), 2)
    s = 1.25**0.5
    drawn = torch.tensor([[3.5, 5.0], [2.5, 35.0]])  # standardised and sorted: (0, 1)/s and (-1, 2)/s
    differences = torch.tensor([0 + 1, 1 - 1, -1 + 1, 2 - 1]) / s
    expected = 0.1 * 2 * (differences.abs().sum() + differences.square().sum())
    torch.testing.assert_close(quantile_loss(drawn, target, strength=0.1), expected)
    assert quantile_loss(drawn.flip(0), target).item() == pytest.approx(quantile_loss(drawn, target).item())
    exact = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]) / s * target.std + target.mean
    assert quantile_loss(exact, target).item() == pytest.approx(0, abs=1e-6)


def test_as_many_images_as_the_population_are_the_population_itself():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert quantile_loss(x[torch.tensor([3, 0, 6, 2, 1, 5, 4])], quantile_pivots(x, 7)).item() < 1e-8


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (2, 5), (1, 1), (4, 4)])
def test_pivots_of_any_number_of_rows(rows, count):
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    found = quantile_pivots(x, count)
    assert found.pivots.shape == (count, 4) and found.pivots.isfinite().all()
    assert (found.pivots.diff(dim=0) >= 0).all()
    if rows == 7:  # chunks of 3, 2 and 2
        ordered = ((x - x.mean(0)) / x.std(0, unbiased=False)).sort(0).values
        torch.testing.assert_close(found.pivots[0], ordered[:3].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pivots_are_sorted_by_columns(dtype):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:5] = x[5:10]  # ties
    found = quantile_pivots(x, 50)
    assert torch.equal(found.pivots, ((x - found.mean) / found.std).sort(dim=0).values)


def test_shell_penalty():
    on_shell = torch.ones(2, 1, 3, 3)
    assert shell_penalty(on_shell).item() == pytest.approx(0, abs=1e-6)
    off = torch.stack([torch.full((1, 3, 3), 2.0), torch.zeros(1, 3, 3)])  # norms 6 and 0, shell at 3
    assert shell_penalty(off).item() == pytest.approx((3 + 9) * 2)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (4, 8), (4, 32)])
def test_extractor_shapes_and_seed(channels, size):
    state = torch.get_rng_state()
    first, again, other = RandomExtractor(channels), RandomExtractor(channels), RandomExtractor(channels, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, channels, size, size)
    assert first(x).shape == (2, 2048) and torch.equal(first(x), again(x)) and not torch.equal(first(x), other(x))
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_targets_hold_the_images_of_each_class(pipe, real_images):
    targets = QuantileTargets.from_dataset(real_images, pipe, batch_size=4, progress=False)
    pixels, labels, _ = load_pixels(real_images, num_channels=1)
    assert [len(x) for x in targets.latents] == [9, 7, 5] and targets.class_labels == [0, 1, 2]
    for row in range(3):
        assert torch.equal(targets.latents[row], pixels[labels == row])


def test_latents_of_targets_are_scaled(latent_pipe, make):
    images = make.images((2, 1, 1), names=("tench", "goldfish", "chainsaw"))
    targets = QuantileTargets.from_dataset(images, latent_pipe, progress=False)
    assert [tuple(x.shape) for x in targets.latents] == [(2, 4, 4, 4), (1, 4, 4, 4), (1, 4, 4, 4)]
    pixels, labels, _ = load_pixels(images, num_channels=3)
    mean = latent_pipe.vae.encode(pixels[labels == 1]).latent_dist
    expected = mean.mean * latent_pipe.vae.config.scaling_factor
    spread = mean.std * latent_pipe.vae.config.scaling_factor
    assert ((targets.latents[1] - expected).abs() < 5 * spread).all()


def test_pivots_are_kept_and_follow_the_noise_level(pipe, real_images):
    targets = QuantileTargets.from_dataset(real_images, pipe, draws=2, progress=False)
    extractor = RandomExtractor(1)
    first = targets.pivots(0, 3, 500, extractor, pipe.scheduler)
    assert targets.pivots(0, 3, 500, extractor, pipe.scheduler) is first
    assert first.pivots.shape == (3, 2048)
    fresh = QuantileTargets.from_dataset(real_images, pipe, draws=2, progress=False)
    assert torch.equal(fresh.pivots(0, 3, 500, extractor, pipe.scheduler).pivots, first.pivots)
    for other in ((1, 3, 500), (0, 3, 20)):
        assert not torch.equal(targets.pivots(*other, extractor, pipe.scheduler).mean, first.mean)


def test_several_counts_share_the_passes_of_a_level(pipe, real_images):
    alone = QuantileTargets.from_dataset(real_images, pipe, draws=1, progress=False)
    shared = QuantileTargets.from_dataset(real_images, pipe, draws=1, counts=[1, 3], progress=False)
    extractor, passes = RandomExtractor(1), []
    extractor.register_forward_hook(lambda *_: passes.append(1))
    found = [shared.pivots(0, count, 500, extractor, pipe.scheduler) for count in (3, 1, 2)]
    assert len(passes) == 2  # 2 is not among the counts
    for count, pivots in zip((3, 1, 2), found, strict=True):
        expected = alone.pivots(0, count, 500, extractor, pipe.scheduler)
        for name in ("pivots", "mean", "std"):
            assert torch.equal(getattr(pivots, name), getattr(expected, name))
    assert targets_sha256(alone) == targets_sha256(shared)


def test_a_class_without_image_is_left_out(pipe, make):
    targets = QuantileTargets.from_dataset(make.images((2, 0, 3)), pipe, progress=False)
    assert targets.class_names == ["circle", "triangle"] and targets.class_labels == [0, 2]
    assert [len(latents) for latents in targets.latents] == [2, 3]


def test_a_class_without_target_is_named(pipe, real_images):
    targets = QuantileTargets.from_dataset(real_images, pipe, progress=False)
    targets.class_labels = [0, 2, 5]
    with pytest.raises(ValueError, match=r"no targets for class\(es\) \[1\]"):
        targets.rows_of([0, 1])


def test_columns_and_damaged_images(pipe, real_images):
    stored = real_images.cast_column("image", Image(decode=False))["image"][:]
    both = real_images.add_column("other", [{**stored[0], "bytes": b"no image"}, *stored[1:]])
    both = both.cast_column("other", Image()).rename_columns({"image": "front", "label": "shape"})
    targets = QuantileTargets.from_dataset(
        both, pipe, image_column="front", label_column="shape", draws=1, progress=False
    )
    expected = QuantileTargets.from_dataset(real_images, pipe, draws=1, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(targets.latents, expected.latents, strict=True))
    other = {"image_column": "other", "label_column": "shape", "draws": 1, "progress": False}
    with pytest.raises(ValueError, match="row 0"):
        QuantileTargets.from_dataset(both, pipe, **other)
    rest = QuantileTargets.from_dataset(both, pipe, on_error="skip", **other)
    assert [len(part) for part in rest.latents] == [8, 7, 5]
