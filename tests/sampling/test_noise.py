import pytest
import torch

from dsco_hf.sampling.methods.noise import joint_gradient, loss_gradient, momentum_descent, norms, on_shell, shell_step


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_norms_are_per_image():
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert norms(x).shape == (2, 1, 1) and norms(x).flatten().tolist() == [5.0, 2.0]
    assert norms(on_shell(x, torch.full((2, 1, 1), 7.0))).flatten().tolist() == pytest.approx([7.0, 7.0])


@pytest.mark.parametrize("step_size", [0.01, 0.5, 5.0])
def test_a_step_keeps_the_norm_and_moves_against_the_gradient(step_size):
    z, g = normal(4, 1, 3, 3), normal(4, 1, 3, 3, seed=1)
    moved = shell_step(z, g, step_size)
    torch.testing.assert_close(norms(moved), norms(z))
    for before, after, gradient in zip(z, moved, g, strict=True):
        assert ((after - before) * gradient).sum() < 0
        by_hand = before - step_size * before.norm() * gradient / gradient.norm()
        torch.testing.assert_close(after, by_hand / by_hand.norm() * before.norm())


def test_only_the_direction_of_the_gradient_counts():
    z, g = normal(2, 5), normal(2, 5, seed=1)
    scales = torch.tensor([[1e-20], [1e20]], dtype=torch.float64)
    torch.testing.assert_close(shell_step(z, g * scales, 0.5), shell_step(z, g, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_without_gradient_keeps_its_noise(dtype):
    z, g = normal(3, 4).to(dtype), normal(3, 4, seed=1).to(dtype)
    g[1] = 0
    moved = shell_step(z, g, 0.5)
    assert torch.equal(moved[1], z[1]) and moved.dtype == dtype and moved.isfinite().all()
    assert not torch.equal(moved[0], z[0]) and not torch.equal(moved[2], z[2])


def test_gradient_is_that_of_the_sum_of_losses_and_touches_no_parameter():
    weight = torch.nn.Parameter(normal(3, 2))
    z = normal(4, 3, seed=1)
    losses, gradient = loss_gradient(z, lambda leaf: (leaf @ weight).square().sum(dim=0))
    assert losses.shape == (2,) and not losses.requires_grad and not gradient.requires_grad
    torch.testing.assert_close(losses, (z @ weight).square().sum(dim=0).detach())
    torch.testing.assert_close(gradient, (2 * z @ weight @ weight.T).detach())
    assert weight.grad is None and not z.requires_grad


def test_gradient_inside_no_grad():
    with torch.no_grad():
        _, gradient = loss_gradient(torch.ones(2, 2), lambda z: (3 * z).sum())
    assert gradient.tolist() == [[3.0, 3.0], [3.0, 3.0]]


WEIGHT = normal(6, 5, seed=7)


def observe_rows(z, part):
    offset = torch.arange(7, dtype=z.dtype)[part, None]
    unused = z.flatten(1).sum(dim=1, keepdim=True)
    return torch.tanh(z.flatten(1) @ WEIGHT + offset), z.flatten(1).square().sum(dim=1, keepdim=True), unused


def coupled_losses(seen):
    features, squares, _ = seen
    pairs = features[:4].mean(dim=0).square().sum(), features[4:].mean(dim=0).sub(0.3).square().sum()
    return torch.stack(pairs) * squares.mean()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 100])
def test_joint_gradient_in_micro_batches_is_the_gradient_of_all_at_once(batch_size):
    z = normal(7, 2, 3)
    whole, gradient = loss_gradient(z, lambda leaf: coupled_losses(observe_rows(leaf, slice(None))))
    assert gradient.flatten(1).norm(dim=1).min() > 1e-3
    losses, joint = joint_gradient(z, observe_rows, coupled_losses, batch_size=batch_size)
    torch.testing.assert_close(losses, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joint, gradient, rtol=1e-12, atol=1e-12)
    assert not losses.requires_grad and not joint.requires_grad


def test_joint_gradient_equals_finite_differences():
    z, step = normal(7, 2, 3), 1e-6
    _, gradient = joint_gradient(z, observe_rows, coupled_losses, batch_size=3)
    for place in range(0, z.numel(), 5):
        e = torch.zeros(z.numel(), dtype=z.dtype)
        e[place] = step
        up, down = (coupled_losses(observe_rows(z + s * e.view_as(z), slice(None))).sum() for s in (1, -1))
        assert gradient.flatten()[place].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5, abs=1e-8)


def test_momentum_descent_is_sgd_with_momentum():
    z = torch.tensor([1.0, -2.0], dtype=torch.float64)
    moved, first = momentum_descent(z, lambda leaf: leaf.square().sum(), learning_rate=0.1, momentum=0.9, iterations=3)
    x, velocity = z.clone(), torch.zeros_like(z)
    for _ in range(3):
        velocity = 0.9 * velocity + 2 * x
        x = x - 0.1 * velocity
    torch.testing.assert_close(moved, x)
    assert first.item() == 5.0 and z.tolist() == [1.0, -2.0]
