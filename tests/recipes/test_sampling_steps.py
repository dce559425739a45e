"""The benchmark of sampling steps, small."""

import json

import pytest

from recipes.benchmarks import sampling_steps


@pytest.mark.slow
def test_rows_tell_calls_and_accuracies(tmp_path, capsys):
    given = ["--variants", "nopt:3:0.6", "nopt:3", "d4m+nopt:3", "plain:2", "--images_per_class", "2", "--steps", "2"]
    given += ["--networks", "convnet-3", "vit", "--training_seeds", "1", "--processes", "1", "--guidance_scale", "2"]
    found = sampling_steps.main([*given, "--out", str(tmp_path / "out.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads((tmp_path / "out.json").read_text())
    calls = {row["variant"]: row["denoiser_calls"] for row in found["rows"]}
    # two branches a step, and a look-ahead in those that are optimised; never in the last
    assert calls == {"nopt:3:0.6": 7, "nopt:3": 8, "d4m+nopt:3": 5, "plain:2": 4}
    assert found["rows"][0]["of_field"] == 0.07 and found["held_out_images"] == 144
    for row in found["rows"]:
        assert [len(one) for one in row["vit"]["accuracies"]] == [1, 1]
        assert 0 <= row["convnet-3"]["mean"] <= 100 and row["convnet-3"]["std"] >= 0


def test_a_variant_names_method_steps_and_start():
    options = sampling_steps.read_options(["--guidance_scale", "3"])
    late, joined = (sampling_steps.sampling_of(text, options) for text in ("nopt:50:0.6", "d4m+nopt:16"))
    assert (late.num_inference_steps, late.guidance_scale, late.method.start) == (50, 3.0, 0.6)
    assert [part.name for part in joined.method.parts] == ["d4m", "nopt"] and joined.method.parts[1].start == 0
