"""dsco_hf: concentrates image-classification datasets with class-conditional diffusion models."""

from .concentrate import ConcentrationReport, concentrate, concentrate_and_report, measure_discrepancy
from .data import load_digits_dataset, load_image_dataset
from .doping import dope
from .evaluators import ConvNetConfig, ConvNetForImageClassification, build_evaluator, get_protocol, train_evaluator
from .hub import publish, publish_pipeline, verify
from .objectives import ClassifierObjective
from .pipeline import DsCoPipeline, DsCoPipelineOutput
from .quantile import QuantileTargets
from .targets import MatchingTargets


__version__ = "0.1.0"

__all__ = [
    "ClassifierObjective",
    "ConcentrationReport",
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "DsCoPipeline",
    "DsCoPipelineOutput",
    "MatchingTargets",
    "QuantileTargets",
    "build_evaluator",
    "concentrate",
    "concentrate_and_report",
    "dope",
    "get_protocol",
    "load_digits_dataset",
    "load_image_dataset",
    "measure_discrepancy",
    "publish",
    "publish_pipeline",
    "train_evaluator",
    "verify",
]
