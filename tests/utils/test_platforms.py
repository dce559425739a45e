"""What needs no accelerator works where the system has no `resource`, `fork`, `fcntl`, ...: all are hidden here."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dsco_hf


PACKAGE = Path(dsco_hf.__path__[0])
RECIPES = PACKAGE.parent / "recipes"
NO_TEXT = {"Image", "os", "PIL", "tarfile", "zipfile"}  # whose `open` opens something else

# The libraries first: they have their own ways round. Then everything that Windows lacks goes.
WITHOUT = """
import ctypes, os, signal, sys
import accelerate, datasets, diffusers, evaluate, filelock, matplotlib.pyplot, sklearn.model_selection
import torch, transformers
from pathlib import Path
import torch._dynamo  # optimisers import it late

for name in ("resource", "fcntl", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in ("fork", "sched_getaffinity", "O_DIRECTORY", "geteuid", "getuid", "uname", "sysconf", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1"):
    if hasattr(signal, name):
        delattr(signal, name)
opened = os.open

def as_on_windows(path, flags, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return opened(path, flags, *args, **kwargs)

def no_library(name, *args, **kwargs):
    raise TypeError("bad argument type for built-in operation")

os.open, ctypes.CDLL = as_on_windows, no_library
sys.platform = "win32"
"""

STORY = """
import numpy as np, PIL.Image
from accelerate import Accelerator
from diffusers import DDIMScheduler, DiTTransformer2DModel
from dsco_hf import (
    DsCoPipeline, Execution, ImageSet, MatchingTargets, RunSession, build_evaluator, concentrate_to_folder, dope,
    get_protocol, load_digits_dataset, save_dataset_folder, train_evaluator, verify,
)
from dsco_hf.concentration.concentrate import peak_memory_bytes
from dsco_hf.utils.configs import keep_freed_memory
from dsco_hf.hub.folder import read_folder
from dsco_hf.generators.training import train_generator
from dsco_hf.generators.denoisers import GeneratorTrainingConfig

work = Path(sys.argv[1])
torch.manual_seed(0)
dit = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=4, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
    num_embeds_ada_norm=10, norm_num_groups=1,
).eval()
real = load_digits_dataset()["train"].select(range(60))
names = real.features["label"].names
classifier = build_evaluator("convnet-2", class_names=names, image_size=8, num_channels=1, width=4, seed=0)
pixels, labels = torch.rand(20, 1, 8, 8) * 2 - 1, torch.arange(20) % 10
accelerator = Accelerator(cpu=True)
train_evaluator(
    classifier, ImageSet(pixels, labels), protocol=get_protocol("quick", epochs=2), execution=Execution(accelerator),
    checkpoint=work / "checkpoint.safetensors", checkpoint_seconds=0,
)
tiny = GeneratorTrainingConfig(num_layers=1, num_attention_heads=2, attention_head_dim=4, train_steps=2, batch_size=4)
train_generator(
    pixels, labels, tiny, num_classes=10, accelerator=accelerator, checkpoint_dir=work / "generator", progress=False
)
pipe = DsCoPipeline(dit, DDIMScheduler(), classifier=classifier.eval(), id2label=dict(enumerate(names)))
pipe.save_pretrained(work / "pipe")
pipe = DsCoPipeline.from_pretrained(work / "pipe")
targets = MatchingTargets.from_dataset(real, pipe, embedding_dim=16, work_dir=work / "pass", progress=False)
targets.save_pretrained(work / "targets")
run = concentrate_to_folder(
    pipe, MatchingTargets.from_pretrained(work / "targets"), 1, work / "run", num_inference_steps=2,
    guidance_scale=1.0, session=RunSession(accelerator=accelerator), progress=False,
)
save_dataset_folder({"ipc1": run.dataset()}, work / "set")
verify(work / "set")
rows = read_folder(work / "set")["configs"]["ipc1"]["train"]
assert len(rows) == 10 and rows.features["label"].names == names
assert peak_memory_bytes(pipe) > 0 and keep_freed_memory() is False
print("told to the end")
"""


@pytest.mark.slow
def test_the_whole_story_without_what_windows_lacks(tmp_path):
    code = f"{WITHOUT}\n{STORY}"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "ACCELERATE_USE_CPU": "true"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert told.stdout.endswith("told to the end\n"), told.stderr[-3000:]


def opens_text(call):
    """Whether a call opens a text file without saying its encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if any(keyword.arg in ("encoding", None) for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return True
    value = getattr(call.func, "value", None)
    owner = getattr(value, "id", getattr(value, "attr", ""))  # of `Image.open` and of `PIL.Image.open`: Image
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return name == "open" and owner not in NO_TEXT and not any("b" in str(mode) for mode in modes[:2])


def test_text_files_name_their_encoding():
    """The default of Windows is that of its language."""
    found = []
    for path in (*PACKAGE.rglob("*.py"), *RECIPES.rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{path.name}:{call.lineno}" for call in calls if opens_text(call)]
    assert found == []
