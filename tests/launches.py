"""Commands as users type them, run by processes that are forked from one which has imported the libraries already."""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from pathlib import Path


ROOT = Path(__file__).parents[1]
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch"]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["dsco_hf", "recipes.experiment", "sklearn.datasets", "matplotlib.figure"])


def launch_command(script, *options, processes=1):
    """The command line that runs a recipe in so many processes of one thread."""
    launcher = [*LAUNCHER, "--num_machines", "1"]
    launcher += ["--multi_gpu"] if processes > 1 else ["--cpu"]  # the former starts several processes, GPU or not
    launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    return [*launcher, str(ROOT / "recipes" / f"{script}.py"), *map(str, options)]


def launch_environment():
    """The environment of the command: this checkout, no network, no GPU."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**os.environ, **offline, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def ranks(world):
    """The variables that the launcher would give each of so many processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"ACCELERATE_MIXED_PRECISION": "no"}
    given = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    return [{name: str(value) for name, value in rank.items()} for rank in given]


def _ranks(command):
    """What each process of a command runs, and the variables that the launcher would give it."""
    if command[: len(LAUNCHER)] != LAUNCHER:
        return command[1:], [{}]
    start = next(index for index, word in enumerate(command) if word.endswith(".py"))
    options = command[len(LAUNCHER) : start]
    world = int(options[options.index("--num_processes") + 1]) if "--num_processes" in options else 1
    if world == 1:
        return command[start:], [{"ACCELERATE_USE_CPU": "true"}]
    return command[start:], ranks(world)


def _work(words, folder, environment, outputs):
    """What `python words...` does, in a process that was forked."""
    gc.freeze()
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        sys.path[0:0] = [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")


class Launch:
    """A command that runs: `python SCRIPT ...`, `python -c ...`, or either below `accelerate launch`.

    Attributes:
        returncode (`int` or `None`): that of the first process that failed, or 0; None before all have ended.
    """

    def __init__(self, command, *, cwd=".", env=None):
        self.returncode = None
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name, name) for name in ("out", "err")]
        self.command, environment = command, dict(os.environ if env is None else env)
        words, variables = _ranks(list(command))
        given = [(words, str(cwd), environment | rank, self.outputs) for rank in variables]
        self.processes = [CONTEXT.Process(target=_work, args=arguments) for arguments in given]
        serve()
        for process in self.processes:
            process.start()

    def wait(self, timeout):
        """Waits for all processes; where one fails, the others are ended, as the launcher does."""
        running, deadline = {process.sentinel: process for process in self.processes}, time.monotonic() + timeout
        while running:
            ended = connection.wait(list(running), timeout=deadline - time.monotonic())
            if not ended:
                self.kill()
                raise subprocess.TimeoutExpired(self.command, timeout)
            for process in [running.pop(sentinel) for sentinel in ended]:
                process.join()
                self.returncode = self.returncode or process.exitcode
            if self.returncode:
                for process in running.values():
                    process.terminate()
        return self.returncode

    def poll(self):
        """Returns the exit status, or None while it runs."""
        return self.wait(60) if not any(process.is_alive() for process in self.processes) else None

    def kill(self):
        """Ends all its processes as a power cut would."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self):
        """What went to stdout and to stderr."""
        return [path.read_text(encoding="utf-8") if path.exists() else "" for path in self.outputs]


def serve():
    """Starts the process that is forked from, once, in the environment of a launch."""
    before = dict(os.environ)
    os.environ.update(launch_environment())
    try:
        if METHOD == "forkserver":
            forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(command, *, cwd=".", env=None, timeout=300):
    """Runs a command to its end, as `subprocess.run` does; of `env` the libraries have read theirs by then.

    Returns:
        `subprocess.CompletedProcess`: its exit status and what it wrote.
    """
    launched = Launch(command, cwd=cwd, env=env)
    status = launched.wait(timeout)
    return subprocess.CompletedProcess(command, status, *launched.output())
