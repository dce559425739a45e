"""A SiT, written as its authors do, and what it is converted to: the same velocity, and images of a pipeline."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from dsco_hf import DsCoPipeline
from dsco_hf.generators.families.dit import dit_of_sit


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        parts = self.attn["qkv"](normed(x) * (1 + scale) + shift).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.attn["proj"](seen)
        hidden = self.mlp["fc1"](normed(x) * (1 + scale_mlp) + shift_mlp)
        return x + gate_mlp * self.mlp["fc2"](nn.functional.gelu(hidden, approximate="tanh"))


def normed(x):
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class SiT(nn.Module):
    """Patches of 2, and a learned sigma that nobody reads."""

    def __init__(self, width=16, heads=2, depth=2, channels=1, classes=3, size=8):
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, 2, stride=2)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.randn(1, (size // 2) ** 2, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict(
            {"linear": nn.Linear(width, 4 * 2 * channels), "adaLN_modulation": modulation}
        )
        self.channels, self.side = channels, size // 2

    def forward(self, x, t, y):
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        told = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1))
        c = told + self.y_embedder["embedding_table"](y)
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=2)
        x = self.final_layer["linear"](normed(x) * (1 + scale) + shift)
        x = x.reshape(len(x), self.side, self.side, 2, 2, 2 * self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), 2 * self.channels, 2 * self.side, 2 * self.side)[:, : self.channels]


@pytest.fixture(scope="module")
def sit():
    torch.manual_seed(0)
    return SiT().eval().requires_grad_(False)


def test_the_converted_network_says_the_velocity_the_other_way_round(sit):
    network = dit_of_sit(sit.state_dict(), num_attention_heads=2)
    x, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])  # 3 is the null class
    for sigma in (0.0, 0.001, 0.3, 0.77, 1.0):
        times = torch.full((6,), sigma)
        found = network(x, timestep=1000 * times, class_labels=labels).sample[:, :1]
        torch.testing.assert_close(found, -sit(x, 1 - times, labels), atol=2e-5, rtol=1e-4)
    assert (network.config.sample_size, network.config.num_embeds_ada_norm) == (8, 3)


def test_images_are_those_of_an_euler_method_of_ones_own(sit):
    pipe = DsCoPipeline(
        dit_of_sit(sit.state_dict(), num_attention_heads=2), FlowMatchEulerDiscreteScheduler(),
        id2label={0: "a", 1: "b", 2: "c"},
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "guidance_scale": 2.0, "eta": 0.0, "output_type": "latent"}
    found = pipe.sample([2, 0], seeds=[1, 2], **options).images
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
    for t in (0.0, 0.2, 0.4, 0.6, 0.8):  # theirs runs from noise at 0 to the image at 1
        times = torch.full((4,), t)
        own, none = sit(torch.cat([x, x]), times, torch.tensor([2, 0, 3, 3])).chunk(2)
        x = x + 0.2 * (none + 2.0 * (own - none))
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


def test_weights_of_something_else(sit):
    checkpoint = {"ema": sit.state_dict(), "model": {}}
    with pytest.raises(ValueError, match="not the weights of a SiT, as they lack 'pos_embed'.*pass .* `state\\['ema'"):
        dit_of_sit(checkpoint)
    assert dit_of_sit(checkpoint["ema"], num_attention_heads=2).config.num_layers == 2
