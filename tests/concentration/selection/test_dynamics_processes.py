"""One logged training by the two processes of a launch."""

import pytest
import torch

from dsco_hf import TrainingLog, get_protocol, log_training
from launches import LAUNCHER, launch_environment, run


WORKER = """
import sys

from accelerate import Accelerator
from datasets import Dataset

from dsco_hf import get_protocol, log_training
from dsco_hf.evaluators import Execution

data, folder = sys.argv[1:]
protocol = get_protocol("quick", epochs=3, batch_size=7)
execution = Execution(Accelerator(cpu=True), distributed=True)
log = log_training(
    Dataset.from_parquet(data), folder, architecture="convnet-1", protocol=protocol,
    execution=execution, progress=False,
)
sys.stdout.write(f"{execution.accelerator.num_processes} {log.sha256}\\n")  # in one piece, as two processes write
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_log_what_one_does(tmp_path, real_images):
    script, data, folder = tmp_path / "worker.py", tmp_path / "real.parquet", tmp_path / "log"
    script.write_text(WORKER)
    real_images.to_parquet(data)
    launch = [*LAUNCHER, "--multi_gpu", "--num_processes", "2", str(script), str(data), str(folder)]
    done = run(launch, env=launch_environment())
    assert done.returncode == 0, done.stderr
    log = TrainingLog.load(folder)
    assert done.stdout.split() == ["2", log.sha256] * 2  # both have the same, read or made
    assert [path.name for path in folder.iterdir() if path.suffix == ".safetensors"] == ["training_log.safetensors"]
    protocol = get_protocol("quick", epochs=3, batch_size=7)
    alone = log_training(real_images, tmp_path / "alone", architecture="convnet-1", protocol=protocol, progress=False)
    assert log.dataset == alone.dataset and log.settings["processes"] == 2 and alone.settings["processes"] == 1
    for name in ("probabilities", "margins", "errors"):
        torch.testing.assert_close(getattr(log, name), getattr(alone, name), atol=1e-3, rtol=0)
