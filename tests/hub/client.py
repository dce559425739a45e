"""A user of the Hub: a Python process with its own environment, cache and token, which does what it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

from .forks import Forked


ROOT = Path(__file__).parents[2]
DROPPED = (
    "HF_",
    "HUGGING",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "TRANSFORMERS_",
    "RANK",
    "WORLD_SIZE",
    "ACCELERATE_",
)


class ClientError(Exception):
    """What went wrong in the client: `kind` is the class of the exception, `traceback` what it would have printed."""

    def __init__(self, kind: str, message: str, traceback: str) -> None:
        super().__init__(f"{kind}: {message}\n{traceback}")
        self.kind, self.message, self.traceback = kind, message, traceback


def environment(endpoint: str, home: Path, *, token: str | None = None, **extra: str) -> dict[str, str]:
    """The variables that unmodified clients need to talk to a Hub on loopback and to nothing else."""
    inherited = {k: v for k, v in os.environ.items() if not k.upper().startswith(DROPPED)}
    return {
        **inherited,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONWARNINGS": "default",
        **({"HF_TOKEN": token} if token else {}),
        **extra,
    }


class Client:
    """Runs snippets in one long-lived process: `client.run("return 1 + 1")` gives 2.

    Everything the process prints or logs is in `output()`; connections to anything but loopback are refused and make
    `run` raise.
    """

    def __init__(self, endpoint: str, home: Path, *, token: str | None = None, **extra: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.log_path = home / "output.txt"
        self.log = self.log_path.open("ab")  # two may share a home
        env = environment(endpoint, home, token=token, **extra)
        self.process = Forked(stderr=self.log.fileno(), env=env, cwd=home)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process.stdin and not self.process.stdin.closed:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()
        self.log.close()

    def kill(self) -> None:
        """Ends the process as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def output(self) -> str:
        return self.log_path.read_text(errors="replace")

    def run(self, code: str, *, timeout: float = 300, **values: object) -> object:
        """Runs the body of a function with `values` as its variables and returns its (JSON) result.

        Raises:
            ClientError: If it raised.
            ConnectionError: If the process died.
        """
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            raise ConnectionError(f"The client died (exit {self.process.wait()}):\n{self.output()[-4000:]}")
        result = json.loads(answer)
        if "error" in result:
            raise ClientError(**result["error"])
        return result["value"]
