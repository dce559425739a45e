import pytest

from dsco_hf.schema import class_mapping


IMAGENET = {0: "tench, Tinca tinca", 1: "chain saw, chainsaw", 2: "crane", 3: "church, church building", 4: "crane"}


def test_classes_are_found_by_any_synonym_whatever_the_spelling():
    assert class_mapping(["church", "Chain_Saw", "chainsaw, whatever"][:2], IMAGENET, 5) == [3, 1]
    assert class_mapping(["tinca-tinca", "church building"], IMAGENET, 5) == [0, 3]


def test_keys_of_id2label_may_be_strings_as_in_a_saved_index():
    assert class_mapping(["church"], {str(key): name for key, name in IMAGENET.items()}, 5) == [3]


def test_the_same_label_set_settles_names_that_occur_twice():
    assert class_mapping(list(IMAGENET.values()), IMAGENET, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"'crane' fits several: \[2, 4\].*mapping="):
        class_mapping(["crane"], IMAGENET, 5)
    assert class_mapping(["crane"], IMAGENET, 5, mapping={"crane": 4}) == [4]


@pytest.mark.parametrize("id2label", [None, {}, {0: "0", 1: "1"}, {0: "LABEL_0", 1: "LABEL_1"}])
def test_without_names_classes_are_matched_by_index(id2label):
    assert class_mapping(["cat", "dog"], id2label, 2) == [0, 1]


def test_index_matching_is_for_missing_names_only():
    with pytest.raises(ValueError, match=r"2 of 2 dataset classes"):
        class_mapping(["cat", "dog"], {0: "tench", 1: "church"}, 2)
    with pytest.raises(ValueError, match=r"2 of 2"):
        class_mapping(["cat", "dog"], None, 3)


def test_all_unknown_classes_are_listed_with_the_nearest():
    with pytest.raises(ValueError, match=r"2 of 3 .*'tenches'.*Nearest: 'tench.*'; 'zebra'.*Pass `mapping="):
        class_mapping(["church", "tenches", "zebra"], {0: "tench", 3: "church", 1: "saw"}, 5)


def test_explicit_mapping_takes_indices_and_names():
    mapping = {"zebra": 1, "horse": "tench"}
    assert class_mapping(["zebra", "horse", "church"], IMAGENET, 5, mapping=mapping) == [1, 0, 3]
    with pytest.raises(ValueError, match=r"'zebra' \(mapped to 5\)"):
        class_mapping(["zebra"], IMAGENET, 5, mapping={"zebra": 5})
    with pytest.raises(ValueError, match=r"'zebra' \(mapped to 'tensh'\)"):
        class_mapping(["zebra"], IMAGENET, 5, mapping={"zebra": "tensh"})
    with pytest.raises(ValueError, match=r"\['zbra'\].*Nearest: 'zebra'"):
        class_mapping(["zebra"], IMAGENET, 5, mapping={"zbra": 1})


def test_two_classes_share_one_only_when_told_to():
    with pytest.raises(ValueError, match=r"\['church', 'church building'\] would all be drawn from class 3"):
        class_mapping(["church", "church building"], IMAGENET, 5)
    both = {"church": 3, "church building": 3}
    assert class_mapping(["church", "church building"], IMAGENET, 5, mapping=both) == [3, 3]
