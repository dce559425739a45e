"""Methods that steer how images are drawn. Each stands in one file, and is named here, so that its name is known."""

from .nopt import NOpt
from .released import QuantileTargets, Released


__all__ = ["NOpt", "QuantileTargets", "Released"]
