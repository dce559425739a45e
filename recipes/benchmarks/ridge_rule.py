"""Time and memory of the ridge rule against the number of images that it chooses from.

    python recipes/benchmarks/ridge_rule.py --out ridge_rule.json

The greedy choice alone, on embeddings of random features of ten classes: reading images and asking a network costs
what it costs every rule. Each size is a process of its own. `pick_ms` is the time of a pick between two refreshes,
`refresh_seconds` that of computing all numbers anew, once in 256 picks, `begin_seconds` that of the moments of the
population; `memory` is the peak of the process above what it held before, in units of one embedding of four bytes a
number for each image. `whole_run_minutes` follows from them for `--share` of the images.

Prints one JSON object as its last line. `pick_linearity`: time of a pick per image at the largest size by that at the
smallest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from dsco_hf.concentration.selection.ridge_rule import CHUNK, REFRESH, RidgeGreedy
from dsco_hf.matching.kernels import draw_frequencies, fourier_embedding, median_bandwidth
from dsco_hf.utils.progress import peak_bytes


CLASSES, FEATURES = 10, 64


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000], help="images")
    parser.add_argument("--picks", type=int, default=50, help="that are timed")
    parser.add_argument("--embedding_dim", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    measured = []
    for size in options.sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured.append(pool.apply(measure, (size, options.picks, options.embedding_dim)))
            pool.close()
            pool.join()
    for row in measured:
        picks = round(options.share * row["images"])
        seconds = picks * row["pick_ms"] / 1000 + -(-picks // REFRESH) * row["refresh_seconds"]
        row["whole_run_minutes"] = round((row["begin_seconds"] + seconds) / 60, 2)
    each = [row["pick_ms"] / row["images"] for row in measured]
    results = {
        "pick_linearity": round(each[-1] / each[0], 3),
        "memory": measured[-1]["memory"],
        "measured": measured,
        "threads": 1,
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key != "out"},
    }
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def measure(images: int, picks: int, dims: int) -> dict[str, Any]:
    """Seconds and memory of some picks from so many images; CPU time of this process, which others do not disturb."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, FEATURES, generator=generator) / 2
    labels = torch.randint(0, CLASSES, (images,), generator=generator)

    def features(rows: torch.Tensor) -> torch.Tensor:
        return means[rows] + torch.randn(len(rows), FEATURES, generator=generator)

    sample = features(labels[:1000])
    frequencies = draw_frequencies(FEATURES, dims, median_bandwidth(sample), generator=generator)
    before = peak_bytes()
    psi = torch.empty(images, dims, dtype=torch.float16)
    for rows in torch.arange(images).split(CHUNK):
        psi[rows] = fourier_embedding(features(labels[rows]), frequencies).half()
    start = time.process_time()
    greedy = RidgeGreedy(psi, labels, CLASSES, 2.0)
    begun = time.process_time() - start
    start = time.process_time()
    greedy.refresh()
    refreshed = time.process_time() - start
    start = time.process_time()
    greedy.pick(picks)
    seconds = (time.process_time() - start - refreshed) / picks  # its first one computes all numbers anew
    return {
        "images": images,
        "pick_ms": round(1000 * seconds, 2),
        "refresh_seconds": round(refreshed, 2),
        "begin_seconds": round(begun, 2),
        "memory": round((peak_bytes() - before) / (4 * images * dims), 3),
        "peak_mib": round(peak_bytes() / 2**20, 1),
    }


if __name__ == "__main__":
    main()
