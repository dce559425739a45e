"""How good a generator's samples are: their Fréchet distance from real images in a classifier's features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .features import observe
from .kernels import frechet_distance
from .pipeline import DsCoPipeline


@torch.no_grad()
def feature_moments(
    pixels: torch.Tensor, classifier: PreTrainedModel, *, batch_size: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(d,)` and covariance `(d, d)` of a classifier's pooled features, in float64 on the CPU.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, range [-1, 1]): at least two images.
        classifier (`PreTrainedModel`): in eval mode.
        batch_size (`int`): images per pass.
    """
    if len(pixels) < 2:
        raise ValueError(f"A covariance needs at least 2 images, got {len(pixels)}.")
    device = next(classifier.parameters()).device
    parts = [observe(classifier, part.to(device)).features.double().cpu() for part in pixels.split(batch_size)]
    features = torch.cat(parts)
    return features.mean(dim=0), torch.cov(features.T)


@dataclass(frozen=True)
class GeneratorScore:
    """Scores samples of a generator against the real images it learned from, at a fixed cost per score.

    Attributes:
        mean (`torch.Tensor` of shape `(d,)`), cov (`torch.Tensor` of shape `(d, d)`): moments of the real features.
        num_samples (`int`): samples per score, shared evenly by the classes. The distance is biased upwards by few
            samples; only scores of the same number can be compared.
        num_inference_steps (`int`), guidance_scale (`float`), batch_size (`int`): of sampling.
        seed (`int`): the samples of every score start from the same noise.
    """

    mean: torch.Tensor
    cov: torch.Tensor
    num_samples: int = 1000
    num_inference_steps: int = 20
    guidance_scale: float = 1.0
    batch_size: int = 250
    seed: int = 0

    @classmethod
    def of_images(cls, pixels: torch.Tensor, classifier: PreTrainedModel, **options: int | float) -> GeneratorScore:
        """The score against `pixels`, `(N, C, H, W)` in [-1, 1], in the features of `classifier`."""
        mean, cov = feature_moments(pixels, classifier)
        return cls(mean, cov, **options)  # type: ignore[arg-type]

    def __call__(self, pipe: DsCoPipeline) -> dict[str, float]:
        """`{"frechet_distance", "samples"}` of plain samples of `pipe`, whose classifier is used."""
        labels = [index % pipe.num_classes for index in range(self.num_samples)]
        parts = []
        for start in range(0, len(labels), self.batch_size):
            chosen = labels[start : start + self.batch_size]
            seeds = range(self.seed + start, self.seed + start + len(chosen))
            output = pipe.sample(
                chosen,
                seeds=list(seeds),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
            )
            parts.append(output.images.float().cpu() * 2 - 1)
        mean, cov = feature_moments(torch.cat(parts), pipe.classifier)
        distance = frechet_distance(self.mean, self.cov, mean, cov)
        return {"frechet_distance": float(distance), "samples": float(len(labels))}
