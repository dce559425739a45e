"""Objectives: what the images of a class should achieve. Each of them stands in one file, and is named here."""

from .base import Bound, Objective, check_kind, class_means, class_sums
from .evidence import ClassifierEvidence, batchnorm_distance, class_evidence, class_margin, repulsion
from .mean_matching import RKHS, contrasted_means, rkhs
from .regression import Ridge, ridge, unexplained


__all__ = [
    "Bound",
    "ClassifierEvidence",
    "Objective",
    "RKHS",
    "Ridge",
    "batchnorm_distance",
    "check_kind",
    "class_evidence",
    "class_margin",
    "class_means",
    "class_sums",
    "contrasted_means",
    "repulsion",
    "ridge",
    "rkhs",
    "unexplained",
]
