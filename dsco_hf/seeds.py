"""Where randomness comes from: one seed per image."""

from __future__ import annotations

import numpy as np


def image_seed(seed: int, label: int, index: int, stream: str = "image") -> int:
    """The seed of one image's noise: 48 bits from the run's seed, the generator's class and the image's index.

    Any image can be drawn again on its own, in any batch and by any process.
    """
    words = np.random.SeedSequence([seed, label, index, *stream.encode()]).generate_state(2)
    return int(words[0]) << 16 | int(words[1]) & 0xFFFF
