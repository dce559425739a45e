"""Rules that choose real images: each one object, a `Selection`."""

from .base import Clarity, Clearest, Herding, Random, Selection, clarity_scores, find_selection, recorded_selection
from .coverage import CCS, D2, KCenter, Moderate
from .difficulty import AUM, DUAL, EL2N, DynUnc, Forgetting
from .dynamics import TrainingLog, log_training
from .ridge_rule import RidgeRule


__all__ = [
    "AUM",
    "CCS",
    "D2",
    "DUAL",
    "EL2N",
    "Clarity",
    "Clearest",
    "DynUnc",
    "Forgetting",
    "Herding",
    "KCenter",
    "Moderate",
    "Random",
    "RidgeRule",
    "Selection",
    "TrainingLog",
    "clarity_scores",
    "find_selection",
    "log_training",
    "recorded_selection",
]
