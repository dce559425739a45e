"""Small datasets and models on the Hugging Face Hub: published, checked, read and made again."""

from .publish import PublishResult as PublishResult
from .publish import PushOptions as PushOptions
from .publish import load_recorded as load_recorded
from .publish import publish as publish
from .publish import publish_evaluator as publish_evaluator
from .publish import publish_pipeline as publish_pipeline
from .publish import read_concentration as read_concentration
from .publish import save_dataset_folder as save_dataset_folder
from .publish import verify as verify
