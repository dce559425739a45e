"""Every error that says what to do is followed somewhere: in a table of advice, or in a test that is named here."""

import ast
import functools
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "dsco_hf").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])
VERBS = "pass|give|use|(?<!to )choose|call|leave|make|remove|install|load|rename|delete"
ADVICE = re.compile(rf"\b({VERBS}|set(?= (?:`|HF|it|them))) |`--", re.IGNORECASE)

# a piece of the message, and the test that does what it says
ELSEWHERE = {
    "pass the images that the set was made for": "test_page.py::test_the_nearest_real_image_is_of_the_same_class",
    "which nobody could load from the Hub without its code": "test_hub_models.py::test_foreign_components_are_refused",
    "overwrite_features=True if those who load it": "test_hub.py::test_other_features_are_refused",
    "or say where it is (`--generator`, `generator=`)": (
        "test_set_records.py::test_one_set_drawn_again_from_its_folder_is_the_same"
    ),
    "holds targets that were made otherwise": "test_stale_results.py::test_targets_of_real_images",
    "`--resume false` starts anew": "test_recipe_options.py::test_starting_anew_where_a_run_has_left_something",
    "Give either `dataset`, the images to match, or `data_free`": (
        "test_recipes_targets.py::test_data_free_targets_and_another_bandwidth_without_a_new_pass"
    ),
    "give at least one method and one class": "test_report.py::test_sample_grid_of_one_image_and_large_images",
    "run `hf auth login`, set HF_TOKEN, or pass `token=`": "test_hub.py::test_private_repositories",
    "it is gated": "test_hub.py::test_gated_and_missing_sources",
    "recipes do it for `--imports": "test_recipes_concentrate.py::test_objects_of_ones_own_by_name",
    "leave them out, and give a method its own": "test_recipes_concentrate.py::test_objects_of_ones_own_by_name",
    "cannot be built: pass a network": "test_seams.py::test_what_errors_of_families_say_to_do_is_done",
    "There is a family of denoisers named": "test_seams.py::test_what_errors_of_families_say_to_do_is_done",
    "is no place for a": "test_seams.py::test_what_errors_of_families_say_to_do_is_done",
    "has no null class to drop labels to": "test_seams.py::test_what_errors_of_families_say_to_do_is_done",
    "which have no stored soft labels": "test_refusals.py::test_what_errors_say_to_do_is_done",
    "test images have no label": "test_refusals.py::test_what_errors_say_to_do_is_done",
    "The network has": "test_refusals.py::test_what_errors_say_to_do_is_done",
    "plans trainings on this machine": "test_search_options.py::test_a_search_is_planned_alone",
    "so give fewer synthetic ones": "test_refusals.py::test_what_errors_say_to_do_is_done",
    "points cannot be resolved with": "test_refusals.py::test_what_errors_say_to_do_is_done",
    "sets do not nest": "test_find.py::test_sets_nest_and_keep_the_shares_of_classes",
    "The trainings were tested on": "test_refusals.py::test_other_test_images_cannot_be_compared",
    "takes real images: pass a dataset": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "of real images, and these targets are": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "centroids need as many images of every class": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "a class, and the generator needs": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "images need (": "test_evaluators_training.py::test_images_of_weight_zero_teach_nothing",
    "steers nothing, so it is no part": "test_combined.py::test_contradictions_name_both_and_what_is_allowed",
    "of which a combination has one": "test_combined.py::test_contradictions_name_both_and_what_is_allowed",
    "draws without noise, so there is none": "test_combined.py::test_contradictions_name_both_and_what_is_allowed",
    "each take targets of their own": "test_combined.py::test_what_is_missing_is_told_as_by_the_parts",
    "make both of one dataset": "test_combined.py::test_what_is_missing_is_told_as_by_the_parts",
    "has no weight, but": "test_peers.py::test_weights_are_kept_doped_published_and_read",
    "make them with this pipeline and method": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "make them for as many steps": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "How many centroids?": "test_peers.py::test_what_errors_of_peers_say_to_do_is_done",
    "weighs the noise levels of diffusion": (
        "test_generators.py::test_a_flow_learns_the_difference_of_noise_and_image_at_levels_from_one_to_all"
    ),
    "whose steps are those of another class": "test_flow.py::test_schedulers_that_do_not_fit",
    "are not the weights of a SiT": "test_sit.py::test_weights_of_something_else",
    "is not what the generator predicts": "test_fine_tuning.py::test_the_schedule_is_that_of_the_trained_generator",
    "beside its weights, and is neither saved nor": (
        "test_text_to_image.py::test_adapters_draw_what_the_host_draws_and_are_saved_once_they_are_fused"
    ),
    "diffusers has no LoRA for a": "test_text_training.py::test_lora_where_there_is_none",
    "must divide the channels of the levels that attend": (
        "test_text_training.py::test_heads_of_attention_that_channels_cannot_be_cut_into"
    ),
    "levels that it was trained with": "test_advice_text.py::test_what_the_error_says_is_done_and_works",
    "noise levels end at": "test_flow.py::test_schedulers_that_do_not_fit",
    "give the output folder of a finished study": "test_efficiency.py::test_all_figures_from_one_command",
}
# what takes another installation, device, Hub or launch than a test has
BEYOND = {
    "pipeline_card.md is missing from this installation": "a damaged installation",
    "Install a newer one": "a newer version",
    "needs that package: pip install": "another installation",
    "cannot run `": "a device that cannot run a dtype",
    "or load it with `dtype=torch.float32`": "weights that overflow in half precision",
    "not logged in. Run `hf auth login`": "an account of the Hub",
    "and scripts are not run": "an older version of datasets",
    "cannot be split evenly over": "several processes",
    # not followed yet
    "Clarity asks a student of a small set": "a rule of one's own",
    "These images are in memory only": "a rule of one's own",
    "the record has the SHA-256": "a recorded rule",
}


def raised(node):
    """The errors that a statement raises or returns."""
    if isinstance(node, ast.Raise) and node.exc is not None:
        return node.exc
    made = node.value if isinstance(node, ast.Return) else None
    named = made.func.id if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) else ""
    return made if named.endswith("Error") else None


def text_of(node):
    """What a message says, with a zero byte wherever a value comes in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "\0"
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.IfExp):
        return text_of(node.body) + text_of(node.orelse)
    if isinstance(node, ast.Call):
        return "".join(text_of(part) for part in node.args)
    return "\0"


@functools.cache
def sites():
    """Every error that says what to do: where it is made, and its text."""
    return [
        (f"{path.relative_to(ROOT).as_posix()}:{node.lineno}", text)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (error := raised(node)) is not None and ADVICE.search(text := text_of(error))
    ]


def followed():
    """The patterns of all tables of advice."""
    for path in sorted((ROOT / "tests").rglob("test_advice*.py")):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Tuple) and len(node.elts) == 4 and isinstance(node.elts[1], ast.Constant):
                yield str(node.elts[1].value)


def words(text):
    return re.findall(r"[A-Za-z_]{2,}", text)


def is_of(pattern, text):
    """Whether a pattern was written for this message: its words, but for values, stand there in this order."""
    wanted, there = words(re.sub(r"\\(.)", r"\1", pattern)), words(text)
    if len(wanted) < 3:
        return False
    same = [0] * (len(there) + 1)  # the longest common subsequence
    for word in wanted:
        before = list(same)
        for place, other in enumerate(there, start=1):
            same[place] = before[place - 1] + 1 if word == other else max(before[place], same[place - 1])
    return same[-1] >= 0.8 * len(wanted)


@pytest.mark.slow
def test_every_error_that_says_what_to_do_is_followed_in_a_test():
    patterns, found = list(followed()), sites()
    assert len(patterns) > 150 and len(found) > 140
    missing = [
        f"{place}: {text}"
        for place, text in found
        if not any(is_of(pattern, text) for pattern in patterns)
        and not any(piece in text for piece in (*ELSEWHERE, *BEYOND))
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("piece", ELSEWHERE)
def test_the_tests_that_are_named_exist_and_the_messages_too(piece):
    name, _, function = ELSEWHERE[piece].partition("::")
    (path,) = (ROOT / "tests").rglob(name)
    assert f"def {function}(" in path.read_text(encoding="utf-8")
    assert any(piece in text for _, text in sites())


@pytest.mark.parametrize("piece", BEYOND)
def test_what_is_excused_is_still_said(piece):
    assert any(piece in text for _, text in sites())
