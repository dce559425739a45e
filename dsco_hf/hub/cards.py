"""The card (README.md) of a published dataset: generated from what was recorded, never typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from datasets import ClassLabel, Features, Image
from datasets.info import DatasetInfo, DatasetInfosDict
from datasets.splits import SplitDict, SplitInfo
from datasets.utils.metadata import MetadataConfigs

from ..concentration.config_records import (
    REPOSITORY,
    as_description,
    by_config,
    can_be_remade,
    how_made,
    method_label,
    shared,
    ways,
    what_labels_are,
)
from ..studies.figures.accuracy import accuracy_table as accuracy_table
from ..utils.markdown import (
    BEGIN_MARK,
    END_MARK,
    Trusted,
    escape_id,
    escape_markdown,
    format_number,
    join_card,
    last_part,
    parameter_rows,
    render,
)


TAGS = ("dataset-concentration", "dataset-distillation", "synthetic", "dsco_hf")
_TOLD = yaml.safe_load(Path(__file__).with_name("templates").joinpath("licenses.yaml").read_text(encoding="utf-8"))
# What their model cards say; others are asked for, or warned about. And what these licences say of images.
KNOWN_GENERATOR_LICENSES: dict[str, str] = _TOLD["generators"]
KNOWN_LICENSES: dict[str, dict[str, Any]] = _TOLD["licenses"]
USES = {
    **{"research": "research", "commercial": "commercial use"},
    "generative": "the training of generative models",
}
DIT_WARNING = (
    "Many class-conditional generators derive from DiT weights (`facebook/DiT-XL-2-256`, `-512`), which are "
    "CC-BY-NC-4.0: not for commercial use, nor is what is made with them."
)
COLUMNS = {
    "image": "the image",
    "label": "the class, with the source dataset's names and order",
    "source": "`synthetic` (drawn by the generator) or `real` (an unaltered image of the source dataset)",
    "seed": "seed of the image's noise: with the class and the block it fixes the image",
    "block": "block of images optimised jointly: the first k blocks are themselves a smaller set",
    "real_index": "row of the image in the source dataset; -1 for a synthetic image",
    "weight": "how much the image counts in the training loss; 1 is the mean of a class",
    "soft_label": "class probabilities of the teacher",
    "learned_label": "a number for each class, which a regression learned as the best label of the image in this set",
}
CAPTIONS = {
    "samples": "Images of every class",
    "accuracy": "Test accuracy against images per class",
    "features": "Features of the whole class and of the concentrated images",
    "cost": "Synthesis cost against images per class",
}


@dataclass
class DatasetCardFields:
    """What a person can say about a published dataset; all else on its card is filled in from the records.

    Args:
        pretty_name: Title of the card. Made from the source dataset's name if `None`.
        repo_id: `"user/name"`, for the loading examples. A placeholder for a local folder if `None`.
        license: Licence identifier of the result (`"cc-by-4.0"`, ...). Derived from the two below if `None`.
        source_license: Licence identifier of the source data.
        generator_license: Licence identifier of the generator's weights.
        description: A paragraph in your own words, printed as plain text.
        language: Language codes of the class names, such as `["en"]`.
        tags: Tags beside our own.
        use: What the dataset is meant for, of `USES`: "research", "commercial" or "generative", to train generative
            models. The card says so where a licence forbids it.
    """

    pretty_name: str | None = None
    repo_id: str | None = None
    license: str | None = None
    source_license: str | None = None
    generator_license: str | None = None
    description: str | None = None
    language: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    use: str | None = None


def _seeds_sentence(results: Mapping[str, Any] | None) -> str:
    counts = {(row.get("synthesis_seeds"), row.get("training_seeds")) for row in (results or {}).get("rows") or []}
    if len(counts) != 1 or None in (pair := counts.pop()):
        return ""
    return f" ({pair[0]} synthesis × {pair[1]} training seeds)"


def is_non_commercial(license: str | None) -> bool:
    """Whether a licence forbids commercial use, as the table or else its identifier tells."""
    if known := KNOWN_LICENSES.get((license or "").lower()):
        return "commercial" in known["forbids"]
    parts = re.split(r"[-_ ]", (license or "").lower())
    return "nc" in parts or "noncommercial" in parts or "non" in parts or "research" in parts


def is_forbidden(license: str | None, use: str | None) -> bool:
    """Whether a licence is known to forbid a use, of `USES`."""
    if use == "commercial":
        return is_non_commercial(license)
    return use in KNOWN_LICENSES.get((license or "").lower(), {"forbids": ()})["forbids"]


def license_sentence(license: str | None) -> str:
    """What a licence in the table says of the images and of models trained on them, with its text; "" for others."""
    known = KNOWN_LICENSES.get((license or "").lower())
    if known is None:
        return ""
    return (
        f"What the [{known['name']}]({known['source']}) says of images that are drawn: {known['outputs']} Of models "
        f"that are trained on them: {known['trained']} (As we read it; no legal advice.)"
    )


def license_metadata(license: str) -> dict[str, str]:
    """The metadata of a card for a licence: its identifier, or "other" with its name and the link to its text."""
    known = KNOWN_LICENSES.get(license.lower(), {})
    if not known.get("named"):
        return {"license": license}
    return {"license": "other", "license_name": license.lower(), "license_link": known["source"]}


def combined_license(source: str | None, generator: str | None) -> dict[str, str]:
    """Derives the licence metadata of a result from those of its data and its generator."""
    known = {license for license in (source, generator) if license}
    if not source or not generator or "unknown" in known:
        return {"license": "unknown"}
    if len(known) == 1:
        return license_metadata(source)
    return {"license": "other", "license_name": f"{source}-and-{generator}"}


def _shared(records: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
    """What is recorded alike for all configs of their source or generator."""
    found = shared(record.get(key) for record in records.values())
    return dict(found) if isinstance(found, Mapping) else {}


def _licenses(
    records: Mapping[str, Mapping[str, Any]], fields: DatasetCardFields
) -> tuple[str | None, str | None, dict[str, str]]:
    generator = _shared(records, "generator")
    source_license = fields.source_license or _shared(records, "source").get("license")
    generator_license = (
        fields.generator_license or generator.get("license") or KNOWN_GENERATOR_LICENSES.get(str(generator.get("id")))
    )
    result = {"license": fields.license} if fields.license else combined_license(source_license, generator_license)
    return source_license, generator_license, result


def _license_warnings(
    source_license: str | None, generator_license: str | None, use: str | None = None
) -> list[Trusted]:
    warnings = []
    for what, license in (("generator's weights", generator_license), ("source data", source_license)):
        if not license or license in ("unknown", "other"):
            about = f" {DIT_WARNING}" if what == "generator's weights" else ""
            unknown = f"**Licence of the {what} not known.** Find it out before you use this dataset or pass it on."
            warnings.append(Trusted(unknown + about))
        elif use is not None and is_forbidden(license, use):
            text = f"The licence of the {what} ({escape_markdown(license)}) does not allow it."
            warnings.append(Trusted(f"**Forbidden for the stated use, {USES[use]}.** {text}"))
        elif is_non_commercial(license):
            text = (
                f"The licence of the {what} ({escape_markdown(license)}) does not allow it, and what is made from them"
            )
            warnings.append(Trusted(f"**Not for commercial use.** {text} is bound by it."))
    return warnings


def size_category(rows: int) -> str:
    """Returns the Hub's `size_categories` value for a number of rows."""
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")):
        if rows < limit:
            return name
    return "1M<n<10M"


def dataset_metadata(concentration: Mapping[str, Any], *, fields: DatasetCardFields | None = None) -> dict[str, Any]:
    """Makes the YAML metadata of a dataset card: configs, features and sizes for `datasets`, tags and licence.

    Arguments as of [`render_dataset_card`].
    """
    fields = fields or DatasetCardFields()
    infos: dict[str, DatasetInfo] = {}
    configs: dict[str, dict[str, Any]] = {}
    total = 0
    for name, entry in sorted(concentration["configs"].items()):
        splits = entry["splits"]
        total += sum(split["rows"] for split in splits.values())
        infos[name] = DatasetInfo(
            features=Features.from_dict(entry["features"]),
            splits=SplitDict(
                {s: SplitInfo(name=s, num_bytes=v["bytes"], num_examples=v["rows"]) for s, v in splits.items()}
            ),
            download_size=sum(file["size"] for split in splits.values() for file in split["files"]),
            dataset_size=sum(split["bytes"] for split in splits.values()),
        )
        configs[name] = {"data_files": [{"split": split, "path": f"data/{name}/{split}-*"} for split in splits]}
        if name == concentration.get("default_config"):
            configs[name]["default"] = True
    records = by_config(concentration)
    source = _shared(records, "source").get("dataset")
    license = _licenses(records, fields)[2]
    data = huggingface_hub.DatasetCardData(
        license=license["license"],
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        language=fields.language or None,
        pretty_name=" ".join((fields.pretty_name or _pretty_name(source)).split())[:120],
        task_categories=["image-classification"],
        size_categories=[size_category(total)],
        tags=sorted({*TAGS, *fields.tags}),
        source_datasets=[source] if source and REPOSITORY.fullmatch(str(source)) else None,
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    MetadataConfigs(configs).to_dataset_card_data(data)
    metadata = {key: value for key, value in data.to_dict().items() if value is not None}
    # `datasets` reads a description from here as well, so that a set that is loaded says what it was drawn with.
    entries = metadata["dataset_info"] if len(infos) > 1 else [metadata["dataset_info"]]
    for entry in entries:
        if record := records[entry.get("config_name", "default")]:
            entry["description"] = as_description(record)
    return metadata


def _pretty_name(source: object) -> str:
    return f"{last_part(str(source or 'An image dataset'))}, concentrated"


def _column_rows(features: Features) -> list[tuple[str, Trusted]]:
    rows = []
    for name, feature in features.items():
        kind = {Image: "image", ClassLabel: "class"}.get(type(feature)) or getattr(
            feature, "dtype", type(feature).__name__
        )
        meaning = COLUMNS.get(name, "")
        rows.append((name, Trusted(f"{escape_markdown(kind)}{': ' if meaning else ''}{meaning}")))
    return rows


def _soft_labels(features: Features) -> str | None:
    """How soft labels are stored: "top" for the most probable classes only, else the type of all probabilities."""
    stored = features.get("soft_label")
    if stored is None or isinstance(stored, dict):
        return None if stored is None else "top"
    return str(getattr(getattr(stored, "feature", None), "dtype", "a list"))


def listed(names: Sequence[str], most: int) -> str:
    """The first names, escaped, and how many more there are."""
    shown = ", ".join(escape_markdown(name, max_length=60) for name in names[:most])
    return shown + (f", … ({len(names) - most} more)" if len(names) > most else "")


def _template_values(
    concentration: Mapping[str, Any],
    fields: DatasetCardFields,
    results: Mapping[str, Any] | None,
    figures: Sequence[str],
) -> dict[str, Any]:
    configs, records = concentration["configs"], by_config(concentration)
    default = concentration.get("default_config") or next(iter(configs))
    source, generator = _shared(records, "source"), _shared(records, "generator")
    source_license, generator_license, license = _licenses(records, fields)
    features = Features.from_dict(configs[default]["features"])
    names = features["label"].names
    config_rows = []
    for name, split, info in ((name, *item) for name, entry in configs.items() for item in entry["splits"].items()):
        counts, sources = info["rows_per_class"], info["sources"]
        row = {"config": Trusted(name), "split": Trusted(split), "method": method_label(records[name]),
               "default": name == default, "rows": info["rows"]}  # fmt: skip
        row |= {kind: sources.get(kind, 0) if sources else "–" for kind in ("synthetic", "real")}
        row["per_class"] = min(counts) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        config_rows.append(row)
    source_name = escape_id(source.get("dataset") or "not recorded")
    rows = f"the {format_number(source['rows'])} images of " if isinstance(source.get("rows"), int) else ""
    return {
        "pretty_name": fields.pretty_name or _pretty_name(source.get("dataset")),
        "description": fields.description,
        "summary": Trusted(_summary(configs, default, len(names))),
        "how_sentence": Trusted(how_made(records)),
        "source_sentence": Trusted(f"{rows}{source_name}" if source.get("dataset") else "its much larger source"),
        "warnings": _license_warnings(source_license, generator_license, fields.use),
        "use": USES.get(fields.use or ""),
        "license_sentence": Trusted(license_sentence(generator_license)),
        "load_path": Trusted(fields.repo_id or "path/to/this/folder"),
        "default_split": Trusted(next(iter(configs[default]["splits"]))),
        "other_configs": [(Trusted(n), Trusted(next(iter(e["splits"])))) for n, e in configs.items() if n != default],
        "config_rows": config_rows,
        "columns": _column_rows(features),
        "classes": names,
        "class_list": Trusted(listed(names, 100)),
        "soft_labels": _soft_labels(features),
        "learned_labels": "learned_label" in features,
        "labels": what_labels_are(records[default]),
        "figures": [
            (Trusted(path), CAPTIONS.get(stem := Path(path).stem, stem.replace("_", " ")))
            for path in figures
            if not path.lower().endswith(".html")
        ],
        "pages": [Trusted(path) for path in figures if path.lower().endswith(".html")],
        "accuracy_rows": accuracy_table(results),
        "seeds_sentence": Trusted(_seeds_sentence(results)),
        "told": [
            (title, values)
            for title, key in (("Protocol", "protocol"), ("Settings", "config"))
            if (values := parameter_rows((results or {}).get(key)))
        ],
        **ways(records),
        "can_be_remade": can_be_remade(records[default]),
        "changed": any(record.get("changed") for record in records.values()),
        "has_real": any(row["real"] not in (0, "–") for row in config_rows),
        "source_name": Trusted(source_name),
        "generator_name": Trusted(escape_id(generator.get("id") or generator.get("folder") or "not recorded")),
        "source_license": source_license or "not known",
        "generator_license": generator_license or "not known",
        "license": license.get("license_name") or license["license"],
    }


def _summary(configs: Mapping[str, Any], default: str, num_classes: int) -> str:
    rows = next(iter(configs[default]["splits"].values()))["rows"]
    others = f"; {len(configs)} sizes to choose from" if len(configs) > 1 else ""
    return f"{format_number(rows)} images of {num_classes} classes{others}"


def render_dataset_card(
    concentration: Mapping[str, Any],
    *,
    fields: DatasetCardFields | None = None,
    results: Mapping[str, Any] | None = None,
    figures: Iterable[str] = (),
) -> str:
    """Renders the README.md of a concentrated dataset, from its metadata block to the citation.

    Args:
        concentration: Content of `concentration.json`, with `configs` filled in (see `dsco_hf.hub.folder`).
        fields: What a person says about it; licences left out here are looked up or warned about.
        results: Content of `results.json`, the source of the accuracy table.
        figures: Paths of images and pages inside the repository, in the order shown.
    """
    fields = fields or DatasetCardFields()
    metadata = dataset_metadata(concentration, fields=fields)
    body = render("dataset_card.md.jinja", **_template_values(concentration, fields, results, list(figures)))
    return join_card(metadata, f"{BEGIN_MARK}\n\n{body}\n{END_MARK}\n")
