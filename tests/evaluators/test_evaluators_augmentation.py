"""Augmentations against their definitions, written out image by image."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dsco_hf.evaluators.augmentation import (
    AUGMENTATIONS,
    DSA,
    DSA_STRATEGIES,
    LUMA,
    ColorJitter,
    CutMix,
    HorizontalFlip,
    Lighting,
    RandomResizedCrop,
    RandomShift,
    ShufflePatches,
    augment,
    dsa_color,
    dsa_crop,
    dsa_cutout,
    dsa_rotate,
    dsa_scale,
    resize_matrix,
    uniform,
)


def images(batch=16, channels=3, size=12, seed=0):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_same_result_and_no_other_randomness(name, channels):
    transform = AUGMENTATIONS[name]()
    pixels = images(channels=channels)
    before = pixels.clone()
    torch.manual_seed(1)
    first = augment([transform], pixels, generator=generator())
    torch.manual_seed(2)
    second = augment([transform], pixels, generator=generator())
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(pixels, before)
    assert first.pixels.shape == pixels.shape
    assert first.pixels.isfinite().all()


@pytest.mark.parametrize("name", list(AUGMENTATIONS))
def test_a_single_image(name):
    assert augment([AUGMENTATIONS[name]()], images(batch=1), generator=generator()).pixels.shape == (1, 3, 12, 12)


def test_flip_mirrors_half_of_the_images():
    pixels = images(batch=400)
    flipped = HorizontalFlip()(pixels, generator())
    mirrored = (flipped == pixels.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], pixels[~mirrored])
    assert 150 < mirrored.sum() < 250
    assert torch.equal(HorizontalFlip(probability=1.0)(pixels, generator()), pixels.flip(3))


def test_shift_is_padding_and_a_crop():
    pixels = images(batch=64)
    shifted = RandomShift(pixels=2, fill=-0.5)(pixels, generator())
    padded = F.pad(pixels, (2, 2, 2, 2), value=-0.5)
    seen = set()
    for image, around in zip(shifted, padded, strict=True):
        found = [
            (row, column)
            for row, column in itertools.product(range(5), range(5))
            if torch.equal(image, around[:, row : row + 12, column : column + 12])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 15


@pytest.mark.parametrize("size_out", [5, 12, 20])
def test_resize_matrix_is_the_antialiased_resize_of_the_crop(size_out):
    pixels = images(batch=4)
    starts, lengths = torch.tensor([0, 3, 11, 2]), torch.tensor([12, 7, 1, 10])
    weights = resize_matrix(starts, lengths, 12, size_out)  # (4, out, 12)
    for image, start, length, weight in zip(pixels, starts, lengths, weights, strict=True):
        crop = image[None, :, start : start + length]
        expected = F.interpolate(crop, size=(size_out, 12), mode="bilinear", antialias=True)[0]
        assert torch.allclose(weight @ image, expected, atol=1e-5)


def test_random_resized_crop_is_the_resized_crop_of_its_box():
    pixels = images(batch=32)
    transform = RandomResizedCrop(scale=(0.2, 0.9))
    result = transform(pixels, generator(3))
    for image, output, *box in zip(pixels, result, *transform.boxes(pixels, generator(3)), strict=True):
        top, left, height, width = (int(value) for value in box)
        crop = image[None, :, top : top + height, left : left + width]
        assert crop.shape[-2:] == (height, width)
        expected = F.interpolate(crop, size=(12, 12), mode="bilinear", antialias=True)[0]
        assert torch.allclose(output, expected, atol=1e-5)


def test_boxes_keep_their_area_and_ratio_and_lie_anywhere():
    pixels = torch.zeros(2000, 1, 64, 64)
    top, left, height, width = RandomResizedCrop(scale=(0.25, 0.5)).boxes(pixels, generator())
    area, ratio = height * width / 64**2, width / height
    assert 0.23 < area.min() < 0.28 and 0.47 < area.max() < 0.53
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert (top >= 0).all() and (top + height <= 64).all() and (left + width <= 64).all()
    assert top.min() == 0 and (top + height).max() == 64


def test_scale_one_is_the_whole_image():
    pixels = images()
    assert torch.allclose(RandomResizedCrop(scale=(1.0, 1.0))(pixels, generator()), pixels, atol=1e-6)
    assert RandomResizedCrop(size=7)(pixels, generator()).shape == (16, 3, 7, 7)


def test_color_jitter_is_its_three_steps_in_any_order():
    pixels = images(batch=6)
    result = ColorJitter(0.4, 0.3, 0.2)(pixels, generator(5))
    draws = 1 + uniform(pixels, generator(5), -1, 1, columns=3)[:, :, 0, 0] * torch.tensor([0.4, 0.3, 0.2])
    luma = torch.tensor(LUMA).view(3, 1, 1)

    def grey(x):
        return (x * luma).sum(0, keepdim=True)

    steps = {
        "brightness": lambda x, factor: factor * x,
        "contrast": lambda x, factor: factor * x + (1 - factor) * grey(x).mean(),
        "saturation": lambda x, factor: factor * x + (1 - factor) * grey(x),
    }
    for order in itertools.permutations(steps):
        for image, output, factors in zip(pixels, result, draws, strict=True):
            x = image / 2 + 0.5
            for name in order:
                x = steps[name](x, factors[list(steps).index(name)])
            assert torch.allclose(output, 2 * x - 1, atol=1e-5)


def test_lighting_adds_one_colour_to_an_image():
    pixels = images(batch=500)
    added = Lighting(0.1)(pixels, generator()) - pixels
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-5)
    colours = added[:, :, 0, 0] / 2
    # Covariance V diag((σ λ)²) Vᵀ of the AlexNet paper, whose first component is grey.
    assert torch.allclose(colours.std(0), torch.full((3,), 0.1 * 0.2175 * 0.575), rtol=0.15)
    assert torch.equal(Lighting()(images(channels=1), generator()), images(channels=1))


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_patches_are_whole_strips_of_columns_and_rows(factor):
    size, strip = 12, 12 // factor
    position = torch.arange(size * size).view(1, 1, size, size).float().expand(8, 1, size, size)
    result = ShufflePatches(factor)(position, generator(2)).long()
    edges = [strip * i for i in range(factor)] + [size]
    strips = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    allowed = [sum(order, []) for order in itertools.permutations(strips)]
    for image in result[:, 0]:
        assert (image[0] % size).tolist() in allowed
        assert (image[:, 0] // size).tolist() in allowed
        assert torch.equal(image, (image[:, :1] // size) * size + image[:1] % size)


def test_cutmix_pastes_one_rectangle_and_weighs_by_area():
    pixels = images(batch=8, size=16)
    for seed in range(20):
        mixed = CutMix()(pixels, generator(seed))
        changed = (mixed.pixels != pixels).any(1).any(0)
        inside = changed.nonzero()
        if len(inside) == 0:
            assert mixed.weight == 1.0 or torch.equal(mixed.partner, torch.arange(8))
            continue
        (top, left), (bottom, right) = inside.min(0).values, inside.max(0).values + 1
        assert changed.sum() == (bottom - top) * (right - left)
        expected = pixels[mixed.partner][:, :, top:bottom, left:right]
        assert torch.equal(mixed.pixels[:, :, top:bottom, left:right], expected)
        assert mixed.weight == pytest.approx(1 - changed.sum().item() / 256)


def test_cutmix_leaves_out_the_batches_it_should():
    pixels = images(batch=4)
    unmixed = [CutMix(probability=0.5)(pixels, generator(seed)).partner is None for seed in range(200)]
    assert 70 < sum(unmixed) < 130


def test_dsa_color_is_brightness_saturation_contrast():
    pixels = images(batch=5)
    result = dsa_color(pixels, generator(1))
    draws = uniform(pixels, generator(1), columns=3)[:, :, 0, 0]
    for image, output, (b, s, c) in zip(pixels, result, draws, strict=True):
        x = image + (b - 0.5)
        x = (x - x.mean(0)) * (2 * s) + x.mean(0)
        x = (x - x.mean()) * (c + 0.5) + x.mean()
        assert torch.allclose(output, x, atol=1e-5)


def test_dsa_crop_shifts_by_an_eighth_and_fills_with_zeros():
    pixels = images(batch=100, size=16) + 3
    padded = F.pad(pixels, (2, 2, 2, 2))
    for image, around in zip(dsa_crop(pixels, generator()), padded, strict=True):
        assert any(
            torch.equal(image, around[:, row : row + 16, column : column + 16])
            for row, column in itertools.product(range(5), range(5))
        )


def test_dsa_cutout_removes_half_of_height_and_width():
    pixels = images(batch=200, size=16) + 3
    holes = (dsa_cutout(pixels, generator()) == 0).all(1)
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert heights.max() == widths.max() == 8 and heights.min() >= 4
    assert torch.equal(holes.flatten(1).sum(1), heights * widths)
    assert torch.equal(
        dsa_cutout(pixels, generator())[~holes[:, None].expand_as(pixels)], pixels[~holes[:, None].expand_as(pixels)]
    )


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_dsa_scale_and_rotate_resample_at_the_stated_places(name):
    pixels = images(batch=3, size=9)
    if name == "scale":
        result = dsa_scale(pixels, generator(4))
        factors = uniform(pixels, generator(4), 1 / 1.2, 1.2, columns=2)[:, :, 0, 0]
        matrices = [torch.diag(pair) for pair in factors]
        assert (factors > 1 / 1.2).all() and (factors < 1.2).all()
    else:
        result = dsa_rotate(pixels, generator(4))
        angles = uniform(pixels, generator(4), -1, 1)[:, 0, 0, 0] * math.radians(15)
        matrices = [torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]) for a in angles]
    for image, output, matrix in zip(pixels, result, matrices, strict=True):
        for row, column in itertools.product(range(9), range(9)):
            at = torch.tensor([(2 * column + 1) / 9 - 1, (2 * row + 1) / 9 - 1])  # pixel centres in [-1, 1]
            x, y = (((matrix @ at) + 1) * 9 - 1) / 2
            value = torch.zeros(3)
            for r, c in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                if 0 <= r < 9 and 0 <= c < 9:
                    value += image[:, r, c] * (1 - abs(x - c)) * (1 - abs(y - r))
            assert torch.allclose(output[:, row, column], value, atol=1e-4)


def test_dsa_draws_one_strategy_a_batch_in_normalised_space():
    pixels = images(batch=4)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    transform = DSA((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    normalised = (pixels / 2 + 0.5 - mean) / std
    seen = set()
    for seed in range(40):
        g = generator(seed)
        name = transform.strategies[int(torch.randint(6, (), generator=g))]
        expected = (DSA_STRATEGIES[name](normalised, g) * std + mean) * 2 - 1
        assert torch.allclose(transform(pixels, generator(seed)), expected, atol=1e-5)
        seen.add(name)
    assert seen == set(DSA_STRATEGIES)
    with pytest.raises(ValueError, match="colour"):
        DSA(strategies=("colour",))


def test_augmentations_are_applied_in_order():
    pixels = images()
    first = augment([HorizontalFlip(), CutMix()], pixels, generator=generator(7))
    g = generator(7)
    second = CutMix()(HorizontalFlip()(pixels, g), g)
    assert torch.equal(first.pixels, second.pixels) and first.weight == second.weight
    assert augment([], pixels, generator=generator()).pixels is pixels
