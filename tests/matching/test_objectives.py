import math

import pytest
import torch

from dsco_hf import ClassifierEvidence, MatchingTargets, NOpt
from dsco_hf.data.datasets import load_pixels
from dsco_hf.matching.features import Observation, batchnorm_layers, observe
from dsco_hf.matching.kernels import mmd2
from dsco_hf.matching.objectives import (
    batchnorm_distance,
    class_evidence,
    class_margin,
    class_means,
    class_sums,
    contrasted_means,
    repulsion,
    ridge,
    rkhs,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(features):
    return Observation(features, normal(len(features), 3), features.new_zeros(len(features), 0, 2))


def test_sums_and_means_per_class():
    values, index = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([1, 0, 1])
    assert class_sums(values, index, 2).tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert class_means(values, index, 2).tolist() == [[3.0, 4.0], [3.0, 4.0]]


def test_rkhs_is_the_discrepancy_of_each_class(targets):
    features, rows = normal(5, targets.feature_dim), torch.tensor([2, 0, 2, 0, 2])
    losses = rkhs(seen(features), rows, targets)
    psi = targets.embed(features)
    expected = [mmd2(psi[rows == row].mean(0), targets.embeddings[row]) for row in (0, 2)]
    torch.testing.assert_close(losses, torch.stack(expected))
    assert losses.min() > 0.01 and not math.isclose(losses[0], losses[1])


def test_contrast_aims_away_from_the_other_classes(targets):
    means = torch.tensor([[1.0, 0.0], [3.0, 2.0], [2.0, 1.0]])  # of mean (2, 1)
    expected = torch.tensor([[-1.0, -2.0], [5.0, 4.0], [2.0, 1.0]])
    torch.testing.assert_close(contrasted_means(means, 2.0), expected)
    assert contrasted_means(means, 0.0) is means
    torch.testing.assert_close(contrasted_means(means[:1], 5.0), means[:1])  # nothing to stand out from
    features, rows = normal(5, targets.feature_dim), torch.tensor([2, 0, 2, 0, 2])
    psi = torch.stack([targets.embed(features)[rows == row].mean(0) for row in (0, 2)])
    aims = contrasted_means(targets.embeddings, 3.0)[[0, 2]]
    torch.testing.assert_close(rkhs(seen(features), rows, targets, contrast=3.0), mmd2(psi, aims))
    torch.testing.assert_close(rkhs(seen(features), rows, targets, contrast=0.0), rkhs(seen(features), rows, targets))


def test_the_contrasted_loss_is_the_discrepancy_less_what_sets_the_class_apart(targets):
    rows, gamma = torch.tensor([0, 1, 2]), 4.0
    one, other = (targets.embed(normal(3, targets.feature_dim, seed=seed)) for seed in (1, 2))
    features = [normal(3, targets.feature_dim, seed=seed) for seed in (1, 2)]
    change = torch.subtract(*(rkhs(seen(f), rows, targets, contrast=gamma) for f in features))
    plain = torch.subtract(*(rkhs(seen(f), rows, targets) for f in features))
    apart = targets.embeddings - targets.embeddings.mean(0)
    torch.testing.assert_close(change, plain - 2 * gamma * ((one - other) * apart).sum(1), atol=1e-4, rtol=0)


def test_margin_is_the_log_odds_of_the_class():
    logits, labels = normal(6, 4) * 3, torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(class_margin(logits, labels), p.logit(), atol=1e-4, rtol=1e-4)
    sure = class_margin(torch.tensor([[40.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 0]))
    assert sure[1] > sure[0]  # both probabilities are 1 in float32


def test_previous_images_count_as_if_they_were_drawn_along(targets):
    features, rows = normal(7, targets.feature_dim), torch.tensor([0, 1, 0, 1, 0, 0, 1])
    psi = targets.embed(features)
    old, new = slice(0, 4), slice(4, 7)
    sums = torch.zeros_like(targets.embeddings).index_add_(0, rows[old], psi[old])
    counts = torch.tensor([2.0, 2.0, 0.0])
    joint = rkhs(seen(features[new]), rows[new], targets, (sums, counts))
    torch.testing.assert_close(joint, rkhs(seen(features), rows, targets))
    nothing = (torch.zeros_like(sums), torch.zeros(3))
    alone = rkhs(seen(features[new]), rows[new], targets)
    torch.testing.assert_close(rkhs(seen(features[new]), rows[new], targets, nothing), alone)
    assert (joint - alone).abs().max() > 1e-3


@pytest.fixture
def ridge_targets(pipe, real_images):
    return MatchingTargets.from_dataset(real_images, pipe, features={}, embedding_dim=64, progress=False)


def test_ridge_is_the_error_of_a_regression_on_the_population(pipe, real_images, ridge_targets):
    features, rows = normal(5, ridge_targets.feature_dim), torch.tensor([2, 0, 2, 0, 2])
    psi, labels = ridge_targets.embed(features), torch.eye(3)[rows] - 1 / 3
    weights = psi.T @ torch.linalg.inv(psi @ psi.T + 0.5 * torch.eye(5)) @ labels  # ‖ψ‖ = 1
    pixels, classes, _ = load_pixels(real_images, num_channels=1)
    with torch.no_grad():
        population = ridge_targets.embed(observe(pipe.classifier, pixels).features)
    answers = torch.eye(3)[classes] - 1 / 3
    errors = (population @ weights - answers).square() - answers.square()
    expected = torch.stack([errors[classes == row].mean(0) for row in range(3)]).mean(0)  # classes of equal weight
    losses = ridge(seen(features), rows, ridge_targets, regularization=0.5)
    torch.testing.assert_close(losses, expected[[0, 2]], atol=1e-5, rtol=1e-4)
    alone = ridge(seen(features[:1]), rows[:1], ridge_targets)
    assert alone.shape == (1,) and alone.isfinite().all()


def test_images_of_the_population_teach_more_than_wrong_ones(pipe, real_images, ridge_targets):
    pixels, classes, _ = load_pixels(real_images, num_channels=1)
    with torch.no_grad():
        observed = observe(pipe.classifier, pixels)
    right, wrong = (ridge(observed, rows, ridge_targets).sum() for rows in (classes, (classes + 1) % 3))
    assert right < -0.3 < 0 < wrong  # 0: as good as no answer; -2/3: no error


def test_ridge_learns_from_previous_images_as_if_they_were_drawn_along(ridge_targets):
    features, rows = normal(7, ridge_targets.feature_dim), torch.tensor([0, 1, 0, 1, 0, 0, 1])
    old, new = slice(0, 4), slice(4, 7)
    previous = (ridge_targets.embed(features[old]), rows[old])
    joint = ridge(seen(features[new]), rows[new], ridge_targets, previous)
    torch.testing.assert_close(joint, ridge(seen(features), rows, ridge_targets))
    assert (joint - ridge(seen(features[new]), rows[new], ridge_targets)).abs().max() > 1e-3


def test_evidence_by_the_formula():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 5.0, 1.0]])
    labels = torch.tensor([0, 2])
    margins = [2 - math.log(math.exp(0) + math.exp(-1)), 1 - math.log(math.exp(0) + math.exp(5))]
    expected = [math.log1p(math.exp(3 - m)) for m in margins]
    torch.testing.assert_close(class_evidence(logits, labels, margin=3.0), torch.tensor(expected))
    clear = class_evidence(torch.tensor([[100.0, 0.0]]), torch.tensor([0]), margin=3.0)
    assert clear.item() == pytest.approx(0, abs=1e-6)  # beyond the margin an image is left alone


def test_repulsion_is_the_mean_similarity_of_the_others():
    features, index = normal(5, 4), torch.tensor([0, 0, 1, 0, 1])
    similarity = torch.cosine_similarity(features[:, None], features[None], dim=2)
    expected = [(similarity[0, 1] + similarity[0, 3] + similarity[1, 3]) / 3, similarity[2, 4]]
    torch.testing.assert_close(repulsion(features, index, 2), torch.stack(expected))


def test_one_image_repels_nothing():
    features = normal(3, 4).requires_grad_(True)
    values = repulsion(features, torch.tensor([0, 1, 1]), 2)
    assert values[0] == 0 and values[1] != 0
    (gradient,) = torch.autograd.grad(values.sum(), features)
    assert gradient.isfinite().all() and not gradient[0].any() and gradient[1].any()


def test_equal_images_are_as_similar_as_can_be():
    assert repulsion(normal(1, 4).expand(3, 4), torch.zeros(3, dtype=torch.int64), 1).item() == pytest.approx(1.0)


def test_batchnorm_distance_is_zero_at_the_running_statistics(make):
    convnet = make.convnet()
    mean, var = (
        torch.cat([getattr(m, n) for m in batchnorm_layers(convnet)]) for n in ("running_mean", "running_var")
    )
    moments = torch.stack([mean, var + mean.square()], dim=1)
    assert batchnorm_distance(moments.expand(3, -1, 2), convnet).item() == pytest.approx(0, abs=1e-6)
    # one standard deviation away in the mean, and twice the spread
    away = torch.stack([mean + var.sqrt(), 4 * var + (mean + var.sqrt()).square()], dim=1)
    assert batchnorm_distance(away[None], convnet).item() == pytest.approx(2.0, rel=1e-4)


def test_batchnorm_statistics_are_of_all_images_together(make):
    convnet = make.convnet()
    mean, var = (
        torch.cat([getattr(m, n) for m in batchnorm_layers(convnet)]) for n in ("running_mean", "running_var")
    )
    # two images of no spread each, one standard deviation above and below: together they have the running statistics
    pair = torch.stack([torch.stack([x, x.square()], dim=1) for x in (mean + var.sqrt(), mean - var.sqrt())])
    assert batchnorm_distance(pair, convnet).item() == pytest.approx(0, abs=1e-5)
    assert batchnorm_distance(pair[:1], convnet).item() > 1


def test_classifier_objective_is_the_weighted_sum_of_its_parts(make):
    convnet = make.convnet()
    pipe = make.pipe(classifier=convnet)
    observation = observe(convnet, normal(4, 1, 8, 8).clamp(-1, 1), moments=True)
    labels = torch.tensor([2, 0, 0, 2])
    index = torch.tensor([1, 0, 0, 1])
    parts = {
        "evidence": class_means(class_evidence(observation.logits, labels, margin=5.0)[:, None], index, 2)[:, 0],
        "repulsion": repulsion(observation.features, index, 2),
        "batchnorm": batchnorm_distance(observation.moments, convnet).expand(2) / 2,
    }
    for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 2.0, 3.0)):
        objective = ClassifierEvidence(**dict(zip(parts, weights, strict=True)), margin=5.0)
        expected = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
        torch.testing.assert_close(objective.bind(pipe, None, labels.tolist())(observation), expected)
    assert all(part.abs().max() > 1e-4 for part in parts.values())


def test_a_classifier_without_batchnorm_has_no_statistics_to_meet(pipe, make):
    pipe.register_modules(classifier=make.convnet(norm="instance"))
    options = {"num_inference_steps": 3, "guidance_scale": 1.0}
    every = (ClassifierEvidence(), ClassifierEvidence(batchnorm=0.0), ClassifierEvidence(evidence=0.0))
    for batch_size in (None, 2):  # at once, and in micro-batches
        options |= {"batch_size": batch_size, "output_type": "pt"}
        drawn = [
            pipe([0, 1, 1], generator=make.generators(range(3)), method=NOpt(each, start=0.0), **options).images
            for each in every
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
