import huggingface_hub
import pytest

from dsco_hf.utils.markdown import (
    BEGIN_MARK,
    END_MARK,
    escape_id,
    escape_markdown,
    format_number,
    join_card,
    merge_cards,
    parameter_rows,
    split_card,
)
from hub.samples import HOSTILE_NAMES


def card(text="ours", **metadata):
    metadata = {"license": "unknown", "pretty_name": "New", "tags": ["new"], **metadata}
    return join_card(metadata, f"{BEGIN_MARK}\n{text}\n{END_MARK}\n")


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_escaped_text_is_one_inert_line(name):
    text = escape_markdown(name)
    assert len(text.splitlines()) == 1
    assert "<" not in text and ">" not in text and "://" not in text and "\u202e" not in text
    for mark in "[]|`*_":
        assert text.count(mark) == text.count(f"\\{mark}"), mark
    assert not text.startswith(("-", "#", "+", "=", ":"))
    assert len(text) < 1000


def test_plain_text_reads_as_before():
    assert escape_markdown("frgfm/imagenette at 320 px (v2.1)") == "frgfm/imagenette at 320 px (v2.1)"


def test_rendered_hostile_text_makes_no_element():
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for name in HOSTILE_NAMES:
        text = escape_markdown(name)
        html = parser.render(f"Classes: {text}.\n\n- {text}\n\n| a | b |\n| --- | --- |\n| {text} | c |\n")
        for tag in ("<a ", "<img", "<script", "<h1", "<h2", "<hr", "<code", "<em", "<strong", "<!--"):
            assert tag not in html, (name, tag)
        assert html.count("<td>") == 2


def test_local_paths_are_not_shown():
    assert escape_id("/home/ann/secret/generator") == "generator (a local folder)"
    assert escape_id("C:\\Users\\ann\\generator") == "generator (a local folder)"
    assert escape_id("facebook/DiT-XL-2-256") == "facebook/DiT-XL-2-256"


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0.968, {"scale": 100}, "96.80"),
        (1437, {}, "1,437"),
        (0.0031, {"digits": 4}, "0.0031"),
        (0.0000123, {"digits": 4}, "1.2e-05"),
        (0.0, {}, "0.00"),
        (float("nan"), {}, "–"),
        (float("inf"), {}, "–"),
        (None, {}, "–"),
        (True, {}, "–"),
        ("7", {}, "–"),
    ],
)
def test_numbers(value, options, text):
    assert format_number(value, **options) == text


def test_nested_parameters_become_dotted_rows():
    rows = parameter_rows({"a": 1, "b": {"c": "x|y", "d": {"e": None, "f": [1, 2]}}, "none": None})
    assert rows == [("a", "1"), ("b.c", "x\\|y"), ("b.d.f", "\\[1, 2\\]")]
    assert parameter_rows("not a mapping") == []


def test_split_and_join():
    metadata, body = split_card("---\nlicense: mit\n---\n# Title\n")
    assert metadata == {"license": "mit"} and body == "# Title\n"
    assert split_card("# no metadata\n---\n") == ({}, "# no metadata\n---\n")
    assert split_card("---\n---\ntext") == ({}, "text")
    assert split_card("\ufeff---\r\nlicense: mit\r\n---\r\ntext")[0] == {"license": "mit"}
    assert split_card(join_card({"a": [1]}, "text")) == ({"a": [1]}, "\ntext")
    with pytest.raises(ValueError, match="not valid YAML"):
        split_card("---\na: [\n---\n")
    with pytest.raises(ValueError, match="must be a mapping, but is a list"):
        split_card("---\n- a\n---\n")


def test_a_new_readme_is_the_card():
    assert merge_cards(None, card()) == card()
    assert merge_cards("  \n", card()) == card()


def test_text_around_the_marked_section_survives():
    merged = merge_cards("# My own title\n\nMy own words.\n", card("one"))
    assert merged.index("My own words.") < merged.index("one")
    edited = merged.replace("# My own title", "# Mine").rstrip() + "\n\nAfterwards.\n"
    again = merge_cards(edited, card("two"))
    assert "# Mine" in again and "My own words." in again and "Afterwards." in again
    assert "two" in again and "one" not in again
    assert merge_cards(again, card("two")) == again


def test_merging_is_idempotent_also_with_windows_line_ends():
    readme = "---\r\nlicense: mit\r\n---\r\n\r\nMine.\r\n"
    once = merge_cards(readme, card())
    assert merge_cards(once, card()) == once
    assert huggingface_hub.DatasetCard(once).data.license == "mit"


def test_broken_marks_never_cost_text():
    for readme in (f"before {BEGIN_MARK} after", f"before {END_MARK} after", f"before {END_MARK} {BEGIN_MARK} after"):
        once = merge_cards(readme, card("ours"))
        assert "before" in once and "after" in once
        assert once.count(BEGIN_MARK) == once.count(END_MARK) == 1
        assert merge_cards(once, card("ours")) == once
    doubled = merge_cards(f"a\n{BEGIN_MARK}x{END_MARK}\nb\n{BEGIN_MARK}y{END_MARK}\nc", card("ours"))
    assert doubled.count("ours") == 1 and all(text in doubled for text in ("a\n", "\nb\n", "\nc"))


def test_metadata_is_merged_key_by_key(caplog):
    readme = "---\nlicense: mit\npretty_name: Mine\ntags: [old]\nlanguage: [de]\nextra: 1\n---\n"
    merged, _ = split_card(merge_cards(readme, card(language=["en"])))
    assert merged == {
        "license": "mit",
        "pretty_name": "Mine",
        "tags": ["old", "new"],
        "language": ["de", "en"],
        "extra": 1,
    }
    assert not caplog.records
    merged, _ = split_card(merge_cards(readme, card(license="cc-by-4.0"), keep=()))
    assert merged["license"] == "cc-by-4.0" and merged["pretty_name"] == "New"
    assert "changes from mit to cc-by-4.0" in caplog.text


def test_configs_are_replaced_by_name_and_only_ours_is_default():
    readme = (
        "---\nconfigs:\n- config_name: a\n  data_files: old\n- config_name: b\n  data_files: b\n  default: true\n---\n"
    )
    new = [{"config_name": "a", "data_files": "new", "default": True}]
    merged, _ = split_card(merge_cards(readme, card(configs=new)))
    assert merged["configs"] == [*new, {"config_name": "b", "data_files": "b"}]
