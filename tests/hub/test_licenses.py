"""What cards say of licences: known, unknown, forbidden for the stated use; and the page that shows the table."""

import os
from pathlib import Path

import huggingface_hub
import pytest

from dsco_hf import DatasetCardFields
from dsco_hf.hub.cards import (
    KNOWN_GENERATOR_LICENSES,
    KNOWN_LICENSES,
    USES,
    combined_license,
    is_forbidden,
    license_sentence,
    render_dataset_card,
)
from dsco_hf.hub.folder import save_dataset_folder
from hub.cards import validate_card
from hub.samples import HOSTILE_NAMES, RECORD, tiny_dataset
from hub.test_cards import record
from recipes.readme_table import insert_table


PAGE = Path(__file__).parents[2] / "docs" / "licences.md"


def card(generator, **said):
    told = record(default=tiny_dataset(1))
    told["generator"] = {"id": generator}
    text = render_dataset_card(told, fields=DatasetCardFields(source_license="cc-by-4.0", **said))
    assert validate_card(text, "dataset") == []
    return text


def page():
    rows = ["| generator | licence | images that are drawn | models trained on them | forbids |", "| --- " * 5 + "|"]
    for license, known in KNOWN_LICENSES.items():
        those = [f"`{name}`" for name, own in KNOWN_GENERATOR_LICENSES.items() if own == license]
        named = f"[{known['name']}]({known['source']})"
        forbids = ", ".join(USES[use] for use in known["forbids"]) or "–"
        rows.append(f"| {', '.join(those)} | {named} | {known['outputs']} | {known['trained']} | {forbids} |")
    return insert_table(PAGE.read_text(encoding="utf-8"), "\n".join(rows), "licences")


def test_the_page_shows_the_table():
    if os.environ.get("DSCO_HF_UPDATE_GOLDEN"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_generator_has_a_licence_of_the_table_with_its_text():
    assert set(KNOWN_GENERATOR_LICENSES.values()) == set(KNOWN_LICENSES)
    for known in KNOWN_LICENSES.values():
        assert known["source"].startswith("https://") and set(known["forbids"]) <= set(USES)
        assert known["outputs"].endswith(".") and known["trained"].endswith(".")


@pytest.mark.parametrize(
    ("generator", "use", "warned", "said"),
    [
        ("facebook/DiT-XL-2-256", None, "**Not for commercial use.**", "CC BY-NC 4.0"),
        ("facebook/DiT-XL-2-256", "research", "**Not for commercial use.**", "meant for research"),
        ("facebook/DiT-XL-2-256", "commercial", "**Forbidden for the stated use, commercial use.**", "CC BY-NC 4.0"),
        ("stabilityai/stable-diffusion-3.5-medium", "commercial", None, "below 1,000,000 US dollars"),
        ("stabilityai/stable-diffusion-3.5-medium", "generative", "the training of generative models.**", "yours"),
        ("black-forest-labs/FLUX.1-dev", "generative", "the training of generative models.**", "competes"),
        ("stabilityai/sdxl-turbo", "commercial", "commercial use.** The licence of the generator", "derivative work"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "commercial", None, "Attachment A"),
        ("black-forest-labs/FLUX.1-schnell", "generative", None, "forbids no use"),
        ("ann/own", "commercial", "Licence of the generator's weights not known", "| not known |"),
    ],
)
def test_a_card_says_what_is_known_unknown_and_forbidden(generator, use, warned, said):
    text = card(generator, use=use)
    assert said in text and ("[!WARNING]" in text) == (warned is not None) and (warned or "") in text


def test_data_whose_name_forbids_commercial_use():
    told = record(default=tiny_dataset(1))
    told["generator"] = {"id": "black-forest-labs/FLUX.1-schnell"}
    fields = DatasetCardFields(source_license="cc-by-nc-sa-4.0", use="commercial")
    assert "**Forbidden for the stated use, commercial use.** The licence of the source data" in render_dataset_card(
        told, fields=fields
    )
    assert is_forbidden("some-non-commercial-licence", "commercial") and not is_forbidden(None, "commercial")
    assert not is_forbidden("mit", "anything else")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_licence_of_ones_own_is_text_and_says_nothing(name):
    assert license_sentence(name) == ""
    text = card("ann/own", generator_license=name, use="commercial")
    assert "What the [" not in text and "<script" not in text.split("---", 2)[2]
    assert "[!WARNING]" in card(name)


def test_licences_without_an_identifier_of_the_hub_are_named_and_linked():
    found = combined_license("flux-1-dev-non-commercial-license", "flux-1-dev-non-commercial-license")
    assert found["license"] == "other" and found["license_link"].startswith("https://github.com/black-forest-labs")
    fields = DatasetCardFields(source_license="sai-nc-community", generator_license="sai-nc-community")
    data = huggingface_hub.DatasetCard(render_dataset_card(record(default=tiny_dataset(1)), fields=fields)).data
    assert (data.license, data.license_name) == ("other", "sai-nc-community")


def test_a_use_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"`card.use` must be one of \['research', .*, got 'comercial'. Nearest"):
        save_dataset_folder(
            {"ipc1": tiny_dataset(1)}, tmp_path / "set", concentration=RECORD, card=DatasetCardFields(use="comercial")
        )
    save_dataset_folder(
        {"ipc1": tiny_dataset(1)}, tmp_path / "set", concentration=RECORD, card=DatasetCardFields(use="commercial")
    )
    assert "stated use, commercial use" in (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
