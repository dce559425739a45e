"""Making a published dataset again: its records, and the pipeline and targets that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..concentration.records import (
    PARTS,
    concentration_record,
    config_record,
    library_versions,
    record_parameters,
)
from ..concentration.run_folder import RunSession
from ..concentration.runs import RunResult, concentrate_to_folder
from ..data.shards import rows_sha256
from ..matching.targets import MatchingTargets
from ..sampling.call import Targets
from ..sampling.methods.released import Released
from ..sampling.models import load_classifier, load_model
from ..sampling.peers import ClassStatistics
from ..sampling.pipeline import DsCoPipeline
from ..studies.generator_check import GeneratorCheck
from ..utils.files import check_path, reading
from ..utils.origins import model_sha256, targets_sha256
from ..utils.safety import Token, explained, safe_path
from .folder import CONCENTRATION, WRITE_AGAIN, parse_record, read_folder, save_dataset_folder


RECORDS = (CONCENTRATION, "targets/*/targets.json", "targets/*/targets.safetensors")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def read_concentration(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Reads how a published dataset was made: the content of its `concentration.json`, without the images.

    Arguments and errors as of `verify`.
    """
    return _read(repo_or_folder, revision=revision, token=token, cache_dir=cache_dir)[2]


def load_recorded(
    repo_or_folder: str | Path,
    config: str | None = None,
    *,
    revision: str | None = None,
    generator: str | Path | None = None,
    generator_revision: str | None = None,
    token: Token = None,
    cache_dir: str | Path | None = None,
) -> tuple[DsCoPipeline, MatchingTargets | ClassStatistics | None, dict[str, Any]]:
    """Loads what a published dataset was made with: the pipeline and the targets, at the recorded commits.

    `concentrate(pipe, targets, seed=record["seed"], **record_parameters(record))` then makes its synthetic rows again.

    Args:
        repo_or_folder: `"user/name"`, or the folder of a published dataset.
        config: Config to make again; the default one if `None`.
        revision: Branch, tag or commit of the dataset.
        generator: Where the recorded generator lies now, a folder or Hub id, if not at its recorded place; the SHA-256
            of its weights is compared.
        generator_revision: Branch, tag or commit of `generator`.
        token: Token for private repositories.
        cache_dir: Where to keep the downloads; the usual cache if `None`.

    Returns:
        The pipeline; the targets, `None` if there were none (plain samples); and the records of the config.

    Raises:
        ValueError: If the records do not name published models and targets, or what they name is something else now.
            Further errors are those of `verify`.
    """
    options = {"token": token, "cache_dir": cache_dir}
    folder, name, whole = _read(repo_or_folder, revision=revision, token=token, cache_dir=cache_dir)
    record = config_record(whole, config)
    place: dict[str, Any] = {"id": str(generator), "revision": generator_revision}
    if generator is None:
        place = _place(record, "generator", name, folder)
    known = {part: _load_part(record, part, name, options, folder) for part in PARTS}
    parts = {part: model for part, model in known.items() if model is not None}
    if size := (record.get("generator") or {}).get("image_size"):
        parts["image_size"] = size
    dtype = DTYPES.get(str((record.get("environment") or {}).get("dtype")), torch.float32)
    pipe = DsCoPipeline.from_pretrained(place["id"], revision=place.get("revision"), dtype=dtype, **parts, **options)
    for part, model in (("generator", pipe.denoiser), *((part, getattr(pipe, part, None)) for part in PARTS)):
        expected = (record.get(part) or {}).get("sha256")
        if expected is not None and (model is None or model_sha256(model) != expected):
            raise ValueError(
                f"The {part} that {name} names is not the one that the dataset was made with: the SHA-256 of its "
                "weights differs. Was it changed since? A recorded `revision` would tell them apart."
            )
    return pipe, _load_targets(record, folder, name, options), record


def recorded_rows(published: Mapping[str, Any], config: str) -> dict[str, Any]:
    """The drawn rows of a published config, to compare rows with that are drawn again.

    Returns:
        `dict`: `rows_sha256` of its drawn rows as they were when they were drawn, None if that is not known;
            `published_sha256` of them as they are published; `changed`, what happened between, if anything; and
            `real`, the number of real rows, which are not drawn.
    """
    record, entry = config_record(published, config), published["configs"][config]
    counts = next(iter(entry["splits"].values()))
    sources = counts.get("sources") or {}
    stored = counts.get("synthetic_sha256") or (counts["rows_sha256"] if set(sources) == {"synthetic"} else None)
    drawn = (record.get("synthetic") or {}).get("rows_sha256")
    changed = record.get("changed")
    if changed is None and None not in (drawn, stored) and drawn != stored:
        changed = "its rows are not those that its record says were drawn"
    return {
        "rows_sha256": drawn or stored,
        "published_sha256": stored,
        "changed": changed,
        "real": sources.get("real", 0),
    }


def fetch(
    repo_or_folder: str | Path, patterns: Sequence[str], *, revision: str | None, token: Token,
    cache_dir: str | Path | None, action: str = "read",
) -> Path:  # fmt: skip
    """The folder of a published dataset; of a repository these files, downloaded at one commit."""
    folder, name = Path(repo_or_folder), str(repo_or_folder)
    if folder.is_dir():
        return folder
    check_path(repo_or_folder, wanted="Give the folder of a published dataset, or an id such as 'user/name'.")
    with explained(name, token=token, action=action):
        api = HfApi(token=token, library_name="dsco_hf")
        return Path(
            api.snapshot_download(
                name, repo_type="dataset", revision=revision, cache_dir=cache_dir, allow_patterns=list(patterns)
            )
        )


def _read(
    repo_or_folder: str | Path, *, revision: str | None, token: Token, cache_dir: str | Path | None
) -> tuple[Path, str, dict[str, Any]]:
    """The folder of a dataset, how errors call its record, and that record."""
    folder = fetch(repo_or_folder, RECORDS, revision=revision, token=token, cache_dir=cache_dir)
    name = f"{CONCENTRATION} of {repo_or_folder}"
    if not (folder / CONCENTRATION).is_file():
        raise FileNotFoundError(f"{repo_or_folder} has no {CONCENTRATION}: it was not published with `publish`.")
    with reading(folder / CONCENTRATION, WRITE_AGAIN):
        return folder, name, parse_record((folder / CONCENTRATION).read_text(encoding="utf-8"), name)


def _place(record: Mapping[str, Any], part: str, name: str, folder: Path) -> dict[str, Any]:
    """The recorded repository of a model, or its folder if it lies around here; ValueError if it cannot be loaded."""
    entry = record.get(part)
    entry = dict(entry) if isinstance(entry, Mapping) else {}
    if isinstance(own := entry.get("folder"), str) and own == Path(own).name:
        around = [Path.cwd(), *folder.resolve().parents[:3]]
        found = next((str(place / own) for place in around if (place / own).is_dir()), None)
        if found is None:
            raise ValueError(
                f"The {part} is recorded in {name} as a folder called {own!r} of its maker: ask who made the dataset "
                "to publish it (`publish_pipeline`, `publish_evaluator`), or put a copy of it beside the dataset"
                + (", or say where it is (`--generator`, `generator=`)" if part == "generator" else "")
                + "; its SHA-256 is checked."
            )
        entry["id"] = found
    try:
        validate_repo_id(entry.get("id") or "")
    except HFValidationError:
        if not (isinstance(entry.get("id"), str) and Path(entry["id"]).is_dir()):
            raise ValueError(
                f"The {part} is recorded in {name} as {entry.get('id')!r}, which is no repository that others can "
                "load: ask who made the dataset to publish it (`publish_pipeline`, `publish_evaluator`) and to record "
                "its id."
            ) from None
    return entry


def _load_part(record: Mapping[str, Any], part: str, name: str, options: Mapping[str, Any], folder: Path) -> object:
    """A component that was added to the generator by hand; None if the generator's own repository has it."""
    if not record.get(part):
        return None
    if record[part].get("subfolder") == part:
        origins = [[record[of].get(key) for key in ("id", "folder", "revision")] for of in (part, "generator")]
        if origins[0] == origins[1]:
            return None
    if part == "prompts":  # encoded again, by the generator's own encoders
        return record[part]
    place = _place(record, part, name, folder)
    known = {key: place[key] for key in ("revision", "subfolder") if place.get(key)}
    if part == "preview_vae":
        return load_model(AutoencoderTiny, place["id"], **known, **options)
    return load_classifier(place["id"], **known, **options)


def _load_targets(
    record: Mapping[str, Any], folder: Path, name: str, options: Mapping[str, Any]
) -> MatchingTargets | ClassStatistics | None:
    entry = record.get("targets")
    if not entry:
        return None
    if entry.get("statistics") == "names":
        return ClassStatistics("names", list(entry["class_names"]), list(entry["class_labels"]))
    if entry.get("kind"):
        raise ValueError(
            f"{name} was drawn for real images themselves ({entry['kind']}): only with them can it be drawn again, by "
            "`concentrate`."
        )
    if entry.get("path"):
        targets = MatchingTargets.from_pretrained(safe_path(folder, entry["path"]))
    elif entry.get("id"):
        place = {key: entry[key] for key in ("revision", "subfolder") if entry.get(key)}
        targets = MatchingTargets.from_pretrained(entry["id"], **place, **options)
    else:
        raise ValueError(
            f"The targets behind {name} were not published with it (`publish(..., targets=targets)` does that): ask "
            "who made the dataset, or make them anew from the recorded source with `MatchingTargets.from_dataset`."
        )
    if entry.get("sha256") not in (None, targets_sha256(targets)):
        raise ValueError(
            f"The targets that {name} names are not those that it was made with: the SHA-256 of their content differs."
        )
    return targets


def compared(origin: Mapping[str, Any], found: str) -> tuple[dict[str, Any], str]:
    """Whether the images are those of the published dataset, for the results and in words."""
    versions = dict(origin["versions"])
    now = library_versions()
    other = {name: [versions[name], now.get(name)] for name in versions if versions[name] != now.get(name)}
    expected, changed = origin.get("rows_sha256"), origin.get("changed")
    same, name = None if expected is None else expected == found, origin["dataset"]
    outcome = {key: value for key, value in origin.items() if key not in ("versions", "real")}
    outcome |= {"identical": same and changed is None, "as_drawn": same, "other_versions": other}
    if same is None:
        return outcome, " The record has no hash of the synthetic rows to compare them with."
    if not same:
        why = "; ".join(f"{one} {a} there, {b} here" for one, (a, b) in other.items()) or "the versions are the same"
        return outcome, f" The rows DIFFER from those of {name} ({why}; another device or CPU can be the cause)."
    if changed is not None:
        return outcome, f" The rows are as they were first drawn, but NOT as {name} has them: {changed}."
    which = "All synthetic rows" if origin.get("real") else "All rows"
    if origin.get("published_sha256") is None:  # a record of an earlier version
        return outcome, f" {which} are identical to those that the record of {name} says were drawn."
    return outcome, f" {which} are identical to those of {name}."


@dataclass(frozen=True)
class Job:
    """A set that is drawn in a run folder and saved as it is published.

    Attributes:
        pipe (`DsCoPipeline`), targets: see `concentrate`.
        parameters (mapping): its further arguments, `images_per_class` and, as `method`, a `Sampling` among them.
        seed (`int`), cpu_threads (`int`): of the run.
        method (`str`): what results call the set.
        source (mapping), targets_id, targets_revision (`str`): see `concentration_record`; all may be None.
        origin (mapping, *optional*): the published dataset that is drawn again, with [`recorded_rows`].
        check ([`GeneratorCheck`], *optional*): what the classifier makes of plain samples.
    """

    pipe: DsCoPipeline
    targets: Targets | None
    parameters: Mapping[str, Any]
    seed: int
    cpu_threads: int
    method: str
    source: Mapping[str, Any] | None = None
    targets_id: str | None = None
    targets_revision: str | None = None
    origin: Mapping[str, Any] | None = None
    check: GeneratorCheck | None = None

    @classmethod
    def recorded(
        cls,
        repo_or_folder: str | Path,
        config: str | None = None,
        *,
        revision: str | None = None,
        cpu_threads: int | None = None,
        **place: Any,
    ) -> Job:
        """The job that made a published dataset; `place` and errors as of [`load_recorded`].

        Raises:
            ValueError: If the dataset was drawn to match real images one by one.
        """
        pipe, targets, record = load_recorded(repo_or_folder, config, revision=revision, **place)
        published = read_concentration(repo_or_folder, revision=revision)
        parameters = record_parameters(record)
        if isinstance(parameters["method"].method, Released):
            raise ValueError(
                f"{repo_or_folder} matches real images one by one (objective 'quantile'): only with them can it be "
                "drawn."
            )
        origin = {"dataset": str(repo_or_folder), "config": record["config"], "revision": revision}
        origin |= {**recorded_rows(published, record["config"]), "versions": record.get("versions") or {}}
        threads = cpu_threads or (record.get("environment") or {}).get("threads") or 1
        method = str(record.get("method") or "nopt").removesuffix("+doping")
        return cls(pipe, targets, parameters, record["seed"], threads, method, record.get("source"), origin=origin)

    def draw(self, folder: str | Path, **session: Any) -> RunResult:
        """Draws into a run folder, or goes on there; `session` is as of `RunSession`. See `concentrate_to_folder`."""
        options = {**self.parameters, "seed": self.seed, "session": RunSession(self.cpu_threads, **session)}
        return concentrate_to_folder(self.pipe, self.targets, options.pop("images_per_class"), folder, **options)

    def save(self, result: RunResult, folder: str | Path) -> dict[str, Any]:
        """Writes what a finished run has drawn, beside the other sizes that lie in the folder; returns the record."""
        cache = Path(folder).parent / "run" / "rows.arrow"
        dataset, images = result.dataset(cache_file=cache), self.parameters["images_per_class"]
        kept = self.targets if isinstance(self.targets, MatchingTargets) else None
        told = {name: getattr(self, name) for name in ("method", "seed", "source", "targets_id", "targets_revision")}
        record = concentration_record(self.pipe, kept, result.report, parameters=self.parameters, **told)
        size = min(self.parameters["block_size"], images)
        record["blocks"] = {
            "size": size,
            "count": -(-images // size),
            "nested": "the images of the first k blocks are those of a run with k times `size` images per class",
        }
        record |= {"models": result.settings["models"], "changes": result.changes}
        record["environment"]["threads"] = result.settings["cpu_threads"]
        record["synthetic"] = {"rows": len(dataset), "rows_sha256": rows_sha256(dataset)}
        if self.check is not None:
            record["generator_check"] = self.check.record()
        if (report := result.report).discrepancy is not None:
            record["discrepancy"] = {
                "set": report.discrepancy, "as many random real images": report.random_discrepancy,
                "by class": report.discrepancy_by_class, "random by class": report.random_discrepancy_by_class,
            }  # fmt: skip
        configs, records = _earlier_sizes(Path(folder), images)
        save_dataset_folder(
            {**configs, f"ipc{images}": dataset},
            folder,
            default_config=f"ipc{images}",
            concentration={"configs": {**records, f"ipc{images}": record}} if configs else record,
            targets=kept if not self.targets_id else None,
        )
        cache.unlink()
        return record

    def results(self, result: RunResult, record: Mapping[str, Any], **told: object) -> tuple[dict[str, Any], str]:
        """The content of results.json of a run whose set was saved with this record, and what to tell of it."""
        report = vars(result.report)
        measured = {name: value for name, value in report.items() if "discrepancy" in name}
        results = {
            **told, "method": self.method, "seed": self.seed, "session": result.session, **measured,
            "cost": {name: value for name, value in report.items() if name not in measured},
            "settings": result.settings, "versions": library_versions(),
        }  # fmt: skip
        if self.origin is None:
            return results, ""
        results["from"], verdict = compared(self.origin, record["synthetic"]["rows_sha256"])
        return results, verdict


def _earlier_sizes(folder: Path, images: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The other sizes of a set that has grown, and their records: they stay beside the new one."""
    if not (folder / "concentration.json").is_file():
        return {}, {}
    stored = read_folder(folder)
    configs = {name: splits for name, splits in stored["configs"].items() if name != f"ipc{images}"}
    records = {name: config_record(stored["concentration"], name) for name in configs}
    return configs, {name: {k: v for k, v in record.items() if k != "config"} for name, record in records.items()}
