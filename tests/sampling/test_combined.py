"""Methods combined: each part does what it does alone, sets are drawn again, resumed and divided, nonsense refused."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    Plain,
    Sampling,
    SamplingMethod,
    concentrate,
    concentrate_and_report,
    concentrate_to_folder,
    load_digits_dataset,
    load_recorded,
    save_dataset_folder,
)
from dsco_hf.concentration.concentrate import UnitSampler, divide, plan_units
from dsco_hf.concentration.config_records import how_made
from dsco_hf.concentration.records import record_parameters
from dsco_hf.concentration.set_records import record_of
from dsco_hf.costs.passes import Rehearsal, stand_in_targets
from dsco_hf.costs.tracing import pass_costs
from dsco_hf.matching.objectives import ClassifierEvidence
from dsco_hf.sampling.call import calls
from dsco_hf.sampling.flat import SamplingOptions
from dsco_hf.sampling.methods import Combined, JointTargets, Released
from dsco_hf.sampling.methods.combined import hooks_of, matching_of
from dsco_hf.sampling.peers import D3HR, D4M, DDOQ, IGD, MGD3, PEERS, S3, UAG, BestOfN, ClassStatistics
from dsco_hf.utils.origins import fingerprint, targets_sha256
from launches import launch_command, launch_environment, run


SIZES = {"block_size": 1, "images_per_call": 2}
COMBINED = {
    "d4m+nopt": D4M() + NOpt(),
    "ddoq+nopt": DDOQ(strength=0.9) + NOpt(start=0.2),
    "nopt+best-of-n": NOpt() + BestOfN(candidates=2),
    "nopt+s3": NOpt() + S3(candidates=2),
    "d4m+best-of-n": D4M() + BestOfN(candidates=2),
    "d4m+uag+nopt+s3": D4M() + UAG() + NOpt() + S3(candidates=2),
    "d3hr+best-of-n": D3HR(groups=5) + BestOfN(candidates=2),
    "uag+best-of-n": UAG() + BestOfN(candidates=2),
    "d4m+igd": D4M() + IGD(checkpoints=2, epochs=2, architecture="convnet-1"),
}


def drawn_with(method, steps=4):
    return Sampling(steps, 1.0, batch_size=3, method=method)


def pixels_of(dataset):
    return [np.asarray(image).tobytes() for image in dataset["image"]]


def generators(count, seed=7):
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def started(pipe, method, targets, labels, *, steps=10, batch_size=None):
    sampling = Sampling(steps, 1.0, batch_size=batch_size, method=method)
    return pipe.start_call(labels, targets, sampling, generator=generators(len(labels)))


def made(pipe, method, data, images=2):
    return method.make_targets(pipe, data, Sampling(4, 1.0, method=method), progress=False, images_per_class=images)


@pytest.mark.parametrize("name", COMBINED)
def test_names_records_and_order(name):
    method = COMBINED[name]
    assert SamplingMethod.of(method.as_record()) == method == SamplingMethod.of(json.dumps(method.as_record()))
    assert [part.name for part in SamplingMethod.of(name).parts] == [part.name for part in method.parts]
    assert "+".join(part.name for part in method.parts) == name
    assert Combined(method.parts[::-1]) == method and Sampling(method=method) == Sampling(method=method.as_record())
    assert fingerprint(method) == fingerprint(Combined(method.parts[::-1])) and hash(method) is not None
    assert (
        json.loads(json.dumps(Sampling(method=name).as_record()))["method"]["parts"][0]["name"] == name.split("+")[0]
    )


def test_options_of_command_lines_reach_the_part():
    found = SamplingOptions(method="d4m+nopt", objective="rkhs", step_size=0.5, contrast=2.0).sampling.method
    assert found == D4M() + NOpt(objective={"name": "rkhs", "contrast": 2.0}, step_size=0.5)
    given = SamplingOptions(method="{name: combined, parts: [{name: d4m, strength: 0.5}, nopt]}").sampling.method
    assert given == D4M(strength=0.5) + NOpt()
    with pytest.raises(ValueError, match=r"\['step_size'\] are of 'nopt', and `method` is 'd4m\+best-of-n'"):
        SamplingOptions(method="d4m+best-of-n", step_size=0.5).sampling  # noqa: B018
    assert SamplingOptions().sampling == Sampling()
    assert Sampling.of("d4m+nopt", objective="rkhs").method == D4M() + NOpt("rkhs")
    with pytest.raises(ValueError, match="`objective` is a field of 'nopt', and 'combined' has none: leave it out"):
        Sampling.of("d4m+best-of-n", objective="rkhs")


@pytest.mark.parametrize(("parts", "message"), [
    ((NOpt(), Released()), "'nopt' and 'released' both move the noise of a step, .* one each may: begin elsewhere .*"
     "d3hr, d4m, ddoq; change the prediction uag; move the noise nopt, released, .*; choose among .* best-of-n, s3"),
    ((MGD3(), NOpt()), "'mgd3' and 'nopt' both move the noise"),
    ((D4M(), D3HR()), "'d4m' and 'd3hr' both begin elsewhere"),
    ((D4M(), DDOQ()), "'d4m' and 'ddoq' both begin elsewhere"),
    ((BestOfN(), S3()), "'best-of-n' and 's3' both choose"),
    ((UAG(), NOpt(), UAG()), "'uag' and 'uag' both change the prediction"),
    ((D3HR(), NOpt()), "'d3hr' draws without noise, so there is none for 'nopt' to move: leave one"),
    ((Plain(), NOpt()), "'plain' steers nothing, so it is no part of a combination: leave it out"),
    ((D4M() + NOpt(), S3(), Released()), "'nopt' and 'released' both"),
])  # fmt: skip
def test_contradictions_name_both_and_what_is_allowed(parts, message):
    with pytest.raises(ValueError, match=message):
        Combined(parts)
    with pytest.raises(ValueError, match=message):
        SamplingMethod.of({"name": "combined", "parts": [part.as_record() for part in parts]})
    left = tuple(part for part in parts if isinstance(part, NOpt | D4M) and not isinstance(part, DDOQ)) or parts[:1]
    assert Combined(left).parts  # as it says


def test_parts_that_are_none():
    for given in ((), "d4m", 3, None):
        with pytest.raises(TypeError, match="`parts` must be a list of methods, such as"):
            Combined(given)
    with pytest.raises(ValueError, match="got 'nopd'. Nearest: 'nopt'"):
        SamplingMethod.of("d4m+nopd")
    for name in PEERS:
        assert hooks_of(PEERS[name]())


@pytest.mark.slow
@pytest.mark.parametrize("method", [NOpt(start=0.2), D4M(), DDOQ(), BestOfN(3), S3(3), UAG(), MGD3(), D3HR(groups=9)])
def test_a_method_with_nothing_is_itself(pipe, real_images, method):
    options = {"seed": 1, "progress": False, **SIZES}
    alone, report = concentrate_and_report(pipe, real_images, 2, method=drawn_with(method), **options)
    found, other = concentrate_and_report(pipe, real_images, 2, method=drawn_with(Combined((method,))), **options)
    assert pixels_of(found) == pixels_of(alone) and found.features == alone.features
    same = dataclasses.asdict(report) | {"seconds": 0, "peak_memory_bytes": 0}
    assert same == dataclasses.asdict(other) | {"seconds": 0, "peak_memory_bytes": 0}
    assert record_of(found)["targets"] == record_of(alone)["targets"]
    if method.weighs:
        assert found["weight"][:] == alone["weight"][:]
    one = pipe.sample([0, 1], made(pipe, method, real_images), seeds=[1, 2], method=drawn_with(method))
    both = pipe.sample([0, 1], made(pipe, method, real_images), seeds=[1, 2], method=drawn_with(Combined((method,))))
    assert torch.equal(one.images, both.images) and torch.equal(one.discrepancies, both.discrepancies)


def test_nopt_begins_where_d4m_does_and_lowers_its_objective(pipe, real_images):
    both, labels = D4M(strength=0.8) + NOpt(start=0.2), [0, 1, 2, 0, 1, 2]
    targets = made(pipe, both, real_images)
    assert list(targets.parts) == ["d4m", "nopt"] and targets.class_names == ["circle", "square", "triangle"]
    assert isinstance(targets.parts["d4m"], ClassStatistics) and isinstance(targets.parts["nopt"], MatchingTargets)
    call, alone = started(pipe, both, targets, labels), started(pipe, both.parts[0], targets.parts["d4m"], labels)
    for one in (call, alone):
        one.method.prepare(one)
    (latents, first), (expected, step) = (one.method.begin(one) for one in (call, alone))
    assert torch.equal(latents, expected) and first == step == 2


@pytest.mark.slow
@pytest.mark.parametrize("choice", [BestOfN(3), S3(3)])
def test_a_choice_is_what_it_alone_would_choose_of_sets_that_nopt_draws(pipe, real_images, choice):
    labels, both = [0, 1, 2, 0], NOpt(start=0.0) + choice
    targets = made(pipe, both, real_images)
    of_choice = targets.parts["s3"] if isinstance(targets, JointTargets) else targets
    of_nopt = matching_of(targets)
    call = started(pipe, both, targets, labels, batch_size=4)
    candidates = call.generator
    output = pipe.draw(call, "pt")
    sets, losses = [], []
    for number in range(3):
        seeds = [one.initial_seed() for one in candidates[4 * number : 4 * number + 4]]
        alone = pipe.sample(labels, of_nopt, seeds=seeds, method=Sampling(10, 1.0, batch_size=4, method=both.parts[0]))
        sets.append(alone.images)
        losses.append(alone.discrepancies)
    drawn = torch.cat(sets)
    judge = started(pipe, choice, of_choice, labels, batch_size=4)
    choice.prepare(judge)
    with torch.no_grad():
        chosen = choice.choose(judge, drawn, 2 * drawn - 1)
    assert torch.equal(output.images, drawn[chosen]) and len(set((chosen // 4).tolist())) > 1
    torch.testing.assert_close(output.discrepancies, torch.stack(losses).mean(dim=0))


@pytest.mark.slow
def test_weights_go_along_with_the_images_that_are_chosen(pipe, real_images):
    both, labels = DDOQ() + NOpt() + BestOfN(3), [0, 0, 1, 1]
    targets = made(pipe, both, real_images)
    call = started(pipe, both, targets, labels)
    output = pipe.draw(call, "pt")
    shares = 2 * targets.parts["ddoq"].tensors["shares"]
    assert both.weights(call).tolist() == pytest.approx(shares[:2].flatten().tolist() * 3)
    assert len(output.weights) == 4

    class Last(BestOfN):
        name = "test:last"

        def choose(self, call, latents, pixels):
            return torch.tensor([9, 9, 10, 7])  # places 1, 1, 0 and 1 of their classes

    output = pipe.sample(labels, targets, seeds=[1, 2, 3, 4], method=DDOQ() + NOpt() + Last(3))
    assert output.weights == pytest.approx([float(shares[at]) for at in ((0, 1), (0, 1), (1, 0), (1, 1))])
    assert (both.weighs, both.by_budget, both.memory, both.second_moment) == (True, True, "images", True)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_a_combination_is_drawn_resumed_divided_counted_and_drawn_again(pipe, real_images, tmp_path, name):
    method, options = COMBINED[name], {**SIZES, "seed": 3, "progress": False}
    small, report = concentrate_and_report(pipe, real_images, 2, method=drawn_with(method), **options)
    run = concentrate_to_folder(pipe, real_images, 2, tmp_path, method=drawn_with(method), **options)
    sorted((tmp_path / "units").glob("*.json"))[-1].unlink()
    again = concentrate_to_folder(pipe, real_images, 2, tmp_path, method=drawn_with(method), **options)
    assert again.session["images"] < run.session["images"] == 6
    assert pixels_of(run.dataset()) == pixels_of(again.dataset()) == pixels_of(small)
    assert again.dataset().features == small.features and ("weight" in small.features) == name.startswith("ddoq")
    counted = calls(sum((passes for _, passes in Rehearsal(pipe, drawn_with(method)).run(3, 2, **SIZES)), Counter()))
    assert counted == {kind: getattr(report, kind) for kind in counted}
    record = record_of(small)
    assert record["method"] == name and record_parameters(record)["method"] == drawn_with(method)
    assert pixels_of(concentrate(pipe, real_images, seed=3, progress=False, **record_parameters(record))) == pixels_of(
        small
    )
    targets = drawn_with(method).make_targets(pipe, real_images, seed=3, progress=False, images_per_class=2)
    targets.save_pretrained(tmp_path / "kept")
    kept = method.targets_class.from_pretrained(tmp_path / "kept")
    assert targets_sha256(kept) == targets_sha256(targets)
    units, found = plan_units(3, 2, **SIZES), {}
    for share in divide(units, 2):  # as two processes would
        sampler = UnitSampler(pipe, kept, drawn_with(method), seed=3)
        for unit in [unit for unit in units if unit.group in share]:
            rows, pixels, _ = sampler.draw(unit)
            sampler.add(unit, pixels)
            found |= {(row["label"], unit.block): np.asarray(row["image"]).tobytes() for row in rows}
    assert [found[key] for key in sorted(found)] == pixels_of(small)


@pytest.mark.slow
def test_the_record_tells_both_targets_and_what_was_done(pipe, real_images, tmp_path):
    small = concentrate(pipe, real_images, 1, method=drawn_with("d4m+nopt"), progress=False)
    record = record_of(small)
    told = record["targets"]
    assert told["kind"] == "JointTargets" and list(told["parts"]) == ["d4m", "nopt"]
    assert told["parts"]["d4m"]["statistics"] == "centroids" and len(told["parts"]["nopt"]["sha256"]) == 64
    assert record["source"]["rows"] == 21
    text = how_made({"default": record})
    assert "from noised centroids" in text and "noise of a frozen" in text
    chosen = how_made({"default": record_of(
        concentrate(pipe, real_images, 1, method=drawn_with("nopt+best-of-n", 2), progress=False))})  # fmt: skip
    assert "several samples of" in chosen and "plain" not in chosen
    save_dataset_folder(small, tmp_path / "set")
    assert "d4m+nopt" in (tmp_path / "set" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_with_targets_of_one_part_it_is_made_again_from_what_is_published(pipe, real_images, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    method = drawn_with(NOpt(start=0) + BestOfN(2))
    targets = method.make_targets(pipe, real_images, progress=False)
    assert isinstance(targets, MatchingTargets)  # the classifier's choice looks at none
    small = concentrate(pipe, targets, 2, method=method, seed=3, progress=False)
    assert record_of(small)["method"] == "nopt+best-of-n"
    save_dataset_folder(small, tmp_path / "set", targets=targets)
    again, kept, record = load_recorded(tmp_path / "set")
    again.set_progress_bar_config(disable=True)
    found = concentrate(again, kept, seed=3, progress=False, **record_parameters(record))
    assert pixels_of(found) == pixels_of(small)


@pytest.mark.slow
def test_it_is_data_free_where_all_parts_are(pipe):
    names = ["circle", "square", "triangle"]
    method = NOpt(start=0) + BestOfN(2)
    small = concentrate(pipe, names, 1, method=Sampling(2, 1.0, method=method), progress=False)
    assert record_of(small)["method"] == "nopt-data-free+best-of-n"
    assert len(concentrate(pipe, names, 1, method=Sampling(2, 1.0, method="uag+best-of-n"), progress=False)) == 3
    evidence = Sampling(2, 1.0, method=NOpt(ClassifierEvidence()) + BestOfN(2))
    assert len(concentrate(pipe, None, 1, method=evidence, progress=False)) == 3
    for name in ("d4m+nopt", "nopt+s3"):
        with pytest.raises(ValueError, match="reads real images, and .*names classes only: pass a dataset"):
            concentrate(pipe, names, 1, method=name, progress=False)


@pytest.mark.slow
def test_what_is_missing_is_told_as_by_the_parts(pipe, real_images, targets, make, caplog):
    with pytest.raises(ValueError, match="method='d4m' takes real images: pass a dataset"):
        concentrate(pipe, None, 1, method="d4m+nopt", progress=False)
    with pytest.raises(ValueError, match="method='best-of-n' asks a classifier, and the pipeline has none: pass `cl"):
        concentrate(make.pipe(), real_images, 1, method="d4m+best-of-n", progress=False)
    with pytest.raises(ValueError, match=r"\['d4m', 'nopt'\] each take targets of their own, got MatchingTargets: pa"):
        concentrate(pipe, targets, 1, method="d4m+nopt", progress=False)
    assert len(concentrate(pipe, real_images, 1, method=drawn_with("d4m+nopt", 2), progress=False)) == 3
    small = concentrate(pipe, None, 1, method=drawn_with("nopt+best-of-n", 2), progress=False)
    assert record_of(small)["method"] == "best-of-n" and "'best-of-n' is what is drawn" in caplog.text
    parts = made(pipe, D4M() + NOpt(), real_images).parts
    parts["d4m"].class_labels = [2, 1, 0]
    with pytest.raises(ValueError, match="of 'd4m' and 'nopt' are of different classes, .*: make both of one datas"):
        JointTargets(parts)
    assert (D4M() + NOpt()).without_targets() == D4M() and (NOpt() + UAG() + BestOfN()).without_targets() == (
        UAG() + BestOfN()
    )


@pytest.mark.slow
def test_costs_know_a_network_of_a_part_and_targets_of_all(pipe):
    method = D4M() + IGD(checkpoints=2, epochs=1, architecture="convnet-1")
    assert "surrogate_backward" in pass_costs(pipe, method=method)
    joint = stand_in_targets(pipe, D4M() + NOpt() + S3())
    assert list(joint.parts) == ["d4m", "nopt", "s3"] and joint.to("cpu").parts["nopt"].second_moment is not None
    passes = Rehearsal(pipe, Sampling(10, 1.0, method=D4M(strength=0.5) + NOpt() + BestOfN(3))).passes(2, classes=2)
    plain = Rehearsal(pipe, Sampling(10, 1.0, method=D4M(strength=0.5) + NOpt())).passes(2, classes=2)
    assert passes["denoiser"] == 3 * plain["denoiser"] and passes["classifier"] == 6
    both, alone = (Rehearsal(pipe, Sampling(6, 1.0, method=one)) for one in (D4M(1.0) + Released(30), Released(30)))
    assert both.passes(2) == alone.passes(2) and alone.passes(2)["extractor_backward"] == 5 * 30 * 2
    repeated = D4M() + NOpt(iterations=3)
    assert repeated.iterations == 3 and repeated.with_iterations(2) == D4M() + NOpt(iterations=2)


@pytest.fixture(scope="module")
def digits():
    pipe = DsCoPipeline.from_pretrained("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe, load_digits_dataset()["train"]


@pytest.mark.slow
def test_on_digits_nopt_from_d4m_lowers_its_objective_below_that_of_d4m(digits):
    pipe, data = digits
    method = Sampling(20, 1.0, method="d4m+nopt")
    targets = method.make_targets(pipe, data, progress=False, images_per_class=2)
    seeds, labels = range(20), [*range(10)] * 2

    def error(images):
        bound = method.method.parts[1].objective.bind(pipe, targets.parts["nopt"], labels)
        with torch.no_grad():
            return bound(bound.source.of_pixels(2 * images - 1)).sum().item()

    both = pipe.sample(labels, targets, seeds=seeds, method=method)
    alone = pipe.sample(labels, targets.parts["d4m"], seeds=seeds, method=Sampling(20, 1.0, method="d4m"))
    assert error(both.images) < 0.9 * error(alone.images)
    assert len(both.discrepancies) == 13 and both.discrepancies[-1].sum() < both.discrepancies[0].sum()


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_and_a_killed_run_goes_on(tmp_path):
    config = (
        "generator: digits\ndataset: digits\nmethod: d4m+nopt\nimages_per_class: 2\nblock_size: 1\n"
        "images_per_call: 5\nnum_inference_steps: 5\nguidance_scale: 1.0\nobjective: rkhs\ncheck_images: 0\n"
    )
    (tmp_path / "run.yaml").write_text(config)

    def launch(folder, processes, *options):
        words = launch_command(
            "concentrate", "--config", "run.yaml", "--output_dir", folder, *options, processes=processes
        )
        done = run(words, cwd=tmp_path, env=launch_environment())
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads((tmp_path / folder / "dataset" / "concentration.json").read_text())

    two, one = launch("two", 2), launch("one", 1)
    assert two["synthetic"] == one["synthetic"] and one["method"] == "d4m+nopt"
    assert one["parameters"]["method"]["parts"][1]["objective"]["name"] == "rkhs"
    assert (tmp_path / "one" / "targets" / "d4m").is_dir()
    for lost in sorted((tmp_path / "two" / "run" / "units").glob("*.json"))[1:]:
        lost.unlink()
    assert launch("two", 2)["synthetic"] == one["synthetic"]
