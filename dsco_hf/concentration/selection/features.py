"""What a network sees in real images, and its embedding: for rules that go by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ...data.datasets import Pool
from ...matching.features import features_and_logits
from ...matching.kernels import draw_frequencies, fourier_embedding, median_bandwidth
from ...sampling.pipeline import DsCoPipeline


def image_features(images: Pool, model: PreTrainedModel | str | None) -> torch.Tensor:
    """φ(x) `(N, d)`, float32: the pooled features of a classifier in eval mode; without one the pixels themselves."""
    if not isinstance(model, PreTrainedModel):
        return images.pixels().flatten(1)
    config = model.config
    batches = images.batches(128, getattr(config, "image_size", None), getattr(config, "num_channels", None))
    with torch.no_grad():
        return torch.cat([features_and_logits(model, b.to(model.device))[0].cpu() for b in batches])


def fourier_features(features: torch.Tensor, seed: int, dims: int = 2048) -> Callable[[torch.Tensor], torch.Tensor]:
    """ψ: `(n, d)` → `(n, D)` by the seed, standardised by `features`, with their median distance as bandwidth."""
    mean, std = features.mean(0), features.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    generator = torch.Generator().manual_seed(seed)
    sample = (features[torch.randperm(len(features), generator=generator)[:1000]] - mean) / std
    frequencies = draw_frequencies(features.shape[1], dims, median_bandwidth(sample), generator=generator)
    return lambda x: fourier_embedding((x - mean) / std, frequencies)


def seen_by(
    features: PreTrainedModel | str | None, images: Pool, pipe: DsCoPipeline | None, rule: str
) -> torch.Tensor:
    """φ `(N, d)`, float32, of what a rule says, or of the pipeline's classifier.

    Args:
        features (`PreTrainedModel` or "pixels", *optional*): the rule's own.
        images ([`Pool`]): N images.
        pipe (`DsCoPipeline`, *optional*): whose classifier is asked where the rule has none.
        rule (`str`): its name, for errors.

    Raises:
        ValueError: if nothing gives features, or some are no finite numbers.
    """
    model = features if features is not None or pipe is None else pipe.classifier
    if model is None:
        raise ValueError(
            f"{rule!r} goes by what a classifier sees, and there is none: pass a pipeline that has one as `pipe`, or "
            "`features=`, a classifier or 'pixels', to the rule."
        )
    phi = image_features(images, model)
    if not (finite := phi.isfinite().all(1)).all():
        raise ValueError(
            f"{rule!r} needs finite features, and {int((~finite).sum())} of {len(phi)} images have others, the first "
            f"in row {int(images.rows[int((~finite).int().argmax())])}: check the weights of the classifier, or pass "
            "another one as `features=`."
        )
    return phi
