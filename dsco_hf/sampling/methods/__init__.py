"""Methods that steer how images are drawn. Each stands in one file, and is named here, so that its name is known."""

from .combined import Combined, JointTargets
from .nopt import NOpt
from .released import QuantileTargets, Released


__all__ = ["Combined", "JointTargets", "NOpt", "QuantileTargets", "Released"]
