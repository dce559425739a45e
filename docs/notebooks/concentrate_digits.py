# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Concentrate the digits
#
# A minute on a CPU, without a network: the generator and the classifier of the digits come with the package.

# %%
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from dsco_hf import (
    DsCoPipeline,
    Random,
    build_evaluator,
    concentrate,
    get_protocol,
    load_digits_dataset,
    load_image_set,
    select,
    train_evaluator,
)
from dsco_hf.evaluators import ImageSet
from dsco_hf.studies.figures.accuracy import draw_samples


BUDGETS = (1, 3)
digits = load_digits_dataset()
pipe = DsCoPipeline.from_pretrained("digits")

# %% [markdown]
# ## Draw
#
# Beside images whose noise is optimised (NOpt, the default), plain samples of the same generator with the same seeds. In both, a set of
# three images per class is drawn at once; in runs of many images, blocks nest.

# %%
options: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 20, "seed": 0, "progress": False}
sets = {("nopt", budget): concentrate(pipe, digits["train"], images_per_class=budget, **options) for budget in BUDGETS}
for budget in BUDGETS:
    sets["plain", budget] = concentrate(pipe, digits["train"], images_per_class=budget, method="plain", **options)
    sets["random", budget] = select(digits["train"], Random(), images_per_class=budget, seed=0)

# %% [markdown]
# ## Look
#
# Rows share their noise: what NOpt changed is what sets the class apart from the others.

# %%
protocol = get_protocol("quick", steps=200)


def as_images(dataset: Dataset) -> ImageSet:
    """In memory, as networks take them."""
    return load_image_set(dataset, protocol=protocol, num_channels=1, progress=False)


shown = {method: as_images(sets[method, 3]).first_of(range(10), 3) for method in ("random", "plain", "nopt")}
figure = draw_samples(shown, digits["train"].features["label"].names)
figure

# %% [markdown]
# ## What do they teach?
#
# A network is trained from scratch on each set, over seeds, and tested on images that nothing has seen.

# %%
test = as_images(digits["test"])


def accuracies(dataset: Dataset, seeds: Iterable[int] = range(2)) -> list[float | None]:
    """Of networks that differ by their seeds."""
    images = as_images(dataset)

    def network() -> PreTrainedModel:
        return build_evaluator("convnet-2", class_names=images.names, image_size=8, num_channels=1)

    return [train_evaluator(network, images, protocol=protocol, test=test, seed=seed).accuracy for seed in seeds]


found = {key: accuracies(dataset) for key, dataset in sets.items()}
for (method, budget), values in sorted(found.items()):
    print(f"{budget} per class, {method}: {', '.join(f'{value:.1%}' for value in values)}")
