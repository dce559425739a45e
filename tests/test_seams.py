"""The seams: an object that is defined here, outside of the package, does all that a built-in does."""

import ast
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

import dsco_hf
from dsco_hf import (
    Denoiser,
    DsCoPipeline,
    MatchingTargets,
    NOpt,
    Objective,
    Sampling,
    SamplingMethod,
    Selection,
    concentrate,
    concentrate_to_folder,
    dope,
    load_recorded,
    recorded_doping,
    register_denoiser,
    save_dataset_folder,
    select,
)
from dsco_hf.concentration.records import config_record, record_parameters
from dsco_hf.costs.passes import Rehearsal
from dsco_hf.costs.tracing import pass_costs
from dsco_hf.generators.base import FAMILIES, denoiser_of
from dsco_hf.generators.denoisers import GeneratorTrainingConfig
from dsco_hf.generators.training import train_generator
from dsco_hf.matching.objectives import class_means
from dsco_hf.sampling.call import calls


# Denoiser


class TinyNet(ModelMixin, ConfigMixin):
    """A network that is called in a way of its own, and says what it predicts and a variance."""

    @register_to_config
    def __init__(self, in_channels: int = 1, sample_size: int = 8, labels: int = 4, width: int = 4) -> None:
        super().__init__()
        self.inward = nn.Conv2d(in_channels, width, 3, padding=1)
        self.table = nn.Embedding(labels, width)
        self.level = nn.Linear(1, width)
        self.outward = nn.Conv2d(width, 2 * in_channels, 3, padding=1)

    def forward(self, noisy, *, label, level):
        shift = self.table(label) + self.level(level[:, None] / 1000)
        return self.outward(torch.nn.functional.silu(self.inward(noisy) + shift[:, :, None, None]))


@register_denoiser
class Tiny(Denoiser):
    """A family from outside."""

    name = "tiny"
    kinds = (TinyNet,)
    classes_field = "labels"
    counts_null = True
    any_size = True

    def forward(self, x, timesteps, classes):
        return self.network(x, label=classes, level=timesteps.to(x.dtype))[:, : x.shape[1]]

    @classmethod
    def build(cls, config, *, num_classes, sample_size, num_channels):
        return TinyNet(in_channels=num_channels, sample_size=sample_size, labels=num_classes + 1, width=config.width)

    def class_tables(self):
        yield "table", self.network.table


@dataclasses.dataclass(frozen=True)
class TinyConfig(GeneratorTrainingConfig):
    width: int = 4


DRAWN = {"num_inference_steps": 4, "guidance_scale": 2.0}
CLASSES = ("circle", "square", "triangle")


@pytest.fixture
def tiny(make):
    torch.manual_seed(0)
    pipe = DsCoPipeline(
        TinyNet().eval(), DDIMScheduler(), classifier=make.convnet(), id2label=dict(enumerate(CLASSES))
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_denoiser_of_ones_own_predicts_with_guidance_in_one_call(tiny):
    seen = []
    tiny.denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor(500), torch.tensor([0, 2])
    found = tiny.predict_noise(x, t, y, 3.0)
    assert seen == [4] and found.shape == x.shape
    with torch.no_grad():
        own, null = (
            tiny.denoiser(x, label=labels, level=t.expand(2).float())[:, :1] for labels in (y, torch.full((2,), 3))
        )
    torch.testing.assert_close(found, null + 3.0 * (own - null))
    assert (tiny.num_classes, tiny.null_class, tiny.image_size, tiny.num_channels) == (3, 3, 8, 1)


def test_a_denoiser_of_ones_own_is_saved_loaded_and_offloaded(tiny, make, tmp_path):
    images = tiny([0, 1, 2], generator=make.generators([1, 2, 3]), output_type="pt", **DRAWN).images
    tiny.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["custom_denoiser"] == [__name__, "TinyNet"]
    loaded = DsCoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.denoiser) is TinyNet and loaded.components["custom_denoiser"] is loaded.denoiser
    again = loaded([0, 1, 2], generator=make.generators([1, 2, 3]), output_type="pt", **DRAWN).images
    assert torch.equal(images, again) and images.std() > 0
    assert "custom_denoiser" in loaded.model_cpu_offload_seq.split("->")
    tiny.register_modules(custom_denoiser=None)  # as a pipeline is published whose denoiser nobody could load
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No family of denoisers takes a NoneType"):
        tiny([0])
    other = TinyNet(labels=3)
    assert DsCoPipeline.from_pretrained(tmp_path, denoiser=other).denoiser is other


def test_only_families_that_are_registered_are_loaded(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    for entry in (["antigravity", "TinyNet"], ["antigravity", "Net"]):
        index = json.loads(path.read_text(encoding="utf-8")) | {"custom_denoiser": entry}
        path.write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(ValueError, match="trust 'antigravity', import the module that registers a family for it"):
            DsCoPipeline.from_pretrained(tmp_path)
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="No family of denoisers takes a Linear; there are some for .*TinyNet"):
        DsCoPipeline(nn.Linear(2, 2), DDIMScheduler())


def test_a_denoiser_of_ones_own_runs_in_a_folder_is_costed_and_recorded(tiny, real_images, tmp_path):
    tiny.save_pretrained(tmp_path / "pipe")
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    options = {**DRAWN, "block_size": 1, "progress": False}
    targets = MatchingTargets.from_dataset(real_images, pipe, embedding_dim=32, progress=False)
    small = concentrate(pipe, targets, 2, seed=3, **options)
    run = concentrate_to_folder(pipe, targets, 2, tmp_path / "run", seed=3, **options)
    assert same_pixels(run.dataset(), small)
    save_dataset_folder(small, tmp_path / "set", targets=targets)
    again, targets, record = load_recorded(tmp_path / "set")
    assert record["generator"]["family"] == f"{__name__}.Tiny" and len(record["generator"]["sha256"]) == 64
    again.set_progress_bar_config(disable=True)
    assert same_pixels(concentrate(again, targets, 2, seed=3, **options), small)
    # two convolutions of 3 x 3 at 64 positions, 1 -> 4 -> 2 channels, and a layer of 1 -> 4; a multiply-add is 2
    assert pass_costs(pipe)["denoiser"].flops == 2 * (64 * 9 * (1 * 4 + 4 * 2) + 1 * 4)


def same_pixels(one, other):
    return [np.asarray(image).tobytes() for image in one["image"]] == [
        np.asarray(image).tobytes() for image in other["image"]
    ]


def test_a_denoiser_of_ones_own_is_built_trained_and_adapted(fresh_accelerate, tmp_path):
    pixels = torch.linspace(-1, 1, 3)[torch.arange(30) % 3][:, None, None, None].expand(-1, 1, 8, 8).clone()
    config = TinyConfig(architecture="tiny", width=6, train_steps=60, batch_size=30, warmup_steps=0, seed=1)
    given = {"accelerator": Accelerator(cpu=True), "progress": False}
    result = train_generator(
        pixels, torch.arange(30) % 3, config, num_classes=3, checkpoint_dir=tmp_path, log_every=20, **given
    )
    assert result.losses[-1]["loss"] < 0.7 * result.losses[0]["loss"]
    assert list(result.components) == ["custom_denoiser"] and result.denoiser.config.width == 6
    new = denoiser_of(result.denoiser).adapt(2, mapping={0: 2}, sample_size=5)
    table = result.denoiser.table.weight
    torch.testing.assert_close(new.table.weight, torch.stack([table[2], table[:3].mean(dim=0), table[3]]))
    assert new.config.sample_size == 5
    tuned = train_generator(
        pixels[:, :, :5, :5],
        torch.arange(30) % 2,
        dataclasses.replace(config, trainable="bias_and_norm", train_steps=1),
        num_classes=2,
        denoiser=new,
        **given,
    )
    assert torch.equal(tuned.denoiser.inward.weight, result.denoiser.inward.weight)
    assert not torch.equal(tuned.denoiser.inward.bias, result.denoiser.inward.bias)


class BareNet(TinyNet):
    """One of which all embeddings are classes, if as many have names."""


def test_what_errors_of_families_say_to_do_is_done(fresh_accelerate):
    unet = UNet2DModel(block_out_channels=(32,) * 4, num_class_embeds=4)
    with pytest.raises(ValueError, match="`custom_denoiser` is no place for a UNet2DModel: pass it as `unet`"):
        DsCoPipeline(custom_denoiser=unet, scheduler=DDIMScheduler())
    assert DsCoPipeline(unet=unet, scheduler=DDIMScheduler()).num_classes == 4
    with pytest.raises(ValueError, match=r"named 'dit' already, dsco_hf.*families.dit.DiT: choose another `name`"):
        register_denoiser(type("Bare", (Denoiser,), {"name": "dit", "kinds": (BareNet,)}))
    own = {"name": "bare", "kinds": (BareNet,), "classes_field": "labels", "forward": Tiny.forward, "null_class": None}
    try:
        family = register_denoiser(type("Bare", (Denoiser,), own | {"num_classes": property(lambda self: 4)}))
        assert type(denoiser_of(BareNet())) is family and type(denoiser_of(TinyNet())) is Tiny
        config = TinyConfig(architecture="bare", train_steps=1, batch_size=4)
        given = {"num_classes": 4, "progress": False, "accelerator": Accelerator(cpu=True)}
        data = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
        with pytest.raises(ValueError, match="'bare' cannot be built: pass a network, `denoiser=...`"):
            train_generator(*data, config, **given)
        with pytest.raises(ValueError, match="no null class to drop labels to: set `class_dropout_prob=0`"):
            train_generator(*data, config, denoiser=BareNet(), **given)
        config = dataclasses.replace(config, class_dropout_prob=0)
        assert train_generator(*data, config, denoiser=BareNet(), **given).finished
    finally:
        FAMILIES.pop("bare", None)


def test_nobody_but_its_own_file_knows_a_family():
    """Outside of `families/`, no code names their components, their classes or their configs' fields."""
    words = {family.component for family in FAMILIES.values()} - {Denoiser.component}
    words |= {kind.__name__ for family in FAMILIES.values() for kind in family.kinds}
    words |= {"num_embeds_ada_norm", "num_class_embeds"}
    room = Path(dsco_hf.__path__[0])
    for path in sorted(room.rglob("*.py")):
        if path.parent.name == "families":
            continue
        found = words & set(words_of(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found, f"{path.relative_to(room)} knows {found}"


def words_of(tree):
    """Names, attributes, arguments, keywords and texts of a module."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "value", "name"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


# Selection


@dataclasses.dataclass(frozen=True)
class Darkest(Selection):
    """The images of a class whose mean is farthest below, or above, a level."""

    level: float = 0.0
    signs: tuple[int, ...] = (1,)

    def rank(self, pool, small, wanted, pipe, seed):
        """`(N,)`: the darkest first."""
        return (self.signs[0] * (pool.pixels(num_channels=1).mean((1, 2, 3)) - self.level)).argsort(stable=True)


def brightness(dataset):
    return [np.asarray(image.convert("L")).mean() for image in dataset["image"]]


@pytest.mark.parametrize("rule", [Darkest(), Darkest(level=0.5, signs=(-1,))])
def test_a_selection_of_ones_own_chooses_dopes_and_is_made_again_from_its_record(real_images, make, tmp_path, rule):
    ranked = sorted(range(21), key=lambda row: rule.signs[0] * brightness(real_images)[row])
    expected = [row for label in range(3) for row in [r for r in ranked if real_images["label"][r] == label][:2]]
    numbered = real_images.add_column("row", range(21))
    assert select(numbered, rule, images_per_class=2, progress=False)["row"][:] == expected
    small = make.images((1, 1, 1), seed=3)
    mixed = dope(small, real_images, strategy=rule, images_per_class=3, seed=4, progress=False)
    assert mixed["real_index"][3:] == expected
    save_dataset_folder(mixed, tmp_path / "set")
    record = config_record(json.loads((tmp_path / "set" / "concentration.json").read_text(encoding="utf-8")))
    told = {"name": f"{__name__}:Darkest", "level": rule.level, "signs": list(rule.signs)}
    assert record["doping"]["strategy"] == told and record["doping"]["seed"] == 4
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert "Real images were added by the rule" in card and "Darkest" in card
    again = dope(small, real_images, progress=False, **recorded_doping(record["doping"]))
    assert again["real_index"][3:] == expected


# Objective and method


@dataclasses.dataclass(frozen=True)
class EachNearest(Objective):
    """Every image by itself should be near to its class mean, and far from finished images of the set."""

    weight: float = 1.0
    each_image = True

    def losses(self, seen, bound):
        psi = bound.targets.embed(seen.features)
        away = (psi - bound.targets.embeddings[bound.rows]).square().sum(dim=1)
        if bound.previous is not None:
            away = away - self.weight * (psi[:, None] - bound.previous[0]).square().sum(dim=2).mean(dim=1)
        present, index = bound.rows.unique(return_inverse=True)
        return class_means(away[:, None], index, len(present))[:, 0]


@dataclasses.dataclass(frozen=True)
class Toned(SamplingMethod):
    """Begins at a later step, draws towards a tone, with the opposite noise, and keeps the lightest of some images."""

    candidates: int = 2
    tone: float = 0.5

    def begin(self, call):
        call.state = []
        return super().begin(call)[0], 1

    def guide(self, call, i, latents, noise_pred):
        call.state.append(call.sigma(i))
        return noise_pred + 0.1 * call.sigma(i) * (call.clean(i, latents, noise_pred) - self.tone)

    def noise(self, call, i, latents, noise_pred, noise):
        return -noise

    def choose(self, call, latents, pixels):
        assert len(call.state) == 3 and call.state[0] > call.state[1] > call.state[2] == 0
        light = pixels.mean(dim=(1, 2, 3)).view(self.candidates, len(call.wanted))
        return light.argmax(dim=0) * len(call.wanted) + torch.arange(len(call.wanted))


OWN = {"objective": NOpt(EachNearest(0.1), start=0.0), "method": Toned(tone=0.25)}


@pytest.mark.parametrize("kind", OWN)
def test_an_objective_or_a_method_of_ones_own_does_all_that_a_built_in_does(pipe, targets, tmp_path, kind):
    sampling = Sampling(4, 1.0, batch_size=4, method=OWN[kind])
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = DsCoPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    options = {"block_size": 1, "images_per_call": 4, "progress": False, "seed": 3}
    small = concentrate(pipe, targets, 2, method=sampling, **options)
    assert not same_pixels(small, concentrate(pipe, targets, 2, method="plain", num_inference_steps=4, **options))
    begun = concentrate_to_folder(pipe, targets, 1, tmp_path / "run", method=sampling, **options)
    run = concentrate_to_folder(pipe, targets, 2, tmp_path / "run", method=sampling, **options)
    assert begun.finished and run.session["images"] == 3 and same_pixels(run.dataset(), small)
    told = {"objective": {"name": f"{__name__}:EachNearest", "weight": 0.1},
            "method": {"name": f"{__name__}:Toned", "candidates": 2, "tone": 0.25}}[kind]  # fmt: skip
    with pytest.raises(ValueError, match="there, .* now"):
        changed = {"objective": NOpt(EachNearest(0.2), start=0.0), "method": Toned(tone=0.5)}[kind]
        concentrate_to_folder(pipe, targets, 2, tmp_path / "run", method=changed, **options)
    sizes = {"block_size": 1, "images_per_call": 4}
    counted = calls(sum((passes for _, passes in Rehearsal(pipe, sampling, {}).run(3, 2, **sizes)), Counter()))
    spent = {name: getattr(run.report, name) for name in counted}
    assert spent == counted and spent["denoiser_calls"] == {"objective": 6 * (4 + 3), "method": 6 * 2 * 3}[kind]
    save_dataset_folder(small, tmp_path / "set", targets=targets)
    again, targets, record = load_recorded(tmp_path / "set")
    recorded = record["parameters"]["method"]
    assert (recorded["objective"] if kind == "objective" else recorded) == told
    again.set_progress_bar_config(disable=True)
    parameters = record_parameters(json.loads(json.dumps(record)))
    assert parameters["method"] == sampling
    assert same_pixels(concentrate(again, targets, seed=3, progress=False, **parameters), small)
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    assert ("noise of a frozen" in card, "model was steered" in card) == (kind == "objective", kind == "method")


def test_the_method_chose_the_lightest_of_what_it_drew(pipe, make):
    sampling = Sampling(4, 1.0, method=Toned())
    labels, seeds = [0, 2, 1, 1], [11, 12, 13, 14]
    call = pipe.start_call(labels, None, sampling, generator=make.generators(seeds))
    assert call.ids == labels * 2 and len({one.initial_seed() for one in call.generator}) == 8
    chosen = pipe(labels, method=sampling, generator=make.generators(seeds), output_type="pt").images
    one, other = (
        pipe.sample(labels, method=dataclasses.replace(sampling, method=Toned(candidates=1)), seeds=drawn).images
        for drawn in (seeds, [one.initial_seed() for one in call.generator[4:]])
    )
    lighter = (other.mean(dim=(1, 2, 3)) > one.mean(dim=(1, 2, 3))).view(4, 1, 1, 1)
    assert lighter.any() and not lighter.all()
    torch.testing.assert_close(chosen, torch.where(lighter, other, one), atol=1e-4, rtol=0)


def test_a_record_imports_nothing(pipe):
    for name in ("antigravity:Method", "json:JSONDecoder"):
        with pytest.raises(ValueError, match="no class below SamplingMethod is there: `import "):
            record_parameters({"parameters": {"images_per_class": 1, "method": {"name": name}}})
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match="Toned has no field 'ton'. Nearest: 'tone'"):
        SamplingMethod.of({"name": f"{__name__}:Toned", "ton": 1})
    with pytest.raises(ValueError, match=r"left images of the classes \[0, 0\], and \[0, 1\] were asked for"):
        pipe([0, 1], method=Wrong(), num_inference_steps=1)


@dataclasses.dataclass(frozen=True)
class Wrong(SamplingMethod):
    def choose(self, call, latents, pixels):
        return torch.tensor([0, 0])
