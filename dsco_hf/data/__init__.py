"""Image-classification datasets: opened wherever they are, split, read as pixels, and their classes told by name."""

from .datasets import class_mapping as class_mapping
from .datasets import class_names as class_names
from .datasets import dataset_fingerprint as dataset_fingerprint
from .datasets import find_columns as find_columns
from .datasets import images_from_pixels as images_from_pixels
from .datasets import iterate_pixels as iterate_pixels
from .datasets import load_digits_dataset as load_digits_dataset
from .datasets import load_image_dataset as load_image_dataset
from .datasets import load_pixels as load_pixels
from .datasets import load_splits as load_splits
from .datasets import load_test_split as load_test_split
from .datasets import stratified_split as stratified_split
