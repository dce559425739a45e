"""The benchmarks of runs, at their smallest: real launches, kills and mounts, whose times mean nothing."""

import json

import pytest

from recipes.benchmarks import cost_per_image, fault_sweep, two_processes


@pytest.mark.slow
def test_cost_per_image(tmp_path, capsys):
    sizes = ["--images_per_class", "10", "--block_size", "2", "--num_inference_steps", "3"]
    figures = cost_per_image.main([*sizes, "--out", str(tmp_path / "figures.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert figures["calls_per_image"] == [5.0]  # three steps, and look-aheads before the last two
    assert len(figures["seconds_per_image_by_block"]) == 4 and figures["flatness"] > 0
    assert figures["weights"] == "random" and figures["by_dataset_size"] > 0


@pytest.mark.slow
def test_one_kill(forked, tmp_path, capsys):
    """Of a launch as users make it; what runs to its end is forked."""
    figures = fault_sweep.main(["--kills", "1", "--images_per_class", "4", "--skip_disk"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert (figures["kills"], figures["identical"], figures["units_drawn_twice"]) == (1, 1, 0)
    assert figures["images"] == 40 and figures["disk_full"] is None


@pytest.mark.slow
def test_two_processes(forked, capsys):
    figures = two_processes.main(["--rounds", "1", "--images_per_class", "2", "--num_inference_steps", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert figures["identical"] == 1 and figures["speedup"] > 0 and figures["measured"][0]["command_1"] > 0
