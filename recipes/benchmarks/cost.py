"""What NOpt costs at the size that users run: DiT-XL/2 at 256 px with guidance, random weights.

    python recipes/benchmarks/cost.py --out cost.json        1 image and 10 steps on a CPU, 10 and 50 on a GPU
    python recipes/benchmarks/cost.py --images_per_class 10 --num_classes 8 --num_inference_steps 50
    python recipes/benchmarks/cost.py --tiny --rounds 1

DiT-XL/2 and AutoencoderKL as in facebook/DiT-XL-2-256, a stock AutoencoderTiny as the preview decoder, ResNet-18 at
224 px, guidance 4. Each method runs in a process of its own, where its peak memory is measured too; plain sampling and
NOpt take turns. Methods:

    plain                   sampling without optimisation
    nopt                    as by default: every step, conditional look-ahead, preview decoder
    nopt_full_decoder       the same without a preview decoder
    field                   the field's unit: plain sampling in 50 steps
    default                 NOpt at all its defaults, steps included
    from_centroids          "d4m+nopt" at its defaults: the last 11 of 16 steps; its pass over the data is not in it
    quantile                the released algorithm: every step, 200 iterations, 1,300 real latents a class. On a CPU a
                            tenth of the iterations and of the latents is done, and its optimisation, linear in
                            both, is taken ten times; such figures are called `extrapolated`

Prints one JSON object as its last line. `nopt_over_plain`, `nopt_full_decoder_over_plain`, `quantile_over_plain`
(or `quantile_extrapolated_over_plain`): seconds per image by those of plain sampling; `nopt_over_quantile` likewise;
`memory_nopt_over_plain`: peak memory; `nopt_over_plain_at_50_steps_predicted`: the cost model with the measured
seconds of each part; `denoiser_fraction_of_matmul`: the denoiser's rate by that of large matrix multiplications in
this run; `default_over_field`, `from_centroids_over_field`: seconds per image by those of plain sampling in 50 steps,
and `..._flops`: likewise in FLOPs; `methods`: seconds, calls, peak memory and seconds by part of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsco_hf.costs.passes import Rehearsal, stand_in_targets, weighted
from dsco_hf.costs.probe import imagenet_pipeline, median_seconds, probe_seconds, synchronize
from dsco_hf.costs.tracing import pass_costs, predict_memory
from dsco_hf.sampling.call import Plain, Sampling, SamplingMethod, calls
from dsco_hf.sampling.methods.combined import Combined
from dsco_hf.sampling.methods.nopt import NOpt
from dsco_hf.sampling.methods.released import QuantileTargets, Released
from dsco_hf.sampling.peers.d4m import D4M
from dsco_hf.sampling.pipeline import DsCoPipeline
from dsco_hf.utils import progress as memory


METHODS = ("plain", "nopt", "field", "default", "from_centroids", "nopt_full_decoder", "quantile")
# With their usual steps: 50 of plain sampling.
OF_FIELD: dict[str, SamplingMethod] = {"field": Plain(), "default": NOpt(), "from_centroids": D4M() + NOpt()}
GUIDANCE, ITERATIONS, POPULATION = 4.0, 200, 1300
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs every method in its own process and puts the figures together."""
    options = parse(arguments)
    if options.worker is not None:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        turns = [name for name in METHODS[:2] if name in options.methods] * options.rounds
        order = turns + [name for name in METHODS[2:] if name in options.methods]
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for turn, name in enumerate(order):
            runs[name].append(run_worker(name, options, Path(folder) / f"{turn}.json"))
        probed = run_worker("probe", options, Path(folder) / "probe.json")
    results = summarise(runs, probed, options)
    text = json.dumps(results)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; those that depend on the device are filled in."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images_per_class", type=int, default=10 if gpu else 1)
    parser.add_argument("--num_classes", type=int, default=1)
    parser.add_argument("--num_inference_steps", type=int, default=50 if gpu else 10)
    parser.add_argument("--divisor", type=int, default=1 if gpu else 10, help="part of the released algorithm's work")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=2, help="turns of plain sampling and the default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tiny", action="store_true", help="the same classes at a size for tests")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_worker(name: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One method in a fresh process, whose peak memory is its own."""
    command = [sys.executable, __file__, "--worker", name, "--out", str(out), *(["--tiny"] if options.tiny else [])]
    for key in ("images_per_class", "num_classes", "num_inference_steps", "divisor", "dtype"):
        command += [f"--{key}", str(getattr(options, key))]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed with exit status {done.returncode}:\n{done.stdout}\n{done.stderr}")
    print(f"{name}: {time.perf_counter() - begin:.1f} s with loading", file=sys.stderr, flush=True)
    return json.loads(out.read_text(encoding="utf-8"))


def work(options: argparse.Namespace) -> dict[str, Any]:
    """The worker: one method's run, or the probe."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = imagenet_pipeline(
        device=device, dtype=DTYPES[options.dtype], preview=options.worker != "nopt_full_decoder", tiny=options.tiny
    )
    measured = probe(pipe, options) if options.worker == "probe" else run_method(pipe, options)
    options.out.write_text(json.dumps(measured), encoding="utf-8")
    return measured


def call_options(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """How the pipeline is called for a method."""
    call: dict[str, Any] = {"guidance_scale": GUIDANCE}
    if name in OF_FIELD:
        return call | {"method": OF_FIELD[name]}
    call["num_inference_steps"] = options.num_inference_steps
    if name == "plain":
        call["method"] = Plain()
    elif name == "quantile":
        call["method"] = Released(ITERATIONS // options.divisor)
    else:
        call["method"] = NOpt()
    return call


def targets_for(pipe: DsCoPipeline, name: str, options: argparse.Namespace) -> Any:
    """Targets of the right shapes; their values do not change the cost."""
    if name != "quantile":
        return stand_in_targets(pipe, call_options(name, options)["method"])
    side, channels = pipe.image_size // pipe.vae_scale_factor, pipe.denoiser.config.in_channels
    generator = torch.Generator().manual_seed(0)
    count = (50 if options.tiny else POPULATION) // options.divisor
    latents = [torch.randn(count, channels, side, side, generator=generator) for _ in range(options.num_classes)]
    labels = list(range(options.num_classes))
    return QuantileTargets([str(label) for label in labels], labels, latents)


def run_method(pipe: DsCoPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, calls, peak memory and seconds by part of one call; on a GPU after a first one that is not counted."""
    name, device = options.worker, pipe.device
    labels = [label for label in range(options.num_classes) for _ in range(options.images_per_class)]
    call, targets = call_options(name, options), targets_for(pipe, name, options)
    # kernels are loaded and chosen in a first call: two or three steps, one of them optimised
    method = call["method"]
    once = method.with_iterations(1)
    first = call | {"num_inference_steps": 3 if isinstance(method, Combined) else 2, "method": once}
    batch_size: int | None = None
    while True:
        timers = Timers(pipe, type(method))
        try:
            pipe.sample(labels, targets, seeds=range(len(labels)), batch_size=batch_size, **first)
            if name == "quantile":
                targets = targets_for(pipe, name, options)  # nothing of the first call is to be reused
            weights = reset_peak(device)
            begin = time.perf_counter()
            with timers:
                output = pipe.sample(labels, targets, seeds=range(len(labels)), batch_size=batch_size, **call)
            synchronize(device)
            seconds = time.perf_counter() - begin
            break
        except torch.cuda.OutOfMemoryError:
            batch_size = (batch_size or len(labels)) // 2
            if batch_size == 0:
                raise
            torch.cuda.empty_cache()
    counted = {key: getattr(output, key) for key in ("denoiser_calls", "decoder_calls", "classifier_calls")}
    expected = calls(Rehearsal(pipe, Sampling.of(batch_size=batch_size, **call)).passes(len(labels)))
    if counted != expected:
        raise AssertionError(f"{name} made {counted} calls, the cost model expects {expected}.")
    predicted = predict_memory(
        pipe, len(labels), pass_costs(pipe), optimised=name not in ("plain", "field", "quantile"),
        guidance_scale=GUIDANCE, batch_size=batch_size,
    )  # fmt: skip
    peak = peak_bytes(device)
    return {
        "seconds": seconds,
        "images": len(labels),
        "batch_size": batch_size or len(labels),
        "peak_memory_gib": peak / 2**30,
        "memory_before_gib": weights / 2**30,
        "predicted_tensors_gib": predicted / 2**30,
        "parts": timers.parts(seconds),
        **counted,
    }


class Timers:
    """Wall time of the parts of a sampling call. On a GPU each part waits for the device, which costs little here."""

    def __init__(self, pipe: DsCoPipeline, method: Any) -> None:
        self.method, self.noise = method, method.noise
        self.pipe, self.seconds, self.depth = pipe, defaultdict(float), defaultdict(int)
        self.optimising = 0

    def __enter__(self) -> Timers:
        pipe: Any = self.pipe
        pipe.predict_noise = self.timed(pipe.predict_noise, lambda: "lookahead" if self.optimising else "denoiser")
        pipe.decode_latents = self.timed(
            pipe.decode_latents, lambda: "preview_forward" if self.optimising else "decoder"
        )
        self.method.noise = self.timed(self.noise, lambda: "optimisation", optimises=True)
        pipe.classifier.forward = self.timed(
            pipe.classifier.forward, lambda: "classifier_forward" if self.optimising else "checks"
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.method.noise = self.noise
        for name in ("predict_noise", "decode_latents"):
            del self.pipe.__dict__[name]
        del self.pipe.classifier.__dict__["forward"]

    def timed(self, function: Callable, name_of: Callable[[], str], *, optimises: bool = False) -> Callable:
        """The function with its wall time added to a part; of nested calls of it, only the outermost counts."""

        def run(*arguments: Any, **options: Any) -> Any:
            name = name_of()
            outermost = self.depth[name] == 0
            self.depth[name] += 1
            self.optimising += optimises
            synchronize(self.pipe.device)
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                synchronize(self.pipe.device)
                self.optimising -= optimises
                self.depth[name] -= 1
                if outermost:
                    self.seconds[name] += time.perf_counter() - begin

        return run

    def parts(self, total: float) -> dict[str, float]:
        """Seconds by part; `backward_and_objective` is what remains of the optimisation, `rest` of the call."""
        found = {
            name: self.seconds[name] for name in ("denoiser", "lookahead", "preview_forward", "classifier_forward")
        }
        inside = sum(found[name] for name in ("lookahead", "preview_forward", "classifier_forward"))
        found["backward_and_objective"] = self.seconds["optimisation"] - inside
        found["decoder"] = self.seconds["decoder"]
        found["rest"] = total - self.seconds["denoiser"] - self.seconds["optimisation"] - found["decoder"]
        return {name: round(value, 4) for name, value in found.items()}


def reset_peak(device: torch.device) -> int:
    """Forgets the peak so far, where that is possible; bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # Linux: the peak of the process becomes what it holds
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resident_peak()


def peak_bytes(device: torch.device) -> int:
    """Most bytes of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def resident_peak() -> int:
    """VmHWM of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return memory.peak_bytes()


def probe(pipe: DsCoPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one pass of each kind, and the device's rate of large matrix multiplications."""
    images = options.images_per_class * options.num_classes
    nopt = Sampling(options.num_inference_steps, GUIDANCE, method=NOpt())
    seconds = probe_seconds(Rehearsal(pipe, nopt), images, images_per_class=options.images_per_class, repeats=2)
    costs = pass_costs(pipe)
    size = 256 if options.tiny else 8192 if pipe.device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=pipe.device).to(DTYPES[options.dtype]) for _ in range(2))
    matmul = 2 * size**3 / median_seconds(lambda: a @ b, pipe.device, repeats=10)
    flops = {kind: cost.flops for kind, cost in costs.items()}
    work_of = {}
    for steps in (options.num_inference_steps, 50):
        steered_by = nopt if steps == options.num_inference_steps else Sampling(steps, GUIDANCE)
        both = (steered_by, Sampling(steps, GUIDANCE, method=Plain()))
        counts = [Rehearsal(pipe, sampling).passes(images) for sampling in both]
        for unit, rates in (("seconds", seconds), ("flops", flops)):
            steered, plain = (weighted(passes, rates) for passes in counts)
            work_of[f"{unit}_at_{steps}"] = steered / plain
    spent = {name: weighted(Rehearsal(pipe, Sampling.of(**call_options(name, options))).passes(images), flops)
             for name in OF_FIELD}  # fmt: skip
    return {
        "over_field": {name: work / spent["field"] for name, work in spent.items() if name != "field"},
        "seconds_per_image_pass": {kind: round(value, 6) for kind, value in seconds.items()},
        "tflops": {"denoiser": round(flops["denoiser"] / seconds["denoiser"] / 1e12, 4)},
        "matmul_tflops": matmul / 1e12,
        "ratios": work_of,
    }


def summarise(
    runs: dict[str, list[dict[str, Any]]], probed: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of all runs."""
    methods: dict[str, Any] = {}
    for name, found in runs.items():
        middle = sorted(found, key=lambda run: run["seconds"])[(len(found) - 1) // 2]
        seconds = statistics.median(run["seconds"] for run in found)
        methods[name] = middle | {
            "seconds_per_image": seconds / middle["images"],
            "peak_memory_gib": max(run["peak_memory_gib"] for run in found),
            "seconds": [round(run["seconds"], 3) for run in found],
        }
    quantile = "quantile"
    if "quantile" in methods and options.divisor > 1:
        entry, quantile = methods.pop("quantile"), "quantile_extrapolated"
        part = sum(value for key, value in entry["parts"].items() if key == "backward_and_objective")
        entry["measured_seconds_per_image"] = entry["seconds_per_image"]
        entry["seconds_per_image"] += (options.divisor - 1) * part / entry["images"]
        entry["iterations_done"], entry["iterations"] = ITERATIONS // options.divisor, ITERATIONS
        methods[quantile] = entry
    per_image = {name: entry["seconds_per_image"] for name, entry in methods.items()}
    plain = methods.get("plain")
    figures: dict[str, Any] = {}
    for name, entry in methods.items():
        if plain is not None and name != "plain":
            figures[f"{name}_over_plain"] = per_image[name] / per_image["plain"]
            figures[f"memory_{name}_over_plain"] = entry["peak_memory_gib"] / plain["peak_memory_gib"]
    if "nopt" in methods and quantile in methods:
        figures[f"nopt_over_{quantile}"] = (
            methods["nopt"]["seconds_per_image"] / methods[quantile]["seconds_per_image"]
        )
    for name in ("default", "from_centroids"):
        if name in methods and "field" in methods:
            figures[f"{name}_over_field"] = per_image[name] / per_image["field"]
    ratios = probed.pop("ratios")
    figures |= {f"{name}_over_field_flops": value for name, value in probed.pop("over_field").items()}
    figures["nopt_over_plain_predicted"] = ratios[f"seconds_at_{options.num_inference_steps}"]
    figures["nopt_over_plain_at_50_steps_predicted"] = ratios["seconds_at_50"]
    figures["nopt_over_plain_at_50_steps_flops"] = ratios["flops_at_50"]
    figures["denoiser_fraction_of_matmul"] = probed["tflops"]["denoiser"] / probed["matmul_tflops"]
    return {
        **{name: round(value, 4) for name, value in figures.items()},
        "methods": methods,
        "probe": probed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{key: value for key, value in vars(options).items() if key not in ("out", "worker", "methods")},
    }


if __name__ == "__main__":
    main()
