"""Recipes launched as users do, through accelerate on CPUs."""

import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def launch_command(script, *options, processes=1):
    """The command line that runs a recipe in so many processes of one thread."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    launcher += ["--multi_gpu"] if processes > 1 else ["--cpu"]  # the former starts several processes, GPU or not
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    return [*launcher, str(ROOT / "recipes" / f"{script}.py"), *map(str, options)]


def launch_environment():
    """The environment of the command: this checkout, no network, no GPU."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
