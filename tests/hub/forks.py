"""Processes of clients, forked from one that has loaded what knows nothing of the Hub.

The clients of the Hub read their environment when they are imported: each process imports them itself, in its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path


LOADED = (
    *("aiohttp", "httpx2", "jinja2", "multiprocess", "requests", "tokenizers", "yaml"),
    *("matplotlib.figure", "pandas", "pyarrow.parquet", "safetensors.torch", "scipy.stats", "sklearn.datasets"),
    *("torch._dynamo", "torch.distributed.checkpoint", "torch.nn.attention.flex_attention"),
)
CLIENTS = {"accelerate", "datasets", "diffusers", "dsco_hf", "evaluate", "huggingface_hub", "transformers"}


class Forks:
    """The process that is forked from, and what it is told: start one, wait for one."""

    def __init__(self, env: dict[str, str]) -> None:
        self.orders, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen([sys.executable, __file__, str(number)], env=env, pass_fds=[number])
        self.answers = self.orders.makefile("r")
        self.lock = threading.Lock()

    def tell(self, descriptors: tuple[int, ...] = (), **order: object) -> int | None:
        with self.lock:
            socket.send_fds(self.orders, [json.dumps(order).encode() + b"\n"], descriptors)
            return json.loads(self.answers.readline())

    def close(self) -> None:
        self.answers.close()
        self.orders.close()
        self.process.wait()


@functools.cache
def forks() -> Forks:
    """The one of this process, started when it is first needed."""
    clean = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
    started = Forks(clean | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "default"})
    atexit.register(started.close)
    return started


class Forked:
    """A process that runs `worker.main`, with as much of `subprocess.Popen` as `Client` needs."""

    def __init__(self, *, stderr: int, env: dict[str, str], cwd: Path) -> None:
        self.returncode: int | None = None
        (read, stdin), (stdout, write) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)
        self.pid = forks().tell((read, write, stderr), env=env, cwd=str(cwd))
        os.close(read)
        os.close(write)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # until it was waited for, the number is its own
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int:
        if self.returncode is None:
            self.returncode = forks().tell(pid=self.pid, timeout=timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.returncode


# What happens in the process that is forked from.


def ended(pid: int, timeout: float) -> int | None:
    """The exit status of a child, negative if a signal ended it, or None if it still runs after so many seconds."""
    deadline = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def become(descriptors: list[int], env: dict[str, str], cwd: str) -> None:
    """Gives the process that was just forked its input, outputs, environment and folder."""
    gc.freeze()  # garbage is not looked for in what was loaded
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = env["PYTHONPATH"].split(os.pathsep)
    os.chdir(cwd)


def serve(orders: socket.socket) -> bool:
    """Does what is ordered until nobody orders any more; returns whether this is a process that was forked."""
    with orders:
        while True:
            text, descriptors, *_ = socket.recv_fds(orders, 1 << 20, 3)
            while text and not text.endswith(b"\n"):
                text += orders.recv(1 << 20)
            if not text:
                return False
            order = json.loads(text)
            if descriptors:
                answer = os.fork()
                if not answer:
                    become(descriptors, **order)
                    return True
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                answer = ended(**order)
            orders.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    for name in LOADED:
        with contextlib.suppress(ImportError):  # a library's choice of libraries may change
            importlib.import_module(name)
    assert not CLIENTS & set(sys.modules)
    if serve(socket.socket(fileno=int(sys.argv[1]))):
        import worker

        worker.main()
        sys.stderr.flush()
        os._exit(0)  # it takes longer to take all modules down than most tests
