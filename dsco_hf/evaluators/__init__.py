"""Evaluators: networks, protocols and the training loop that tell how good a small dataset is."""

from .augmentation import Augmented, augment
from .batches import accuracy, check_same_classes, class_columns, model_classes
from .evaluation import ImageSet, TrainingJob, load_image_set, run_job, summarise, train_job
from .models import (
    ARCHITECTURES,
    ConvNetConfig,
    ConvNetForImageClassification,
    ConvNetModel,
    EvaluatorResNetConfig,
    EvaluatorResNetForImageClassification,
    EvaluatorResNetModel,
    build_evaluator,
)
from .protocols import PROTOCOLS, Protocol, get_protocol, protocol_from_dict, protocol_to_dict
from .training import Execution, TrainingDivergedError, TrainingResult, predict_logits, train_evaluator


__all__ = [
    "ARCHITECTURES",
    "PROTOCOLS",
    "Augmented",
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "ConvNetModel",
    "EvaluatorResNetConfig",
    "EvaluatorResNetForImageClassification",
    "EvaluatorResNetModel",
    "Execution",
    "ImageSet",
    "Protocol",
    "TrainingDivergedError",
    "TrainingJob",
    "TrainingResult",
    "accuracy",
    "augment",
    "build_evaluator",
    "check_same_classes",
    "class_columns",
    "get_protocol",
    "load_image_set",
    "model_classes",
    "predict_logits",
    "protocol_from_dict",
    "protocol_to_dict",
    "run_job",
    "summarise",
    "train_evaluator",
    "train_job",
]
