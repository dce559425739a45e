"""Names that are compared, written and read: each is the same class afterwards, or is refused by name."""

import json
import unicodedata
from dataclasses import dataclass, field

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsco_hf.data.labels import ClassLookup, class_mapping, label_set
from dsco_hf.utils.configs import parse_config
from dsco_hf.utils.names import canonical, find_classes, folded, nearest, number_of, numbers_of


NFC, NFD = (
    [unicodedata.normalize(form, name) for name in ("café", "müsli", "pâté", "한국", "が")] for form in ("NFC", "NFD")
)
# What YAML 1.1 reads as a boolean, a number, a date or nothing, and what its syntax or that of CSV gives a meaning.
TRICKY = (
    "yes", "no", "on", "off", "true", "False", "null", "Null", "y", "n", "1e5", "1_000", "0x10", "012", "0o7", "1:30",
    "190:20:30", "2024-01-01", "2024-13-01", "nan", ".inf", "-.inf", "inf", "=", "<<", "1.0", "01", "+1", "-1", "- a",
    "a: b", "a #b", "#a", "'a'",
    '"a"', "a, b", "[a", "{a}", "&a", "*a", "!a", "|", ">", "%a", "@a", "`a", "a\nb", "😀",
    "?", "-", "...", "---", " a", "a ",
)  # fmt: skip


def test_the_two_unicode_forms_of_a_name_are_one_class():
    assert NFC != NFD and list(map(canonical, NFD)) == NFC
    for ours, theirs in ((NFC, NFD), (NFD, NFC)):
        assert class_mapping(ours[::-1], dict(enumerate(theirs)), 5) == [4, 3, 2, 1, 0]
        assert class_mapping(["zebra"], dict(enumerate(theirs)), 5, mapping={"zebra": ours[1]}) == [1]
        assert class_mapping(ours[:1], {0: "tench"}, 3, mapping={theirs[0]: 2}) == [2]
        assert find_classes(ours, theirs) == [0, 1, 2, 3, 4]


def test_compatibility_forms_stay_different_names_and_a_suggestion_tells_the_difference():
    with pytest.raises(ValueError, match=r"'fish²' Nearest: 'fish2' \('fish2'\); given was 'fish\\xb2'"):
        class_mapping(["fish²"], {0: "fish2"}, 2)
    assert nearest("кот", ["kot", "коt"]).startswith(" Nearest: 'коt' ('\\u043a\\u043et'); given was")
    assert nearest("cafe", ["café"]) == " Nearest: 'café' ('caf\\xe9')."
    assert nearest("cats", ["cat", "dog"]) == " Nearest: 'cat'."
    assert nearest("cat", ["cat"]) == ""  # what is the same is no suggestion
    assert nearest("ab", ["A", "a", "b c d e"]) == " Nearest: 'A', 'a'."


@pytest.mark.parametrize("order", [("a", "A"), ("A", "a")])
def test_names_that_differ_in_case_only_are_classes_of_their_own(order):
    places = {"a": 1, "A": 0, "b": 2}
    generator = {0: "A", 1: "a", 2: "b"}
    assert class_mapping([*order, "b"], generator, 3) == [places[name] for name in order] + [2]
    assert class_mapping([order[0]], generator, 3) == [places[order[0]]]
    assert class_mapping(["B"], generator, 3) == [2]  # folded, where nothing is written alike
    with pytest.raises(ValueError, match="'_a' fits several: 0 'A', 1 'a'"):
        class_mapping(["_a"], generator, 3)
    with pytest.raises(ValueError, match=r"\['a', 'A'\] would all be drawn from class 0"):
        class_mapping(["a", "A"], {0: "a", 1: "b"}, 3)


def test_names_of_separators_alone_and_signs_are_kept():
    assert class_mapping(["-", "_", "+"], {0: "+", 1: "_", 2: "-"}, 3) == [2, 1, 0]
    with pytest.raises(ValueError, match="1 of 1"):
        class_mapping(["-1"], {0: "0", 1: "1"}, 2)
    assert class_mapping(["1"], {0: "1,000", 1: "1"}, 2) == [1]
    with pytest.raises(ValueError, match="1 of 1"):
        class_mapping(["1"], {0: "1,000", 1: "5"}, 2)


@pytest.mark.parametrize(
    "name, number",
    [("7", 7), ("07", 7), ("7.0", 7), ("LABEL_7", 7), ("class 7", 7), ("-7", None), ("7.5", None), ("7th", None),
     ("", None), ("²", None), ("7e0", None), ("7_1", None), ("x7", None)],
)  # fmt: skip
def test_which_names_are_numbers(name, number):
    assert number_of(name) == number


TEXT_ORDER = sorted(map(str, range(12)))  # "0", "1", "10", "11", "2", ...: what image folders do


@pytest.mark.parametrize("spelling", ["{}", "LABEL_{}", "class {}", "{}.0", "0{}"])
@pytest.mark.parametrize("id2label", [None, {i: f"LABEL_{i}" for i in range(12)}, {i: str(i) for i in range(12)}])
def test_a_number_means_the_class_of_that_number(spelling, id2label):
    names = [spelling.format(number) for number in TEXT_ORDER]
    assert class_mapping(names, id2label, 12) == [int(number) for number in TEXT_ORDER]
    assert numbers_of(names) == [int(number) for number in TEXT_ORDER]


def test_id2label_in_the_order_of_text_has_no_names_either():
    generator = {key: f"LABEL_{key}" for key in TEXT_ORDER}  # as JSON with sorted keys is read back
    assert ClassLookup(generator, 12).is_generic
    assert class_mapping([f"animal {i}" for i in range(12)], generator, 12) == list(range(12))


def test_numbers_are_never_matched_by_a_place_that_says_otherwise():
    animals = dict(enumerate("abcdefghijkl"))
    assert class_mapping([str(i) for i in range(12)], animals, 12) == list(range(12))  # the place says the same
    with pytest.raises(ValueError, match='12 of 12 .*mapping="number".*mapping="index"'):
        class_mapping(TEXT_ORDER, animals, 12)
    assert class_mapping(TEXT_ORDER, animals, 12, mapping="number") == [int(n) for n in TEXT_ORDER]  # as advised
    assert class_mapping(TEXT_ORDER, animals, 12, mapping="index") == list(range(12))
    from_one = [str(i) for i in range(1, 13)]
    with pytest.raises(ValueError, match="'12'.*mapping=\"index\"") as error:
        class_mapping(from_one, None, 12)
    assert "number" not in str(error.value).split("Pass")[1].replace("If the numbers", "")  # 12 is no index
    assert class_mapping(from_one, None, 12, mapping="index") == list(range(12))
    assert class_mapping(from_one, dict(enumerate(from_one)), 12) == list(range(12))  # both count from one
    with pytest.raises(ValueError, match="1 of 3"):
        class_mapping(["0", "1", "2"], {0: "1", 1: "2", 2: "3"}, 3)
    with pytest.raises(ValueError, match=r"\['1', '01'\] would all be drawn"):
        class_mapping(["1", "01", "2"], None, 3)
    with pytest.raises(ValueError, match=r"takes names that are numbers, and these are none: \['cat'\]"):
        class_mapping(["1", "cat"], None, 3, mapping="number")
    with pytest.raises(ValueError, match="10 of 10"):
        class_mapping([str(i) for i in range(10)], {0: "tench"}, 1000)


def test_numbers_in_any_order_are_places_of_a_label_set():
    names = ["3", "0", "9", "1", "2", "4", "5", "6", "7", "8"]
    generator = {index: ", ".join(row.names) for index, row in enumerate(label_set("imagenet-1k"))}
    assert class_mapping(names, generator, 1000, mapping="imagenette")[:3] == [491, 0, 701]


def test_a_wordnet_id_with_a_name_is_that_id_and_must_not_contradict_it():
    generator = {0: "tench, Tinca tinca", 1: "chain saw, chainsaw", 2: "n02085620-Chihuahua"}
    assert class_mapping(["n03000684-chain_saw", "n01440764: tench", "N02085620"], generator, 3) == [1, 0, 2]
    assert class_mapping(["n01440764-a name of my own"], generator, 3) == [0]
    with pytest.raises(ValueError, match="'n01440764-chainsaw' fits several: 0 .*, 1 "):
        class_mapping(["n01440764-chainsaw"], generator, 3)
    with pytest.raises(ValueError, match="1 of 1"):
        class_mapping(["n99999999-tench"], generator, 3)


@pytest.mark.parametrize("name", TRICKY)
def test_a_name_survives_mapping_files(name, tmp_path):
    generator, names = {0: "tench", 1: name, 2: "x"}, [name, "zebra"]
    forms = {
        "m.yaml": yaml.safe_dump({name: 2, "zebra": name}, allow_unicode=True),
        "m.yml": yaml.safe_dump([2, name]),
        "m.json": json.dumps({name: 2, "zebra": name}),
    }
    for file, text in forms.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
        assert class_mapping(names, generator, 3, mapping=tmp_path / file) == [2, 1]


@pytest.mark.parametrize("name", [name for name in TRICKY if name.isascii() and name[0].isalnum() and ":" not in name])
def test_a_name_survives_a_mapping_file_without_quotes(name, tmp_path):
    path = tmp_path / "m.yaml"
    text = name.strip().split(" #")[0].replace("\n", " ")
    path.write_text(f"{text}: 0\nzebra: 'x'\n")
    assert class_mapping([text, "zebra"], {0: "tench", 1: "x"}, 5, mapping=path) == [0, 1]
    if not text.isdecimal():
        path.write_text(f"zebra: {text}\n")
        assert class_mapping(["zebra"], {0: "tench", 1: text}, 5, mapping=path) == [1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("zebra: 1\nzebra: 2", "the key 'zebra' occurs twice"),
        ("? [a]\n: 1", "a key is a list"),
        ("zebra:", "must give a generator class"),
        ("zebra: ~", "must give a generator class"),
        ("zebra: 012", r"mapped to '012'"),
        ("zebra: 3.0", r"mapped to '3.0'"),
        ("7", "must give a generator class"),
        ("", "must give a generator class"),
    ],
)
def test_bad_mapping_files_are_refused(text, message, tmp_path):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        class_mapping(["zebra"], {0: "tench"}, 5, mapping=tmp_path / "m.yaml")


@pytest.mark.parametrize("mapping", [{True: 1}, {1.0: 1}, {None: 1}, {"zebra": True}, {"zebra": 1.0}, {"zebra": None}])
def test_a_dict_maps_text_and_whole_numbers_only(mapping):
    with pytest.raises(ValueError, match="must give a generator class"):
        class_mapping(["zebra", "True", "1.0", "None"], {0: "tench"}, 5, mapping=mapping)


@dataclass(frozen=True)
class Recipe:
    dataset: str = "digits"
    revision: str | None = None
    class_labels: list[str] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    steps: int = 10
    rate: float = 1.0


def parse(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return parse_config(Recipe, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("name", TRICKY)
def test_text_survives_config_files_and_command_lines(name, tmp_path):
    values = {"dataset": name, "revision": name, "class_labels": [name, "x"]}
    found = parse(tmp_path, yaml.safe_dump(values, allow_unicode=True))
    assert (found.dataset, found.revision, found.class_labels) == (name, name, [name, "x"])
    if not name.startswith("-") or name == "-1":
        assert parse_config(Recipe, ["--class_labels", "x", name]).class_labels == ["x", name]


def test_text_of_a_config_file_is_what_was_written(tmp_path):
    found = parse(tmp_path, "dataset: no\nrevision: 0123456\nclass_labels: [yes, 07, 1e5, 1:30, 2024-01-01, null, 3]")
    assert (found.dataset, found.revision) == ("no", "0123456")
    assert found.class_labels == ["yes", "07", "1e5", "1:30", "2024-01-01", "null", "3"]
    assert parse(tmp_path, "revision: null").revision is None is parse(tmp_path, "revision:").revision
    assert parse(tmp_path, "revision: 'null'").revision == "null"
    assert parse(tmp_path, "rate: 1e-3\nsteps: 1_000\nbudgets: [1, 10]") == Recipe(
        rate=1e-3, steps=1000, budgets=[1, 10]
    )


@pytest.mark.parametrize("text, message", [
    ("steps: 012", "`steps` must be int, got '012'"),
    ("steps: 1:30", "`steps` must be int, got '1:30'"),
    ("rate: 1:30", "`rate` must be float, got '1:30'"),
    ("budgets: [1, x]", "`budgets` must be int, got 'x'"),
    ("budgets: [true]", "`budgets` must be int, got True"),
    ("budgets: on", "`budgets` must be (list|int), got (True|'on')"),
    ("steps: 1\nsteps: 2", "the key 'steps' occurs twice"),
    ("dataset:", "`dataset` must be str, got None"),
    ("on: 1", "unknown field 'on'"),
])  # fmt: skip
def test_values_of_another_kind_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=6), st.randoms())
def test_any_names_are_found_in_any_order_and_form(names, random):
    names = list({canonical(name): name for name in names}.values())
    shuffled = random.sample(names, len(names))
    assert find_classes([unicodedata.normalize("NFD", name) for name in names], shuffled) == [
        shuffled.index(name) for name in names
    ]
    assert [folded(folded(name)) for name in names] == [folded(name) for name in names]
    generator = dict(enumerate(shuffled))
    try:
        found = class_mapping(names, generator, len(names))
    except ValueError as error:
        assert "certain match" in str(error) or "would all be drawn" in str(error)
    else:
        assert [generator[index] for index in found] == names or numbers_of(names) is not None


def test_classes_of_a_label_set_of_their_own_are_matched_by_its_places():
    animals = {0: "cat", 1: "dog", 2: "fox"}
    # a generator without names and a named classifier, and the other way round, in any order of the classes
    assert class_mapping(["0", "1", "2"], animals, 3, own_labels=[0, 1, 2]) == [0, 1, 2]
    assert class_mapping(["2", "0", "1"], animals, 3, own_labels=[2, 0, 1]) == [2, 0, 1]
    assert class_mapping(["fox", "cat", "dog"], None, 3, own_labels=[2, 0, 1]) == [2, 0, 1]
    assert class_mapping(["2"], {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, 3, own_labels=[2]) == [2]
    for names, id2label in ((["fox"], None), (["2"], animals), (["1"], None)):
        with pytest.raises(ValueError, match="1 of 1 dataset classes.*give it these: its `config.id2label`"):
            class_mapping(names, id2label, 3, own_labels=[2], owner="classifier")
