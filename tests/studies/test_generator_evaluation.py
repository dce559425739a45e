import pytest
import torch

from dsco_hf.matching.features import observe
from dsco_hf.studies.generator_check import GeneratorScore, feature_moments


def test_moments_are_those_of_the_pooled_features(make):
    classifier, pixels = make.convnet(), torch.rand(7, 1, 8, 8) * 2 - 1
    mean, cov = feature_moments(pixels, classifier, batch_size=3)
    features = observe(classifier, pixels).features.detach().double()
    torch.testing.assert_close(mean, features.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cov, torch.cov(features.T), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        feature_moments(pixels[:1], classifier)


def test_own_samples_score_better_than_those_of_another_generator(make):
    classifier = make.convnet()
    pipe, other = make.pipe(classifier=classifier), make.pipe(classifier=classifier, seed=7)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0}
    own = pipe.sample([index % 3 for index in range(60)], seeds=list(range(500, 560)), **options).images * 2 - 1
    score = GeneratorScore.of_images(own, classifier, num_samples=60, num_inference_steps=3, batch_size=25)
    found, again, worse = score(pipe), score(pipe), score(other)
    assert found == again and found["samples"] == 60
    assert 0 < found["frechet_distance"] < worse["frechet_distance"]
