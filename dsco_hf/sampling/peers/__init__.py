"""Methods of others as baselines on one bench, each one file, written from its description and named here."""

from .best_of_n import BestOfN
from .d4m import D4M, DDOQ
from .mgd3 import MGD3
from .statistics import ClassStatistics
from .uag import UAG


__all__ = ["BestOfN", "ClassStatistics", "D4M", "DDOQ", "MGD3", "UAG"]
