import importlib.util
import json
import sys
from pathlib import Path

import pytest

from dsco_hf.costs.plan import largest_budget
from dsco_hf.sampling.call import calls


RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name):
    """A recipe as a module; recipes are scripts, not a package."""
    path = RECIPES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plan():
    return recipe("plan")


TINY = ["--preset", "imagenet1k", "--tiny", "true", "--images_per_call", "4", "--num_inference_steps", "5"]


@pytest.mark.slow
def test_a_plan_for_assumed_devices(plan, tmp_path, capsys):
    arguments = [*TINY, "--device", "a100", "--images_per_class", "2", "20", "--num_processes", "1", "2"]
    found = plan.main([*arguments, "--max_hours", "1e-7", "--output_file", str(tmp_path / "deep" / "plan.json")])
    shown = capsys.readouterr().out
    assert "Predictions, not measurements. Assumed: a100, 40 % of 312 TFLOP/s" in shown
    assert "| 2 | 8 |" in shown and "| 20 | 80 |" in shown and "time on 1 GPU | time on 2 GPUs" in shown
    few, many = found["rows"]
    assert few["denoiser_calls"] == 8 * (5 * 2 + 4) and calls(few["passes"])["denoiser_calls"] == few["denoiser_calls"]
    assert many["denoiser_calls"] == 10 * few["denoiser_calls"]
    assert few["seconds"][2] == pytest.approx(few["seconds"][1] / 2)
    flops = sum(few["passes"].get(kind, 0) * cost for kind, cost in found["flops_per_image_pass"].items())
    assert few["seconds"][1] == pytest.approx(flops / (0.4 * 312e12))
    assert few["fits"] and few["batch_size"] == few["images_per_call"] == 4
    written = json.loads((tmp_path / "deep" / "plan.json").read_text())
    assert written["rows"][0]["pflop"] == few["pflop"] and written["config"]["device"] == "a100"
    budget = found["largest_budgets"][1]
    assert found["largest_budgets"].keys() == {1, 2} and 0 < budget < found["largest_budgets"][2]


def test_the_budget_just_fits_into_the_time(plan):
    assert largest_budget(lambda budget: 3.0 * budget, 100.0) == 33
    assert largest_budget(lambda budget: 3.0 * budget, 99.0) == 33
    assert largest_budget(lambda budget: 3.0 * budget, 2.0) == 0


@pytest.mark.slow
def test_a_device_that_is_too_small(plan, capsys):
    arguments = [*TINY, "--device", "h100", "--images_per_call", "40", "--num_processes", "3"]
    small = plan.main([*arguments, "--memory_gib", "0.0017"])
    assert 0 < small["rows"][0]["batch_size"] < 40 and not small["rows"][0]["fits"]
    shown = capsys.readouterr().out
    assert f"with batch_size {small['rows'][0]['batch_size']}" in shown
    assert "only 1 groups of classes" in shown
    assert plan.main([*arguments, "--memory_gib", "1e-6"])["rows"][0]["batch_size"] == 0
    assert "| no |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plan_measured_here_for_the_config_of_a_run(plan, latent_pipe, tmp_path, capsys):
    latent_pipe.save_pretrained(tmp_path / "generator")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"generator: {tmp_path / 'generator'}\nimages_per_class: 3\nguidance_scale: 1.0\ndataset: digits\n"
        "num_inference_steps: 4\nblock_size: 2\nmax_hours: 1.0\n"
    )
    found = plan.main(["--run_config", str(config), "--dtype", "float32"])
    assert found["rows"][0]["images"] == 9 and found["rows"][0]["denoiser_calls"] == 9 * (4 + 3)
    assert found["rows"][0]["seconds"][1] > 0 and found["largest_budgets"] == {}
    assert "Measured on this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either"),
        (["--preset", "imagenet"], "imagenet1k"),
        (["--preset", "imagenet1k", "--tiny", "true", "--device", "a10"], "Did you mean 'a100'|a100"),
        (["--preset", "imagenet1k", "--dtype", "bf16"], "bfloat16"),
        (["--preset", "imagenet1k", "--tiny", "true", "--device", "a100", "--utilisation", "40"], "utilisation"),
        (["--preset", "imagenet1k", "--image_per_class", "10"], "images_per_class"),
        (["--run_config", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_bad_input_is_explained(plan, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan.main(arguments)


@pytest.mark.slow
def test_the_benchmark_of_accuracy_at_tiny_size(capsys, tmp_path):
    arguments = ["--num_classes", "2", "--images_per_class", "2", "--num_inference_steps", "3", "--block_size", "2"]
    arguments += ["--rounds", "1"]
    found = recipe("benchmarks/plan_accuracy").main([*arguments, "--out", str(tmp_path / "out.json")])
    assert found["calls_exact"] == 1 and found["predicted_over_measured"] > 0
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["settings"]["blocks"]["images"] == 12


@pytest.fixture(scope="module")
def cost():
    return recipe("benchmarks/cost")


@pytest.mark.slow
def test_the_benchmark_of_cost_at_tiny_size(cost, tmp_path):
    """All that its processes do, in this one."""
    found = {}
    for name in (*cost.METHODS, "probe"):
        options = cost.parse(["--tiny", "--rounds", "1", "--worker", name, "--out", str(tmp_path / f"{name}.json")])
        cost.work(options)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    for name in cost.METHODS:
        assert sum(found[name]["parts"].values()) == pytest.approx(found[name]["seconds"], abs=0.01)
        assert all(seconds >= 0 for seconds in found[name]["parts"].values())
    figures = cost.summarise({name: [found[name]] for name in cost.METHODS}, found["probe"], options)
    entry, plain = figures["methods"]["nopt"], figures["methods"]["plain"]
    assert plain["denoiser_calls"] == 20 and entry["denoiser_calls"] == 29 and entry["decoder_calls"] == 10
    assert plain["parts"]["lookahead"] == 0 < entry["parts"]["lookahead"] < entry["parts"]["denoiser"]
    ratio = entry["seconds_per_image"] / plain["seconds_per_image"]
    assert figures["nopt_over_plain"] == pytest.approx(ratio, abs=1e-3)
    released = figures["methods"]["quantile_extrapolated"]
    assert released["iterations_done"] * 10 == released["iterations"] == 200
    added = 9 * released["parts"]["backward_and_objective"]
    assert released["seconds_per_image"] == pytest.approx(released["measured_seconds_per_image"] + added)
    wanted = {"quantile_extrapolated_over_plain", "memory_nopt_over_plain", "nopt_over_quantile_extrapolated"}
    wanted |= {"nopt_over_plain_at_50_steps_predicted", "denoiser_fraction_of_matmul"}
    wanted |= {"default_over_field", "from_centroids_over_field", "default_over_field_flops"}
    # 16 steps with guidance and 15 look-aheads; of the other the last 11, 10 of them with one
    calls = [figures["methods"][name]["denoiser_calls"] for name in ("field", "default", "from_centroids")]
    assert calls == [100, 47, 32]
    assert 0.2 < figures["from_centroids_over_field_flops"] < figures["default_over_field_flops"]
    assert wanted <= set(figures)


@pytest.mark.slow
def test_a_method_runs_in_a_process_of_its_own(forked, cost, tmp_path, capsys):
    options = cost.parse(["--tiny", "--num_inference_steps", "2"])
    found = cost.run_worker("plain", options, tmp_path / "plain.json")
    assert found["denoiser_calls"] == 4 and found["peak_memory_gib"] > 0.05
    options.dtype = "fp8"
    with pytest.raises(RuntimeError, match="plain failed with exit status 2"):
        cost.run_worker("plain", options, tmp_path / "plain.json")
