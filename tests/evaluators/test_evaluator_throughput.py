"""The throughput benchmark at tiny size: both loops train the same network, and the figures are there."""

import json

import pytest
import torch

from recipes.benchmarks import evaluator_throughput as benchmark


SETTINGS = {"architecture": "convnet-2", "image_size": 8, "batch_size": 4}


def test_the_conventional_network_is_the_same_function():
    torch.manual_seed(0)
    ours = benchmark.make_model(SETTINGS).eval()
    images = torch.randn(2, 3, 8, 8)
    expected = ours(images).logits
    theirs = benchmark.conventional(ours)
    assert {type(m) for m in theirs.modules() if isinstance(m, torch.nn.GroupNorm)} == {torch.nn.GroupNorm}
    assert torch.allclose(theirs(images).logits, expected, atol=1e-5)


def test_conventional_images_are_augmented_one_by_one(tmp_path):
    options = type("Options", (), {"images_per_class": 1, "image_size": 8})
    benchmark.write_images(tmp_path, options)
    files = benchmark.ImageFiles(str(tmp_path))
    assert len(files) == 10
    first, second = files[3], files[3]
    assert first[0].shape == (3, 8, 8) and first[1] == second[1] == 3
    assert not torch.equal(first[0], second[0])


@pytest.mark.slow
def test_figures(forked, tmp_path, capsys):
    out = tmp_path / "figures.json"
    options = ["--architecture", "convnet-1", "--image_size", "8", "--images_per_class", "2", "--seconds", "0.2"]
    results = benchmark.main([*options, "--settings", "fp32", "--cores", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == results == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["ratio_same_precision"] > 0 and 0 <= results["overhead_share_same_precision"] < 1
    assert "ratio" not in results and results["images_per_second"]["ours_fp32"] > 0
