"""The logged training: what it holds, that it is found again, and what it refuses."""

import pytest
import torch

from dsco_hf import EL2N, Pool, TrainingLog, dope, get_protocol, log_training, select, train_evaluator
from dsco_hf.concentration.selection import dynamics as module
from dsco_hf.evaluators.batches import ImageSet, predict_logits
from dsco_hf.evaluators.evaluation import evaluator_builder
from dsco_hf.utils.files import DamagedFileError


SHORT = get_protocol("quick", epochs=3)


class Killed(Exception):
    """As if the process were."""


def logged(real, folder, **options):
    return log_training(real, folder, protocol=SHORT, architecture="convnet-2", progress=False, **options)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in module.TENSORS)


def test_a_log_is_what_the_network_says_after_each_epoch(real_images, tmp_path):
    pool = Pool(real_images, progress=False)
    log = logged(pool, tmp_path / "log", seed=4)
    assert log.epochs == 3 and log.probabilities.shape == (3, 21)
    images = ImageSet(pool.pixels(), pool.labels, pool.names)
    result = train_evaluator(evaluator_builder("convnet-2", images, SHORT), images, protocol=SHORT, seed=4)
    last = module.dynamics(predict_logits(result.model, images.pixels), images.labels)
    for name, values in zip(module.TENSORS, last, strict=True):
        torch.testing.assert_close(getattr(log, name)[-1], values, atol=1e-6, rtol=0)
    assert [path.name for path in sorted((tmp_path / "log").iterdir()) if path.suffix] == [module.FILE]
    assert len(select(pool, EL2N(log), images_per_class=2)) == 6


def test_a_log_is_found_again_and_a_changed_one_refused(real_images, make, tmp_path, monkeypatch):
    log = logged(real_images, tmp_path)
    monkeypatch.setattr(module, "train_evaluator", None)  # nothing is trained again
    again = logged(real_images, tmp_path)
    assert same(again, log) and again.sha256 == log.sha256 == TrainingLog.load(tmp_path).sha256
    with pytest.raises(ValueError, match="holds the log of another training .*seed: 0 there, 1 now"):
        logged(real_images, tmp_path, seed=1)
    with pytest.raises(ValueError, match="images: .* there, .* now"):
        logged(make.images((4, 4, 4), seed=8), tmp_path)
    (tmp_path / module.FILE).write_bytes(b"nothing")
    with pytest.raises(DamagedFileError, match="a damaged log is to be deleted first"):
        logged(real_images, tmp_path)
    with pytest.raises(FileNotFoundError, match="Log a training there: `log_training"):
        TrainingLog.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("seconds", "written"), [(0.0, True), (0.0, False), (1e6, True)])
def test_a_killed_log_goes_on(real_images, tmp_path, monkeypatch, seconds, written):
    whole = logged(real_images, tmp_path / "whole")
    add, train = module._Logged.add, module.train_evaluator

    def killed(self, metrics):
        if metrics["epoch"] < 2 or written:
            add(self, metrics)
        if metrics["epoch"] == 2:
            raise Killed

    def often(*args, **options):
        return train(*args, checkpoint_seconds=seconds, **options)

    monkeypatch.setattr(module, "train_evaluator", often)
    monkeypatch.setattr(module._Logged, "add", killed)
    with pytest.raises(Killed):
        logged(real_images, tmp_path / "killed")
    monkeypatch.setattr(module._Logged, "add", add)
    assert same(logged(real_images, tmp_path / "killed"), whole)


def test_students_of_a_small_set_are_logged_on_the_real_images(real_images, make, tmp_path):
    small = make.images((2, 2, 2), seed=3)
    log = logged(real_images, tmp_path / "students", small=small)
    assert log.probabilities.shape == (3, 21)
    assert not same(log, logged(real_images, tmp_path / "own"))
    assert len(dope(small, real_images, total=9, strategy=EL2N(log), progress=False)) == 9
    turned = small.cast_column("label", small.features["label"])
    assert same(logged(real_images, tmp_path / "again", small=turned), log)


def test_bad_input(real_images, tmp_path):
    one = real_images.filter(lambda row: row["label"] == 1)
    with pytest.raises(ValueError, match="a classifier needs at least two classes"):
        logged(one, tmp_path / "one")
    with pytest.raises(ValueError, match="empty"):
        logged(real_images.select([]), tmp_path / "none")
    with pytest.raises(ValueError, match="without \\['square'\\]"):
        other = ImageSet(torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]), ("circle", "triangle"))
        logged(real_images, tmp_path / "other", small=other)
