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
# # Read a published set
#
# A published set is an ordinary dataset: `load_dataset("user/name")` reads it without this package. So that this page needs no network, the
# set is a folder here; a repository of the Hub in its place works in the same way.

# %%
import tempfile

from datasets import load_dataset

from dsco_hf import (
    DsCoPipeline,
    build_evaluator,
    concentrate_and_report,
    get_protocol,
    load_digits_dataset,
    load_image_set,
    read_concentration,
    save_dataset_folder,
    train_evaluator,
)


digits = load_digits_dataset()
published = tempfile.mkdtemp()
pipe = DsCoPipeline.from_pretrained("digits")
made, report = concentrate_and_report(
    pipe, digits["train"], 2, guidance_scale=1.0, num_inference_steps=20, progress=False
)
save_dataset_folder(made, published)

# %% [markdown]
# ## Images, and what is told of each

# %%
small = load_dataset(published, split="train")
print(small.features)
print(small[0])

# %% [markdown]
# ## How it was made
#
# `concentration.json` beside the images says by which generator, with which settings, and at what cost.

# %%
record = read_concentration(published)
print({key: record[key] for key in list(record)[:6]})

# %% [markdown]
# ## What it teaches you
#
# Any training does. Those of the package are [protocols](../protocols.md), whose numbers can be compared.

# %%
protocol = get_protocol("quick", steps=200)
train = load_image_set(small, protocol=protocol, num_channels=1, progress=False)
test = load_image_set(digits["test"], protocol=protocol, num_channels=1, progress=False)
network = build_evaluator("convnet-2", class_names=train.names, image_size=8, num_channels=1)
print(f"{train_evaluator(network, train, protocol=protocol, test=test).accuracy:.1%}")
