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
# # Your own images
#
# A folder with one folder of images per class is all that is needed. Here such a folder is made of the digits 0 to 2; put the path of
# yours in its place.

# %%
import tempfile
from pathlib import Path

from dsco_hf import DsCoPipeline, MatchingTargets, concentrate, dope, load_digits_dataset, look, save_dataset_folder
from dsco_hf.data.datasets import load_splits


work = Path(tempfile.mkdtemp())
folder = work / "images"
for index, row in enumerate(load_digits_dataset()["train"]):
    if row["label"] < 3:
        place = folder / str(row["label"])
        place.mkdir(parents=True, exist_ok=True)
        row["image"].save(place / f"{index}.png")

# %% [markdown]
# Test images are those of a `test` or `validation` folder; without one, a fifth of every class is left out, the same in every recipe.

# %%
real, test, taken = load_splits(str(folder))
print(taken, real.features["label"].names, len(real), "training images")

# %% [markdown]
# ## A generator of your classes
#
# The generator of the digits knows these classes by name. For classes that no generator knows, train one first:
#
# ```bash
# dsco train_classifier --dataset path/to/images
# dsco train_generator --config recipes/configs/generator_32px_cpu.yaml --dataset path/to/images --classifier outputs/classifier
# ```
#
# and load it with `DsCoPipeline.from_pretrained("outputs/generator")`.

# %%
pipe = DsCoPipeline.from_pretrained("digits")
targets = MatchingTargets.from_dataset(real, pipe, progress=False)
small = concentrate(pipe, targets, images_per_class=3, guidance_scale=1.0, num_inference_steps=20, progress=False)

# %% [markdown]
# ## Mix real images in, look, and keep

# %%
mixed = dope(small, real, pipe, images_per_class=6, progress=False)
print(mixed.to_pandas().groupby(["label", "source"]).size())
look(mixed, work / "look.html", real=real, pipe=pipe)
save_dataset_folder(mixed, work / "dataset")
print(sorted(path.name for path in (work / "dataset").iterdir()))
