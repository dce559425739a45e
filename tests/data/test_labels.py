import json
import logging
import re

import pytest

from dsco_hf.data.labels import PRESETS, ClassLookup, class_mapping, label_set
from dsco_hf.matching.targets import MatchingTargets


IMAGENET = {0: "tench, Tinca tinca", 1: "chain saw, chainsaw", 2: "crane", 3: "church, church building", 4: "crane"}
KNOWN = label_set("imagenet-1k")
IMAGENET_1K = {index: ", ".join(row.names) for index, row in enumerate(KNOWN)}  # as in the models of the Hub
NETTE = ("tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck",
         "gas pump", "golf ball", "parachute")  # fmt: skip
NETTE_INDICES = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
WOOF = ("Shih-Tzu", "Rhodesian ridgeback", "Beagle", "English foxhound", "Border terrier", "Australian terrier",
        "Golden retriever", "Old English sheepdog", "Samoyed", "Dingo")  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def test_classes_are_found_by_any_synonym_whatever_the_spelling():
    assert class_mapping(["church", "Chain_Saw", "chainsaw, whatever"][:2], IMAGENET, 5) == [3, 1]
    assert class_mapping(["tinca-tinca", "church building"], IMAGENET, 5) == [0, 3]


def test_keys_of_id2label_may_be_strings_as_in_a_saved_index():
    assert class_mapping(["church"], {str(key): name for key, name in IMAGENET.items()}, 5) == [3]


def test_the_same_label_set_settles_names_that_occur_twice():
    assert class_mapping(list(IMAGENET.values()), IMAGENET, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"'crane' fits several: 2 'crane', 4 'crane'\. Pass `mapping="):
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


def test_imagenet_has_its_thousand_classes_in_the_order_of_their_ids():
    ids = [row.wnid for row in KNOWN]
    assert len(set(ids)) == 1000 and ids == sorted(ids) and all(re.fullmatch(r"n\d{8}", wnid) for wnid in ids)
    assert KNOWN[0] == ("n01440764", ("tench", "Tinca tinca"))
    assert KNOWN[999] == ("n15075141", ("toilet tissue", "toilet paper", "bathroom tissue"))
    assert KNOWN[134].names == KNOWN[517].names == ("crane",)
    assert {name: len(label_set(name)) for name in PRESETS} == {
        "imagenet-1k": 1000, "imagenet-100": 100, "imagenette": 10, "imagewoof": 10, "cifar10": 10
    }  # fmt: skip
    for name in PRESETS:
        assert {row.wnid for row in label_set(name)} <= set(ids)
    with pytest.raises(ValueError, match="no label set 'imagenete'.*Nearest: 'imagenette'"):
        label_set("imagenete")


@pytest.mark.parametrize("names", [NETTE, [row.wnid for row in label_set("imagenette")]], ids=["names", "wordnet"])
@pytest.mark.parametrize("mapping", [None, "imagenette"])
def test_imagenette_by_name_and_by_wordnet_id(names, mapping):
    assert class_mapping(names, IMAGENET_1K, 1000, mapping=mapping) == NETTE_INDICES


def test_imagewoof_by_the_spelling_of_its_page_and_by_index():
    indices = [155, 159, 162, 167, 182, 193, 207, 229, 258, 273]
    assert class_mapping(WOOF, IMAGENET_1K, 1000) == indices
    assert class_mapping([str(i) for i in range(10)], IMAGENET_1K, 1000, mapping="imagewoof") == indices


def test_all_of_imagenet_in_its_own_order_and_any_subset_by_id():
    assert class_mapping(list(IMAGENET_1K.values()), IMAGENET_1K, 1000) == list(range(1000))
    assert class_mapping([row.wnid for row in KNOWN], IMAGENET_1K, 1000, mapping="imagenet-1k") == list(range(1000))
    hundred = label_set("imagenet-100")
    found = class_mapping([row.wnid for row in hundred], IMAGENET_1K, 1000, mapping="imagenet-100")
    assert [KNOWN[index].wnid for index in found] == [row.wnid for row in hundred]


def test_cifar10_has_a_proxy_for_each_class():
    with pytest.raises(ValueError, match="10 of 10"):
        class_mapping(CIFAR10, IMAGENET_1K, 1000)
    found = class_mapping(CIFAR10, IMAGENET_1K, 1000, mapping="cifar10")
    first = [KNOWN[index].names[0] for index in found]
    assert first == ["airliner", "sports car", "robin", "tabby", "impala", "Labrador retriever", "bullfrog", "sorrel",
                     "container ship", "trailer truck"]  # fmt: skip
    own = dict(enumerate(CIFAR10))  # a generator of these very classes draws them itself
    assert class_mapping(CIFAR10, own, 10, mapping="cifar10") == list(range(10))
    assert class_mapping(("plane", "car", *CIFAR10[2:]), own, 10, mapping=list(range(10))) == list(range(10))


def test_a_small_generator_of_imagenet_classes_is_understood_by_id_and_synonym():
    own = {0: "parachute", 1: "n02102040", 2: "church, church building"}
    assert class_mapping(["n03028079", "n03888257", "n02102040"], own, 3) == [2, 0, 1]
    assert class_mapping(["English springer spaniel", "chute"], own, 3) == [1, 0]
    assert class_mapping(["church", "parachute"], own, 3, mapping="imagenette") == [2, 0]


def test_a_thousand_classes_without_names_are_those_of_imagenet(caplog):
    with caplog.at_level(logging.WARNING, "dsco_hf"):
        assert class_mapping(["church", "n01440764"], None, 1000) == [497, 0]
    assert "taken for those of ImageNet-1k" in caplog.text
    with pytest.raises(ValueError, match="2 of 2"):
        class_mapping(["church", "n01440764"], None, 999)


@pytest.mark.parametrize(
    "name, choices",
    [
        ("crane", "134 'crane' (n02012849), 517 'crane' (n03126707)"),
        ("maillot", "638 'maillot' (n03710637), 639 'maillot, tank suit' (n03710721)"),
        ("missile", "657 'missile' (n03773504), 744 'projectile, missile' (n04008634)"),
        ("cardigan", "264 'Cardigan, Cardigan Welsh corgi' (n02113186), 474 'cardigan' (n02963159)"),
    ],
)
def test_ambiguous_names_are_refused_with_the_choices(name, choices):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} fits several: {choices}.")):
        class_mapping(["tench", name], IMAGENET_1K, 1000)
    for index, wnid in re.findall(r"(\d+) '[^']*' \((n\d{8})\)", choices):
        assert class_mapping(["tench", name], IMAGENET_1K, 1000, mapping={name: wnid}) == [0, int(index)]
        assert class_mapping([name], IMAGENET_1K, 1000, own_labels=[int(index)]) == [int(index)]


def test_a_label_set_settles_what_is_ambiguous_among_all_and_names_what_it_lacks():
    with pytest.raises(ValueError, match="'panda' fits several: n02509815, n02510455"):
        class_mapping(["panda"], IMAGENET_1K, 1000, mapping="imagenet-1k")
    with pytest.raises(ValueError, match="2 of 3 .*label set 'imagenette'.*'chruch' Nearest: 'church'.*'crane'"):
        class_mapping(["tench", "chruch", "crane"], IMAGENET_1K, 1000, mapping="imagenette")


def test_mapping_from_files_lists_and_by_index(tmp_path):
    yaml, listed, by_id = tmp_path / "mapping.yaml", tmp_path / "list.yml", tmp_path / "mapping.json"
    yaml.write_text("zebra: tench\nhorse: 1\n7: crane bird\n")
    listed.write_text("[3, tench]")
    by_id.write_text(json.dumps({"zebra": "n03028079"}))
    generator = IMAGENET | {2: "crane bird"}
    assert class_mapping(["zebra", "horse", "7"], generator, 5, mapping=yaml) == [0, 1, 2]
    assert class_mapping(["zebra", "horse"], generator, 5, mapping=str(listed)) == [3, 0]
    assert class_mapping(["zebra", "tench"], generator, 5, mapping=by_id) == [3, 0]
    assert class_mapping(["zebra", "horse"], generator, 5, mapping="index") == [0, 1]


def test_bad_mappings_are_refused(tmp_path):
    (tmp_path / "mapping.yaml").write_text("zebra: [1, 2]")
    (tmp_path / "broken.yaml").write_text("zebra: [1, 2")
    with pytest.raises(FileNotFoundError, match=r"no mapping file .*Nearest: 'mapping\.yaml'"):
        class_mapping(["zebra"], IMAGENET, 5, mapping=tmp_path / "maping.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        class_mapping(["zebra"], IMAGENET, 5, mapping=tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=r"must give a generator class .*got \{'zebra': \[1, 2\]\}"):
        class_mapping(["zebra"], IMAGENET, 5, mapping=tmp_path / "mapping.yaml")
    with pytest.raises(ValueError, match="lists 1 classes, the dataset has 2"):
        class_mapping(["zebra", "horse"], IMAGENET, 5, mapping=[1])
    with pytest.raises(ValueError, match="no label set 'cifar'.*Nearest: 'cifar10'"):
        class_mapping(["zebra"], IMAGENET, 5, mapping="cifar")


def test_lookup_finds_names_ids_and_indices():
    lookup = ClassLookup(IMAGENET_1K, 1000)
    assert (lookup.find("chainsaw"), lookup.find("n03000684"), lookup.find(491), lookup.find("zzz")) == (
        {491}, {491}, {491}, set()
    )  # fmt: skip
    assert "'chain saw'" in lookup.nearest("chain sow")


def test_targets_take_a_label_set_as_mapping(make, tmp_path):
    pipe = make.pipe(classifier=make.convnet())
    pipe.id2label = {0: "church", 1: "tench, Tinca tinca", 2: "gas pump"}
    images = make.images(names=("n01440764", "n03028079", "n03425413"))
    options = {"embedding_dim": 16, "progress": False}
    assert MatchingTargets.from_dataset(images, pipe, mapping="imagenette", **options).class_labels == [1, 0, 2]
    (tmp_path / "m.yaml").write_text("n01440764: 2\nn03425413: 1")
    targets = MatchingTargets.from_dataset(images, pipe, mapping=str(tmp_path / "m.yaml"), **options)
    assert targets.class_labels == [2, 0, 1]
