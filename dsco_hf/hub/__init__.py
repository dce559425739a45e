"""Small datasets and models on the Hugging Face Hub: published, checked, read and made again."""

from .publish import (
    PublishResult,
    PushOptions,
    load_recorded,
    publish,
    publish_evaluator,
    publish_pipeline,
    read_concentration,
    save_dataset_folder,
    verify,
)


__all__ = [
    "PublishResult",
    "PushOptions",
    "load_recorded",
    "publish",
    "publish_evaluator",
    "publish_pipeline",
    "read_concentration",
    "save_dataset_folder",
    "verify",
]
