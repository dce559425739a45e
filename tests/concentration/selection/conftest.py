"""What the rules choose from, and a training to score it by."""

import pytest
import torch

from dsco_hf import Pool, TrainingLog


@pytest.fixture
def pool(real_images):
    return Pool(real_images, progress=False)


@pytest.fixture
def training(pool):
    """Twelve epochs of random values of the 21 real images."""
    values = torch.rand(3, 12, 21, generator=torch.Generator().manual_seed(1))
    return TrainingLog(values[0], 2 * values[1] - 1, values[2], pool.fingerprint)
