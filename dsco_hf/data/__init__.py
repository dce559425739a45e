"""Image-classification datasets: opened wherever they are, split, read as pixels, and their classes told by name."""

from .datasets import (
    class_mapping,
    class_names,
    dataset_fingerprint,
    find_columns,
    images_from_pixels,
    iterate_pixels,
    load_digits_dataset,
    load_image_dataset,
    load_pixels,
    load_splits,
    load_test_split,
    stratified_split,
)


__all__ = [
    "class_mapping",
    "class_names",
    "dataset_fingerprint",
    "find_columns",
    "images_from_pixels",
    "iterate_pixels",
    "load_digits_dataset",
    "load_image_dataset",
    "load_pixels",
    "load_splits",
    "load_test_split",
    "stratified_split",
]
