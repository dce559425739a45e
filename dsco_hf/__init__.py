"""dsco_hf: concentrates image-classification datasets with class-conditional diffusion models."""

from .concentration.additions.doping import dope, recorded_doping, select
from .concentration.additions.soft_labels import add_learned_labels, add_soft_labels
from .concentration.concentrate import ConcentrationReport, concentrate, concentrate_and_report
from .concentration.records import concentration_record
from .concentration.run_folder import RunSession
from .concentration.runs import concentrate_to_folder
from .concentration.selection import (
    AUM,
    CCS,
    D2,
    DUAL,
    EL2N,
    Clarity,
    Clearest,
    DynUnc,
    Forgetting,
    Herding,
    KCenter,
    Moderate,
    Random,
    RidgeRule,
    Selection,
    TrainingLog,
    log_training,
)
from .data.datasets import Pool, load_digits_dataset, load_image_dataset
from .evaluators import (
    ConvNetConfig,
    ConvNetForImageClassification,
    Execution,
    ImageSet,
    build_evaluator,
    get_protocol,
    load_image_set,
    train_evaluator,
)
from .generators.base import Denoiser, register_denoiser
from .generators.failures import NonFiniteError
from .hub.cards import DatasetCardFields
from .hub.publish import (
    PushOptions,
    publish,
    publish_evaluator,
    publish_pipeline,
    read_concentration,
    save_dataset_folder,
    verify,
)
from .hub.remake import load_recorded
from .matching.discrepancy import measure_discrepancy
from .matching.feature_spec import FeatureSpec
from .matching.objectives import RKHS, ClassifierEvidence, Objective, Ridge
from .matching.targets import MatchingTargets
from .sampling.call import Plain, Sampling, SamplingMethod
from .sampling.methods.nopt import NOpt
from .sampling.methods.released import QuantileTargets, Released
from .sampling.pipeline import DsCoPipeline, DsCoPipelineOutput
from .studies.figures.page import look
from .studies.generator_check import GeneratorCheck, check_generator
from .studies.lossless.efficiency import efficiency, recommended_doping
from .studies.lossless.find import find_lossless_budget
from .studies.lossless.search import SearchPlan
from .studies.study import Study, real_baselines


__version__ = "0.1.0"

__all__ = [
    "AUM",
    "CCS",
    "Clarity",
    "ClassifierEvidence",
    "Clearest",
    "ConcentrationReport",
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "D2",
    "DUAL",
    "DatasetCardFields",
    "Denoiser",
    "DsCoPipeline",
    "DsCoPipelineOutput",
    "DynUnc",
    "EL2N",
    "Execution",
    "FeatureSpec",
    "Forgetting",
    "GeneratorCheck",
    "Herding",
    "ImageSet",
    "KCenter",
    "MatchingTargets",
    "Moderate",
    "NOpt",
    "NonFiniteError",
    "Objective",
    "Plain",
    "Pool",
    "PushOptions",
    "QuantileTargets",
    "RKHS",
    "Random",
    "Released",
    "Ridge",
    "RidgeRule",
    "RunSession",
    "Sampling",
    "SamplingMethod",
    "SearchPlan",
    "Selection",
    "Study",
    "TrainingLog",
    "add_learned_labels",
    "add_soft_labels",
    "build_evaluator",
    "check_generator",
    "concentrate",
    "concentrate_and_report",
    "concentrate_to_folder",
    "concentration_record",
    "dope",
    "efficiency",
    "find_lossless_budget",
    "get_protocol",
    "load_digits_dataset",
    "load_image_dataset",
    "load_image_set",
    "load_recorded",
    "log_training",
    "look",
    "measure_discrepancy",
    "publish",
    "publish_evaluator",
    "publish_pipeline",
    "read_concentration",
    "real_baselines",
    "recommended_doping",
    "recorded_doping",
    "register_denoiser",
    "save_dataset_folder",
    "select",
    "train_evaluator",
    "verify",
]
