"""Options of a search on the command line, what they load, and the rows of the accepted set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

from ...concentration.additions.doping import as_concentrated
from ...concentration.concentrate import SOURCES
from ...concentration.selection import Selection, find_selection, log_training
from ...concentration.selection.dynamics import TrainingLog
from ...data.datasets import class_names, find_columns, load_image_dataset
from ...evaluators import Execution, ImageSet, Protocol, load_image_set
from ...utils.configs import ImportOptions, make_accelerator
from ...utils.values import Named
from ..options import NetworkOptions, RealOptions, frozen
from .search import SearchPlan


@dataclass(frozen=True)
class Loaded:
    """What the options of a search load.

    Attributes:
        real, test, small: images in memory; `small` is None without a synthetic set.
        rows, small_rows: the datasets that `real` and `small` are of, row by row.
        protocol, rule, teacher: how networks are trained, which real images come first, whose labels are trained on.
        splits: which splits were taken.
    """

    real: ImageSet
    test: ImageSet
    small: ImageSet | None
    rows: Dataset
    small_rows: Dataset | None
    protocol: Protocol
    rule: Selection
    teacher: PreTrainedModel | None
    splits: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(RealOptions, NetworkOptions, ImportOptions):
    """Options of a search; those of the data and the trainings are inherited.

    Attributes:
        synthetic, synthetic_config, synthetic_revision: a concentrated dataset (folder or Hub id), its configuration
            and its branch, tag or commit: every set begins with its images; none by default.
        strategy: by which rule real images come first: "random", "herding", "k_center", ..., also with fields,
            `{name: ..., field: value}`; one that goes by a logged training logs one of all real images, trained as
            the search trains on them, in output_dir/log.
        features: what rules that look at images see: "pixels", or a classifier (folder or Hub id).
        length: "same steps" as all data, or "same epochs".
        margin: by how much accuracy, in (0, 1), fewer images may fall behind all.
        confidence: in [0.5, 0.9999].
        trainings: at most, beyond those on all images.
        reference_seeds: trainings on all images.
        architecture: of the network, see `dsco_hf.evaluators.build_evaluator`.
        image_size: what all images are brought to (shorter side, then the centre); the protocol's by default, or else
            their own, or 32 if they have several sizes.
        teacher, teacher_revision: a classifier (folder or Hub id) whose soft labels are trained on, in place of hard
            ones.
    """

    synthetic: str | None = None
    synthetic_config: str | None = None
    synthetic_revision: str | None = None
    strategy: Named = "random"
    features: str = "pixels"
    length: str = "same steps"
    margin: float = 0.005
    confidence: float = 0.95
    trainings: int = 20
    reference_seeds: int = 32
    architecture: str = "convnet-3"
    image_size: int | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    output_dir: str = "outputs/lossless"

    @property
    def plan(self) -> SearchPlan:
        """What is decided before the first training."""
        return SearchPlan(
            margin=self.margin,
            confidence=self.confidence,
            trainings=self.trainings,
            reference_seeds=self.reference_seeds,
        )

    def load(self, *, progress: bool = False) -> Loaded:
        """Reads datasets and models; a rule that goes by a logged training logs it, or reads the log that is there.

        Args:
            progress (`bool`): show progress bars.
        """
        protocol = self.get_protocol("image_size", label_type="hard" if self.teacher is None else "teacher")
        rows, tested, splits = self.splits(tested=True)
        reading: dict[str, Any] = {"num_channels": self.num_channels, "progress": progress}
        real, test = self.images(rows, tested, protocol=protocol, **reading)
        assert test is not None  # `splits` refuses to go on without
        rows, small, small_rows = self.readable(rows, real), None, None
        if self.synthetic is not None:
            small_rows = load_image_dataset(
                self.synthetic, self.synthetic_config, split="train", revision=self.synthetic_revision
            )
            small = load_image_set(small_rows, protocol=protocol, classes=real.names, **reading)
        features = self.features if self.features == "pixels" else frozen(self.features, None)
        rule = find_selection(self.strategy, features=features)
        if hasattr(rule, "training"):
            rule = find_selection(self.strategy, features=features, training=self._log(real, progress))
        teacher = frozen(self.teacher, self.teacher_revision)
        return Loaded(real, test, small, rows, small_rows, protocol, rule, teacher, splits)

    def _log(self, real: ImageSet, progress: bool) -> TrainingLog:
        execution = Execution(make_accelerator(self.mixed_precision), compiled=self.compile)
        return log_training(
            real, Path(self.output_dir) / "log", architecture=self.architecture, overrides=self.overrides,
            protocol=self.get_protocol("image_size", label_type="hard"), execution=execution, progress=progress,
        )  # fmt: skip


def accepted_rows(given: Loaded, chosen: list[int]) -> Dataset:
    """The accepted set as a dataset: its synthetic rows, then the chosen real ones, with the columns of all such sets.

    Args:
        given ([`Loaded`]): what the search was given.
        chosen (list of `int`): rows of the real images, best first, as a search gives them.
    """
    real = given.rows.select(chosen)
    taken = [name for name in ("source", "real_index") if name in real.column_names]
    real = real.remove_columns(taken).add_column("source", [SOURCES.index("real")] * len(chosen))
    real = as_concentrated(real.add_column("real_index", chosen))
    if given.small_rows is None:
        return real
    small = as_concentrated(given.small_rows)
    _, label_column = find_columns(small)
    numbers = {name: number for number, name in enumerate(class_names(real))}
    return concatenate_datasets([small.align_labels_with_mapping(numbers, label_column).cast(real.features), real])
