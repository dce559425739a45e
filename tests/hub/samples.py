"""Small datasets and records to publish."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import PIL.Image


TOKEN = "hf_" + "AnnsTokenForTests" * 2  # of the shape that real ones have

HOSTILE_NAMES = [
    "](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "---",
    "<script>alert(1)</script>",
    "a | b",
    "x" * 10_000,
    "line\nbreak\n---\nlicense: mit\n---\n# Title",
    "`code` *bold* _it_ ~~no~~ $x$",
    "<!-- dsco_hf:end -->",
    "@everyone www.evil.example",
    "\u202egnp.exe\u2028next",
    "{{ 7 * 7 }} {% raw %}",
    "日本語 🐱",
    "null",
    "1e3",
    "'quote\"",
    ": # yaml",
    "&amp; \\",
]

RECORD = {
    "method": "nopt",
    "seed": 0,
    "parameters": {"images_per_class": 10, "num_inference_steps": 20, "noise": {"step_size": 0.5}},
    "source": {
        "dataset": "ann/digits",
        "revision": "5" * 40,
        "fingerprint": "0123456789abcdef",
        "split": "train",
        "rows": 1437,
        "license": "cc-by-4.0",
    },
    "generator": {"id": "facebook/DiT-XL-2-256", "revision": "6" * 40},
    "classifier": {"id": "microsoft/resnet-18", "revision": "7" * 40},
    "versions": {"dsco_hf": "0.1.0", "torch": "2.13.0"},
    "cost": {"denoiser_calls": 420, "decoder_calls": 0, "seconds": 12.34, "peak_memory_bytes": 2**28},
}

RESULTS = {
    "dataset": "ann/digits",
    "config": {"evaluator": {"architecture": "convnet", "steps": 400}, "labels": "hard"},
    "full": {"accuracy_mean": 0.9979, "accuracy_std": 0.0014, "seeds": 4, "images": 1437},
    "rows": [
        {
            "method": method,
            "images_per_class": per_class,
            "images": 10 * per_class,
            "accuracy_mean": mean,
            "accuracy_std": std,
            "synthesis_seeds": 2,
            "training_seeds": 3,
            "discrepancy": discrepancy,
            "seconds": seconds,
            "denoiser_calls": 400,
            "decoder_calls": 0,
        }
        for method, per_class, mean, std, discrepancy, seconds in [
            ("nopt", 10, 0.968, 0.0031, 0.0031, 12.3),
            ("plain", 10, 0.958, 0.004, 0.0158, 6.1),
            ("random", 10, 0.953, 0.0052, None, 0.0),
            ("nopt", 1, 0.906, 0.012, 0.0394, 3.9),
        ]
    ],
}


def tiny_dataset(
    per_class: int | Sequence[int] = 2,
    names: Sequence[str] = ("cat", "dog"),
    *,
    seed: int = 0,
    side: int = 8,
    mode: str = "L",
    real: int = 0,
    soft_labels: bool = False,
) -> datasets.Dataset:
    """Noise images with the columns of a concentrated dataset; the last `real` rows are marked as real ones."""
    counts = [per_class] * len(names) if isinstance(per_class, int) else list(per_class)
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    rng = np.random.default_rng(seed)
    shape = (side, side) if mode == "L" else (side, side, 3)
    images = [PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for _ in labels]
    sources = [int(i >= len(labels) - real) for i in range(len(labels))]
    columns = {
        "image": images,
        "label": labels,
        "source": sources,
        "seed": [seed] * len(labels),
        "block": [0] * len(labels),
        "real_index": [i if source else -1 for i, source in enumerate(sources)],
    }
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(names)),
        "source": datasets.ClassLabel(names=["synthetic", "real"]),
        "seed": datasets.Value("int64"),
        "block": datasets.Value("int64"),
        "real_index": datasets.Value("int64"),
    }
    if soft_labels:
        logits = rng.normal(size=(len(labels), len(names)))
        columns["soft_label"] = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).tolist()
        features["soft_label"] = datasets.List(datasets.Value("float32"))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
