"""The Python of README and docs, run as it stands; a Hub on loopback has tiny models under the names in it."""

import re
from pathlib import Path

import pytest

from hub import Client, LoopbackHub
from hub.samples import TOKEN


ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
SKETCHES = ("docs/architecture.md",)  # of a network that the reader has
ALONE = "docs/get_started.md"  # on the pipeline that the package brings
# What a machine without a GPU, and a test, changes: where it runs, and how many images are drawn.
SMALLER = {
    '.to("cuda")': '.to("cpu")',
    "images_per_class=10": "images_per_class=2",
    "images_per_class=50": "images_per_class=4",
    "width=256": "width=8",
    "train_steps=1000": "train_steps=2",
    '(pipe, "imagenette")': '(pipe, "imagenette", samples_per_class=4)',
}


SET_UP = """
import datasets, dsco_hf, numpy, PIL.Image, texts, torch
from pathlib import Path
from conftest import tiny_resnet, tiny_transformer, tiny_vae
from diffusers import AutoencoderTiny, DDIMScheduler, DiTPipeline
from dsco_hf import DsCoPipeline
from dsco_hf.data.labels import label_set

def images(names):
    pixels = numpy.random.default_rng(0).integers(0, 256, (8 * len(names), 16, 16, 3), dtype=numpy.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    labels = [label for label in range(len(names)) for _ in range(8)]
    rows = {"image": [PIL.Image.fromarray(row) for row in pixels], "label": labels}
    return datasets.Dataset.from_dict(rows, features)

def folder(path, names):
    for name in names:
        (Path(path) / name).mkdir(parents=True)
        for index, image in enumerate(images([name])["image"]):
            image.save(Path(path) / name / f"{index}.png")

synonyms = {str(index): ", ".join(row.names) for index, row in enumerate(label_set("imagenet-1k"))}
dit = DiTPipeline(
    tiny_transformer(channels=4, out_channels=8, sample_size=8, classes=1000), tiny_vae(channels=3),
    DDIMScheduler(clip_sample=False, beta_schedule="linear"),
)
dit.register_to_config(id2label=synonyms)
dit.save_pretrained("hub/models/facebook/DiT-XL-2-256")
resnet = tiny_resnet(names=list(synonyms.values()), widths=(4, 4, 6, 6), image_size=64)
resnet.save_pretrained("hub/models/microsoft/resnet-18")
wnids = [row.wnid for row in label_set("imagenet-1k")]
nette = [synonyms[str(wnids.index(row.wnid))].split(",")[0] for row in label_set("imagenette")]
cifar = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
for repo, config, names in (("frgfm/imagenette", "320px", nette), ("uoft-cs/cifar10", "plain_text", cifar)):
    place = Path("hub/datasets", repo, config)
    place.mkdir(parents=True)
    images(names).to_parquet(place / "train-00000-of-00001.parquet")
    card = f"---\\nconfigs:\\n- config_name: {config}\\n  data_files: {config}/train-*.parquet\\n---\\n"
    (place.parent / "README.md").write_text(card, encoding="utf-8")

recorded = Path(dsco_hf.__file__).parents[1] / "recipes" / "results" / "cifar10_16px" / "results.json"
Path("results.json").write_text(recorded.read_text(encoding="utf-8"), encoding="utf-8")
folder("path/to/zoo/train", ["crane", "horse"])
folder("path/to/images", ["roses", "tulips"])
Path("mapping.yaml").write_text("crane: n02012849\\nhorse: 339\\n", encoding="utf-8")
DsCoPipeline(
    tiny_transformer(channels=3, classes=2), DDIMScheduler(clip_sample=False),
    classifier=tiny_resnet(names=("roses", "tulips"), image_size=8), id2label={0: "roses", 1: "tulips"},
).save_pretrained("outputs/generator")
tiny_resnet(names=("roses", "tulips"), image_size=8).save_pretrained("outputs/classifier")
stable = "hub/models/stable-diffusion-v1-5/stable-diffusion-v1-5"
texts.stable_diffusion(Path("sd"), length=77).save_pretrained(stable)
texts.stable_diffusion_xl(Path("sd"), length=77).save_pretrained("hub/models/stabilityai/stable-diffusion-xl-base-1.0")
texts.stable_diffusion_3(Path("sd"), length=77).save_pretrained(
    "hub/models/stabilityai/stable-diffusion-3-medium-diffusers"
)
preview = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
preview |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
AutoencoderTiny(**preview).save_pretrained("hub/models/madebyollin/taesdxl")
"""

RUN = """
import huggingface_hub
from pathlib import Path
scope, start, zoo = {}, None, None
for title, block in blocks:
    if start and scope["pipe"] is not start["pipe"]:
        scope = dict(start)  # docs go on from the examples of the README
    if "<commit>" in block:
        block = block.replace("<commit>", huggingface_hub.HfApi().dataset_info("user/imagenette-dsco").sha)
    exec(compile(block, title, "exec"), scope)
    start, zoo = start or dict(scope), scope.get("zoo", zoo)
names = {key: start[key].features["label"].names for key in ("small", "real")}
return {**names, "zoo": zoo.features["label"].names, "stored": start["mixed"].column_names}
"""


def python_blocks(path):
    """The Python blocks of a text, by the heading that each stands under, small enough for a test."""
    blocks, heading = [], ""
    text = (ROOT / path).read_text(encoding="utf-8")
    for found in re.finditer(r"^#+ (.*?)$|^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        heading = found[1] or heading
        if found[2]:
            block = found[2]
            for given, smaller in SMALLER.items():
                block = block.replace(given, smaller)
            blocks.append((f"{path}: {heading}", block))
    return blocks


@pytest.mark.slow
def test_the_first_example_runs_alone(capsys):
    """On the pipeline that the package brings, without a Hub."""
    title, block = python_blocks("README.md")[0]
    exec(compile(block.replace('("quick")', '("quick", steps=50)'), title, "exec"), {})
    assert 0.3 < float(re.search(r": ([0-9.]+)%", capsys.readouterr().out)[1]) / 100 < 1


@pytest.mark.slow
def test_the_first_ten_minutes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for title, block in python_blocks(ALONE):
        exec(compile(block.replace("steps=300", "steps=30"), title, "exec"), scope)
    assert len(scope["mixed"]) == len(scope["again"]) == 200 and (tmp_path / "look.html").stat().st_size > 10_000
    assert "doped to 200 images: " in capsys.readouterr().out


def test_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert not [page for page in PAGES if f"]({page}" not in text]


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_between_pages_lead_somewhere(page):
    """Files, and headings as GitHub names them."""
    path = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            file, _, heading = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            if heading:
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                names = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
                assert heading in names, link


@pytest.mark.slow
def test_python_of_readme_and_docs_runs_as_it_stands(tmp_path):
    pages = {page: python_blocks(page) for page in PAGES if page not in (*SKETCHES, ALONE)}
    first = pages.pop("docs/publish.md")  # the others read what it makes
    blocks = [*python_blocks("README.md")[1:], *first, *(block for page in pages.values() for block in page)]
    assert len(first) >= 2 and len(pages["docs/matching.md"]) >= 4
    with LoopbackHub(tmp_path / "server") as hub:
        hub.add_user("user", TOKEN)
        with Client(hub.url, tmp_path / "user", token=TOKEN) as user:
            user.run(SET_UP)
            for kind in ("models", "datasets"):
                for owner in (tmp_path / "user" / "hub" / kind).iterdir():
                    for folder in owner.iterdir():
                        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
                        hub.store.create(kind, f"{owner.name}/{folder.name}", private=False)
                        hub.put(f"{owner.name}/{folder.name}", files, kind=kind)
            # where its safetensors lie
            hub.store.add_ref("models", "facebook/DiT-XL-2-256", "refs/pr/1", "main")
            result = user.run(RUN, blocks=blocks)
        assert {"concentration.json", "README.md"} <= set(hub.files("user/imagenette-dsco"))
    assert len(result["small"]) == 10 and result["small"] == result["real"] and result["zoo"] == ["crane", "horse"]
    assert {"image", "label", "source", "real_index"} <= set(result["stored"])
