"""Text-to-image pipelines of diffusers as pipelines of classes: images, NOpt, folders, runs, records."""

import dataclasses
import itertools
import json

import pytest
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler
from safetensors.torch import load_file

import texts
from dsco_hf import (
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    Sampling,
    concentrate,
    concentrate_to_folder,
    load_recorded,
    save_dataset_folder,
)
from dsco_hf.concentration.records import record_parameters
from dsco_hf.generators.steps import is_flow
from launches import launch_command, launch_environment, run


DRAWN = {"num_inference_steps": 4, "guidance_scale": 3.0}
NEGATIVE = "bad"
PIXART = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
SD3 = ("sd3", "sd3-clips")


def hosted(host, **options):
    pipe = DsCoPipeline.from_pipe(host, **{"class_names": texts.CLASSES, "prompts": "a {}", **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def host_images(host, prompts, latents, generators, **options):
    if not is_flow(host.scheduler):
        host.scheduler = DDIMScheduler.from_config(host.scheduler.config, clip_sample=False)
    negative = [NEGATIVE] * len(prompts)
    return host(
        prompts, negative_prompt=negative, latents=latents, generator=generators, output_type="pt", **DRAWN, **options
    ).images


def kill_after_one_block(monkeypatch, *args, **options):
    draw, left = DsCoPipeline.draw, [1]

    def killed(self, *args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return draw(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DsCoPipeline, "draw", killed)
        with pytest.raises(KeyboardInterrupt):
            concentrate_to_folder(*args, **options)


@pytest.fixture(params=["sd1", "sd3"])
def pipe(tmp_path, make, request):
    classifier = make.convnet(names=texts.CLASSES, channels=3)
    return hosted(texts.host_of(request.param, tmp_path / "host"), classifier=classifier)


@pytest.fixture
def targets(pipe, make):
    images = make.images((4, 4, 4), names=texts.CLASSES)
    return MatchingTargets.from_dataset(images, pipe, embedding_dim=64, progress=False)


def pixels(dataset):
    return [image.tobytes() for image in dataset["image"]]


@pytest.mark.parametrize(
    ("kind", "eta"),
    [*itertools.product(["sd1", "sd2", "zero", "xl", *PIXART], [0.0, 1.0]), *((kind, 0.0) for kind in SD3)],
)
def test_plain_samples_are_the_hosts_own_images(tmp_path, make, kind, eta):
    host = texts.host_of(kind, tmp_path)
    pipe = hosted(host, negative_prompt=NEGATIVE)
    latents = torch.randn(3, *pipe.latent_shape, generator=torch.Generator().manual_seed(1))
    own = pipe([0, 2, 2], latents=latents, generator=make.generators([1, 2, 3]), eta=eta, output_type="pt", **DRAWN)
    rescale = {"guidance_rescale": 0.7} if kind == "zero" else {}
    if kind in PIXART:
        rescale = {"clean_caption": False, "use_resolution_binning": False}
    noise = {} if kind in SD3 else {"eta": eta}
    prompts = ["a rose", "a daisy", "a daisy"]
    other = host_images(host, prompts, latents.clone(), make.generators([1, 2, 3]), **noise, **rescale)
    torch.testing.assert_close(own.images, other, rtol=0, atol=1e-4)
    assert (own.images[0] - own.images[1]).abs().max() > 0.01
    assert (pipe.num_classes, pipe.null_class, pipe.image_size, pipe.num_channels) == (3, 3, 8, 3)


@pytest.mark.slow
def test_pixart_of_1024_pixels_is_told_its_size(tmp_path, make):
    host = texts.pixart(sample_size=128, patch_size=16)
    assert host.transformer.use_additional_conditions
    pipe, latents = hosted(host, negative_prompt=NEGATIVE), torch.randn(1, 4, 128, 128)
    assert pipe.prompts.resolution.tolist() == [[256, 256]] * 4
    own = pipe([1], latents=latents, generator=make.generators([1]), output_type="pt", eta=0.0, **DRAWN).images
    options = {"clean_caption": False, "use_resolution_binning": False}
    other = host_images(host, ["a tulip"], latents.clone(), None, **options)
    torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


def test_other_prompts_and_no_rescaling_give_other_images(tmp_path, make):
    host = texts.stable_diffusion(tmp_path, "zero")
    drawn = [
        hosted(host, **options)([0], generator=make.generators([1]), output_type="pt", **DRAWN).images
        for options in ({}, {"prompts": "no {}"}, {"negative_prompt": NEGATIVE}, {"guidance_rescale": 0.0})
    ]
    assert all((drawn[0] - other).abs().max() > 1e-4 for other in drawn[1:])


@pytest.mark.parametrize("method", [NOpt("rkhs"), NOpt("ridge")])
def test_noise_optimisation_lowers_the_objective(pipe, targets, method):
    method = dataclasses.replace(method, start=0.0, iterations=4, step_size=0.02, step_decay=1.0)
    output = pipe.sample([0, 0, 1, 2], targets, seeds=range(4), method=method, **DRAWN)
    assert output.discrepancies.shape[0] == 4 * 3 and output.images.isfinite().all()
    means = output.discrepancies.mean(dim=1)
    assert (means[3::4] < means[::4]).all()  # within each sampling step
    plain = pipe.sample([0, 0, 1, 2], None, seeds=range(4), **DRAWN)
    assert output.denoiser_calls > plain.denoiser_calls and not torch.equal(plain.images, output.images)


def test_the_seed_of_an_image_picks_its_template(tmp_path, make):
    host = texts.stable_diffusion(tmp_path)
    pipe = hosted(host, prompts=["a {}", "my {}", "the {}"])
    family, seeds = pipe.family, list(range(40))
    rows = family.conditions([1] * 40, seeds)
    assert rows == family.conditions([1] * 40, seeds) and set(rows) == {1, 5, 8}
    assert pipe.prompts.as_record()["texts"][1] == ["a tulip", "my tulip", "the tulip"]
    latents = torch.randn(40, 4, 4, 4)
    pick = rows.index(5)
    own = pipe([1], latents=latents[:1], generator=make.generators([pick]), eta=0, output_type="pt", **DRAWN).images
    alone = hosted(host, prompts="my {}")
    other = alone([1], latents=latents[:1], generator=make.generators([pick]), eta=0, output_type="pt", **DRAWN).images
    torch.testing.assert_close(own, other, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("sd1", {"encoder_hidden_states": (4, 16, 8)}),
        ("PixArtAlphaPipeline", {"encoder_hidden_states": (4, 120, 8), "encoder_attention_mask": (4, 120)}),
        ("PixArtSigmaPipeline", {"encoder_hidden_states": (4, 300, 8), "encoder_attention_mask": (4, 300)}),
        ("xl", {"encoder_hidden_states": (4, 16, 16), "text_embeds": (4, 8), "time_ids": (4, 6)}),
        *((kind, {"encoder_hidden_states": (4, 272, 24), "pooled_projections": (4, 16)}) for kind in SD3),
    ],
)
def test_it_is_saved_and_loaded_without_its_text_encoders(tmp_path, make, kind, rows):
    host = texts.host_of(kind, tmp_path / "host")
    drawn = {"generator": None, "output_type": "pt", **DRAWN}
    kept, dropped = hosted(host), hosted(host, drop_text_encoders=True)
    images = kept([0, 1], **drawn | {"generator": make.generators([1, 2])}).images
    for name, pipe in {"kept": kept, "dropped": dropped}.items():
        pipe.save_pretrained(tmp_path / name)
        loaded = DsCoPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(images, loaded([0, 1], **drawn | {"generator": make.generators([1, 2])}).images)
        assert (loaded.text_encoder is None) == (name == "dropped")
        assert loaded.id2label == dict(enumerate(texts.CLASSES))
    stored = load_file(tmp_path / "dropped" / "prompts" / "diffusion_pytorch_model.safetensors")
    assert {key: tuple(value.shape) for key, value in stored.items()} == rows
    bare = DsCoPipeline.from_pretrained(tmp_path / "kept", drop_text_encoders=True)
    assert bare.text_encoder is None and bare.prompts.config.texts == kept.prompts.config.texts
    again = DsCoPipeline.from_pretrained(tmp_path / "kept", prompts="the {}")
    assert again.prompts.config.texts == [["the rose"], ["the tulip"], ["the daisy"]]
    assert again.prompts.config.shapes == kept.prompts.config.shapes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "xl", "sd3"])
def test_adapters_draw_what_the_host_draws_and_are_saved_once_they_are_fused(tmp_path, make, kind):
    host = texts.host_of(kind, tmp_path / "host")
    classifier = make.convnet(names=texts.CLASSES, channels=3)
    pipe = hosted(host, negative_prompt=NEGATIVE, classifier=classifier)
    latents = torch.randn(1, *pipe.latent_shape, generator=torch.Generator().manual_seed(1))

    def drawn(pipe):
        return pipe([0], latents=latents, generator=make.generators([1]), eta=0.0, output_type="pt", **DRAWN).images

    before = drawn(pipe)
    texts.load_lora(host, tmp_path / "lora")
    images = drawn(pipe)
    assert (images - before).abs().max() > 1e-3
    other = host_images(host, ["a rose"], latents.clone(), make.generators([1]))
    torch.testing.assert_close(images, other, rtol=0, atol=1e-4)
    targets = MatchingTargets.from_dataset(
        make.images((4, 4, 4), names=texts.CLASSES), pipe, embedding_dim=64, progress=False
    )
    found = pipe.sample([0, 1], targets, seeds=[1, 2], method=NOpt("rkhs", start=0.0), **DRAWN)
    assert found.discrepancies.isfinite().all()
    assert not torch.equal(found.images, pipe.sample([0, 1], seeds=[1, 2], **DRAWN).images)
    told = r"has the adapters \['default_0'\] .* call `pipe.fuse_lora\(\)` and then `pipe.unload_lora_weights\(\)`"
    with pytest.raises(ValueError, match=told):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=told):
        pipe.family.adapt(3)
    host.fuse_lora()
    host.unload_lora_weights()
    adapted, fused = pipe.family.adapt(3).state_dict(), pipe.denoiser.state_dict()
    assert set(adapted) == set(fused) and all(torch.equal(adapted[name], value) for name, value in fused.items())
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DsCoPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(loaded), drawn(pipe))
    torch.testing.assert_close(drawn(loaded), images, rtol=0, atol=1e-4)
    small = concentrate(loaded, None, 1, seed=3, class_labels=[0, 1, 2], method="plain", progress=False, **DRAWN)
    save_dataset_folder(small, tmp_path / "set")
    again, nothing, record = load_recorded(tmp_path / "set")
    again.set_progress_bar_config(disable=True)
    made = concentrate(again, nothing, seed=3, **record_parameters(record), progress=False)
    assert pixels(made) == pixels(small)


@pytest.mark.slow
def test_images_are_brought_to_a_smaller_size(tmp_path, make):
    texts.stable_diffusion(tmp_path / "host").save_pretrained(tmp_path / "saved")
    given = {"class_names": texts.CLASSES}
    large = DsCoPipeline.from_pretrained(tmp_path / "saved", **given)
    small = DsCoPipeline.from_pretrained(tmp_path / "saved", image_size=4, **given)
    for pipe in (large, small):
        pipe.set_progress_bar_config(disable=True)
    drawn = {"seeds": [1, 2], **DRAWN}
    with torch.no_grad():
        images = large.decode_latents(large.sample([0, 1], output_type="latent", **drawn).images)
    expected = torch.nn.functional.interpolate(images, (4, 4), mode="bicubic", antialias=True)
    found = small.sample([0, 1], **drawn).images
    torch.testing.assert_close(found, ((expected + 1) / 2).clamp(0, 1), atol=1e-6, rtol=0)
    assert (small.image_size, small.drawn_size, large.image_size) == (4, 8, 8)
    assert small.encode_pixels(torch.zeros(1, 3, 4, 4)).shape == (1, 4, 4, 4)
    data = concentrate(small, None, 1, seed=3, class_labels=[0, 1, 2], method="plain", progress=False, **DRAWN)
    assert {image.size for image in data["image"]} == {(4, 4)}
    save_dataset_folder(data, tmp_path / "set")
    small.save_pretrained(tmp_path / "small")
    for other in (load_recorded(tmp_path / "set")[0], DsCoPipeline.from_pipe(small)):
        assert other.image_size == 4
    again = DsCoPipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again.sample([0, 1], **drawn).images, found)


def test_targets_and_noise_see_images_of_the_smaller_size(tmp_path, make):
    seen, classifier = set(), make.convnet(names=texts.CLASSES, channels=3)
    pipe = hosted(texts.stable_diffusion(tmp_path), image_size=4, classifier=classifier)
    images = make.images((4, 4, 4), names=texts.CLASSES)
    targets = MatchingTargets.from_dataset(images, pipe, embedding_dim=32, progress=False)
    call = pipe.start_call([0, 1], targets, Sampling.of(NOpt("rkhs", start=0.0), **DRAWN))
    decode = call.decode
    call.decode = lambda *args, **kwargs: seen.add(tuple((out := decode(*args, **kwargs)).shape)) or out
    assert pipe.draw(call, "pt").images.shape == (2, 3, 4, 4) and seen == {(2, 3, 4, 4)}


def test_the_order_of_many_classes_is_kept(tmp_path):
    names = [chr(ord("z") - i) for i in range(12)]
    pipe = hosted(texts.stable_diffusion(tmp_path / "host"), class_names=dict(enumerate(names)))
    pipe.save_pretrained(tmp_path / "saved")
    loaded = DsCoPipeline.from_pretrained(tmp_path / "saved")
    first = loaded.prompts.encoder_hidden_states.clone()
    assert loaded.prompts.config.class_names == names and torch.equal(first, pipe.prompts.encoder_hidden_states)
    loaded.encode_prompts("a {}")
    assert loaded.prompts.config.class_names == names and torch.equal(first, loaded.prompts.encoder_hidden_states)


def test_without_a_negative_prompt_sdxl_is_led_away_from_nothing_at_all(tmp_path, make):
    host = texts.stable_diffusion_xl(tmp_path)
    assert host.config.force_zeros_for_empty_prompt
    pipe = hosted(host)
    assert not pipe.prompts.encoder_hidden_states[3].any() and not pipe.prompts.text_embeds[3].any()
    assert pipe.prompts.time_ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 4


def test_stable_diffusion_3_is_loaded_without_t5_and_refused_with_half_of_it(tmp_path, make):
    host = texts.host_of("sd3", tmp_path / "host")
    host.save_pretrained(tmp_path / "saved")
    given = {"class_names": texts.CLASSES, "prompts": "a {}"}
    without = DsCoPipeline.from_pretrained(tmp_path / "saved", text_encoder_3=None, tokenizer_3=None, **given)
    half = DsCoPipeline.from_pretrained(tmp_path / "saved", text_encoder_3=None, **given)
    for pipe in (without, half):
        assert pipe.text_encoder_3 is None and not pipe.prompts.encoder_hidden_states[:, 16:].any()
        assert torch.equal(pipe.prompts.encoder_hidden_states, without.prompts.encoder_hidden_states)
    host.register_modules(text_encoder=None, tokenizer_3=None)
    with pytest.raises(ValueError, match="cannot be encoded without `text_encoder` and `tokenizer_3`: they were drop"):
        hosted(host)


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_a_vae_that_overflows_in_float16_stays_in_float32(tmp_path, kind):
    host = texts.host_of(kind, tmp_path)
    with torch.no_grad():
        host.vae.decoder.conv_in.weight *= 1e4
    host.unet.half(), host.vae.half()
    latents = torch.full((1, 4, 4, 4), 50.0)
    for pipe in (hosted(host), hosted(host).to(torch.float32).to(torch.float16)):
        assert pipe.unet.dtype == torch.float16
        assert pipe.vae.dtype == (torch.float32 if kind == "xl" else torch.float16)
        assert bool(pipe.decode_latents(latents).isfinite().all()) == (kind == "xl")
        host.unet.half(), host.vae.half()
    assert host.vae.dtype == torch.float16 and hosted(host).to(torch.bfloat16).vae.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", PIXART[0], *SD3])
def test_the_hosts_folder_its_components_and_the_pipeline_itself_give_the_same(tmp_path, make, kind):
    host = texts.host_of(kind, tmp_path / "host")
    host.save_pretrained(tmp_path / "saved")
    given = {"class_names": texts.CLASSES, "prompts": "a {}"}
    drawn = []
    for pipe in (
        hosted(host),
        DsCoPipeline.from_pretrained(tmp_path / "saved", **given),
        DsCoPipeline(**host.components, **given),
        DsCoPipeline.from_pipe(host, dataset=make.images((1, 1, 1), names=texts.CLASSES), prompts="a {}"),
        DsCoPipeline.from_pipe(hosted(host)),
    ):
        pipe.set_progress_bar_config(disable=True)
        drawn.append(pipe([0, 1], generator=make.generators([1, 2]), output_type="pt", **DRAWN).images)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_record_makes_the_set_again(tmp_path, pipe, targets, make, monkeypatch):
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    options = {**DRAWN, "block_size": 1, "progress": False}
    small = concentrate(pipe, targets, 2, seed=3, **options)
    kill_after_one_block(monkeypatch, pipe, targets, 2, tmp_path / "run", seed=3, **options)
    run = concentrate_to_folder(pipe, targets, 2, tmp_path / "run", seed=3, **options)
    assert pixels(run.dataset()) == pixels(small)
    save_dataset_folder(small, tmp_path / "set", targets=targets)
    again, found, record = load_recorded(tmp_path / "set")
    again.set_progress_bar_config(disable=True)
    assert record["prompts"]["class_names"] == list(texts.CLASSES)
    assert record["prompts"]["texts"] == [f"a {name}" for name in texts.CLASSES]
    assert pixels(concentrate(again, found, seed=3, **record_parameters(record), progress=False)) == pixels(small)
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "a tulip" in card


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "xl", "sd3"])
def test_offloaded_text_encoders_change_no_image(tmp_path, make, kind):
    """accelerate's own hooks, with the CPU as the device that models are moved to."""
    pipe = hosted(texts.host_of(kind, tmp_path / "host"))
    drawn = {"output_type": "pt", **DRAWN}
    images = pipe([0, 2], generator=make.generators([1, 2]), **drawn).images
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.text_encoder, "_hf_hook") and hasattr(pipe.denoiser, "_hf_hook")
    assert not hasattr(pipe.prompts, "_hf_hook")  # small, and asked in every step
    for _ in range(2):  # the hooks are set again after each call
        assert torch.equal(pipe([0, 2], generator=make.generators([1, 2]), **drawn).images, images)


@pytest.mark.slow
def test_a_run_goes_on_after_its_text_encoders_were_dropped(tmp_path, pipe, targets, monkeypatch):
    pipe.save_pretrained(tmp_path / "pipe")
    kept, bare = (DsCoPipeline.from_pretrained(tmp_path / "pipe", drop_text_encoders=drop) for drop in (False, True))
    options = {**DRAWN, "block_size": 1, "progress": False}
    small = concentrate(kept, targets, 2, seed=3, **options)
    kill_after_one_block(monkeypatch, kept, targets, 2, tmp_path / "run", seed=3, **options)
    run = concentrate_to_folder(bare, targets, 2, tmp_path / "run", seed=3, **options)
    assert pixels(run.dataset()) == pixels(small)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd3-clips"])
def test_a_set_drawn_with_the_hosts_own_folder_is_made_again(tmp_path, make, kind):
    texts.host_of(kind, tmp_path / "host").save_pretrained(tmp_path / "saved")
    given = {
        "class_names": ["<b>rose</b>", "tulip|x", "daisy"],
        "prompts": ["a {}", "my {}"],
        "negative_prompt": "bad",
    }
    pipe = DsCoPipeline.from_pretrained(tmp_path / "saved", **given)
    pipe.set_progress_bar_config(disable=True)
    small = concentrate(pipe, None, 3, seed=3, class_labels=[0, 1, 2], method="plain", progress=False, **DRAWN)
    save_dataset_folder(small, tmp_path / "set")
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    body = card.split("---", 2)[2]
    assert "<b>" not in body and "tulip|x" not in body and "my daisy" in body
    told = json.loads((tmp_path / "set" / "concentration.json").read_text(encoding="utf-8"))
    assert "<b>rose</b>" in json.dumps(told)
    again, found, record = load_recorded(tmp_path / "set")
    again.set_progress_bar_config(disable=True)
    made = concentrate(again, found, seed=3, **record_parameters(record), progress=False)
    assert pixels(made) == pixels(small)


CONFIG = """
generator: pipe
targets: targets
images_per_class: 4
block_size: 2
images_per_call: 2
num_inference_steps: 4
guidance_scale: 3.0
seed: 3
output_dir: out
"""


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(tmp_path, targets, pipe):
    pipe.save_pretrained(tmp_path / "pipe")
    targets.save_pretrained(tmp_path / "targets")
    (tmp_path / "run.yaml").write_text(CONFIG, encoding="utf-8")
    command = launch_command("concentrate", "--config", "run.yaml", processes=2)
    done = run(command, cwd=tmp_path, env=launch_environment())
    assert done.returncode == 0, done.stderr
    logs = list((tmp_path / "out" / "run" / "log").iterdir())
    assert len(logs) == 2 and all('"unit"' in log.read_text(encoding="utf-8") for log in logs)
    alone = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    alone.set_progress_bar_config(disable=True)
    # from the same files: tensors that were just made lie otherwise in memory, which shows in the last bits of sums
    read = MatchingTargets.from_pretrained(tmp_path / "targets")
    small = concentrate(alone, read, 4, seed=3, block_size=2, images_per_call=2, progress=False, **DRAWN)
    rows = load_dataset(str(tmp_path / "out" / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    assert pixels(rows) == pixels(small)
