"""dsco_hf: concentrates image-classification datasets with class-conditional diffusion models."""

from .cards import DatasetCardFields
from .concentrate import ConcentrationReport, concentrate, concentrate_and_report, measure_discrepancy
from .data import load_digits_dataset, load_image_dataset
from .doping import clearest, dope
from .evaluators import ConvNetConfig, ConvNetForImageClassification, build_evaluator, get_protocol, train_evaluator
from .failures import NonFiniteError
from .feature_spec import FeatureSpec
from .generator_evaluation import GeneratorCheck, check_generator
from .hub import publish, publish_evaluator, publish_pipeline, read_concentration, save_dataset_folder, verify
from .objectives import ClassifierObjective
from .pipeline import DsCoPipeline, DsCoPipelineOutput
from .quantile import QuantileTargets
from .records import concentration_record
from .remake import load_recorded
from .runs import concentrate_to_folder
from .targets import MatchingTargets


__version__ = "0.1.0"

__all__ = [
    "ClassifierObjective",
    "ConcentrationReport",
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "DatasetCardFields",
    "DsCoPipeline",
    "DsCoPipelineOutput",
    "FeatureSpec",
    "GeneratorCheck",
    "MatchingTargets",
    "NonFiniteError",
    "QuantileTargets",
    "build_evaluator",
    "check_generator",
    "clearest",
    "concentrate",
    "concentrate_and_report",
    "concentrate_to_folder",
    "concentration_record",
    "dope",
    "get_protocol",
    "load_digits_dataset",
    "load_image_dataset",
    "load_recorded",
    "measure_discrepancy",
    "publish",
    "publish_evaluator",
    "publish_pipeline",
    "read_concentration",
    "save_dataset_folder",
    "train_evaluator",
    "verify",
]
