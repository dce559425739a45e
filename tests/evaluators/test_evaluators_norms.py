"""Normalisation layers: the instance norm against PyTorch's group norm, in every layout and precision."""

import pytest
import torch
import torch.nn.functional as F

from dsco_hf.evaluators import build_evaluator
from dsco_hf.evaluators.configurations import InstanceNorm, fast_instance_norm, make_norm


def case(layout, offset, dtype=torch.float32):
    """Maps whose mean is far from zero, weights of their own, and a gradient from above."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(4, 8, 6, 6, generator=generator, dtype=torch.float64) * 2 + offset
    weight, bias = (torch.rand(8, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    above = torch.randn(4, 8, 6, 6, generator=generator, dtype=torch.float64)
    maps, above = (t.to(dtype).contiguous(memory_format=layout) for t in (maps, above))
    return maps.requires_grad_(), weight.float().requires_grad_(), bias.float().requires_grad_(), above


def reference(maps, weight, bias, above):
    """Group norm and its gradients in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (maps, weight, bias)]
    output = F.group_norm(inputs[0], 8, *inputs[1:])
    return [output, *torch.autograd.grad(output, inputs, above.double())]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize(
    ("offset", "dtype", "tolerance"),
    [(0.0, torch.float32, 1e-5), (30.0, torch.float32, 1e-4), (3.0, torch.bfloat16, 0.03)],
)
def test_values_and_gradients_are_those_of_group_norm(layout, offset, dtype, tolerance):
    maps, weight, bias, above = case(layout, offset, dtype)
    output = fast_instance_norm(maps, weight, bias)
    found = [output, *torch.autograd.grad(output, (maps, weight, bias), above)]
    assert output.dtype == dtype and output.is_contiguous(memory_format=layout)
    for ours, exact in zip(found, reference(maps, weight, bias, above), strict=True):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(1)
    maps, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 2, 2), (3,), (3,))
    )
    assert torch.autograd.gradcheck(fast_instance_norm, (maps, weight, bias))


def test_a_map_of_one_value_is_its_bias():
    maps = torch.full((1, 2, 4, 4), 1000.0, requires_grad=True)
    output = fast_instance_norm(maps, torch.ones(2), torch.tensor([0.5, -1.0]))
    assert torch.equal(output[0, :, 0, 0], torch.tensor([0.5, -1.0]))
    assert torch.autograd.grad(output.sum(), maps)[0].abs().max() < 1e-3


def test_layers_by_name():
    assert isinstance(make_norm("instance", 4), InstanceNorm) and isinstance(make_norm("none", 4), torch.nn.Identity)
    with pytest.raises(ValueError, match="Unknown norm 'layer'"):
        build_evaluator("convnet-2", class_names=["a", "b"], image_size=8, norm="layer")
