import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from dsco_hf.concentration import methods
from dsco_hf.studies import tables as report
from dsco_hf.studies.figures import accuracy as figures
from dsco_hf.studies.figures import accuracy as report_figures
from dsco_hf.studies.figures import features as feature_figures
from launches import run
from recipes import readme_table


ROOT = Path(__file__).parents[2]
METHODS = ["random", "herding", "plain", "nopt", "nopt-data-free", "nopt-classifier-only", "nopt-quantile"]


def row(method, budget, accuracy, **fields):
    standard = {"images": 10 * budget, "accuracy_std": 0.01, "discrepancy": 0.1 / budget, "seconds": 2.0 * budget}
    return {"method": method, "images_per_class": budget, "accuracy_mean": accuracy, **standard, **fields}


@pytest.fixture
def results():
    rows = [row(m, b, 0.7 + 0.01 * i + 0.02 * b) for i, m in enumerate(METHODS) for b in (1, 3, 10)]
    rows.append(row("nopt+doping", 43, 0.9972, discrepancy=None, seconds=None, accuracy_std=0.0))
    rows.append(row("random", 43, 0.984, seconds=None))
    full = {"accuracy_mean": 0.9979, "accuracy_std": 0.0014, "seeds": 3, "images": 1437}
    return {"dataset": "digits", "full": full, "rows": rows}


def picture(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# --- samples


def test_sample_grid_shows_every_image_whole_and_enlarged(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shades = torch.rand(2, 3, 1, 8, 8, generator=generator) * 1.8 - 0.9
    path = report.sample_grid({"nopt": shades}, ["a", "b"], tmp_path / "new" / "samples.png", cell_size=48)
    seen = {int(value) for value in np.unique(picture(path)[..., 0])}
    wanted = {int(value) for value in ((shades + 1) / 2 * 255).flatten()}
    assert len(wanted - seen) <= 0.02 * len(wanted) + 1  # nearest neighbour: no value is blended away


@pytest.mark.parametrize("channels", [1, 3])
def test_sample_grid_grows_with_methods_and_takes_gray_and_colour(tmp_path, channels):
    images = torch.zeros(3, 2, channels, 4, 4)
    one = picture(report.sample_grid({"plain": images}, ["a", "b", "c"], tmp_path / "1.png"))
    two = picture(
        report.sample_grid({"plain": images, "anything": images[:, :1]}, ["a", "b", "c"], tmp_path / "2.png")
    )
    assert two.shape[0] > one.shape[0] and two.shape[1] == one.shape[1]


def test_sample_grid_of_one_image_and_large_images(tmp_path):
    for size in (1, 100):
        assert report.sample_grid({"real": torch.zeros(1, 1, 3, size, size)}, ["x"], tmp_path / "s.png").is_file()


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ({}, ["a"], "nothing to draw"),
        ({"plain": torch.zeros(2, 1, 1, 4, 4)}, ["a"], r"K = 1, the number of class names"),
        ({"plain": torch.zeros(1, 1, 2, 4, 4)}, ["a"], "1 or 3 channels"),
        ({"plain": torch.zeros(1, 0, 1, 4, 4)}, ["a"], "no image per class"),
    ],
)
def test_sample_grid_refuses(tmp_path, rows, names, message):
    with pytest.raises(ValueError, match=message):
        report.sample_grid(rows, names, tmp_path / "samples.png")


# --- accuracy


@pytest.mark.slow
def test_accuracy_figure_is_the_same_file_each_time(tmp_path, results):
    first, again = (report.accuracy_figure(results, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == again and picture(tmp_path / "a.png").std() > 5


@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.5, 1.0])
def test_accuracy_figure_of_one_point_at_any_height(tmp_path, accuracy):
    rows = [row("nopt", 1, accuracy, accuracy_std=None)]
    assert report.accuracy_figure({"rows": rows}, tmp_path / "accuracy.png").is_file()
    full = {"accuracy_mean": 1.0, "accuracy_std": 0.0}
    assert report.accuracy_figure({"rows": rows, "full": full}, tmp_path / "accuracy.png").is_file()


CROWDED = {
    "dataset": "/home/ann/my photos/flowers/",
    "rows": [
        row(method, budget, accuracy, accuracy_std=0.05, architecture="resnet-18")
        for method in ("random", "herding", "plain", "nopt", "a peer of long name", "another")
        for budget, accuracy in ((1, 0.02), (10, 0.6), (12, 0.99), (50, 1.0))
    ],
}


@pytest.mark.parametrize(
    "changes", [{}, {"full": {"accuracy_mean": 0.14, "images": 99}}, {"full": {"accuracy_mean": 1.0}}, {"rows": None}]
)
def test_nothing_hides_a_point_of_the_accuracy_figure(results, changes):
    chosen = CROWDED | changes if changes.get("rows", 0) == 0 else results
    figure = figures.draw_accuracy(chosen)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    points = np.concatenate([axes.transData.transform(line.lines[0].get_xydata()) for line in axes.containers])
    assert len(points) == len(chosen["rows"])
    assert all(axes.bbox.contains(*point) for point in points)  # an accuracy of 0 or 100 % is on the axis, too
    boxes = [figure.legends[0].get_window_extent(), *(text.get_window_extent() for text in axes.texts)]
    reach = np.array([[-8, -8], [8, 8]])  # half of a marker
    assert not any(box.overlaps(Bbox(point + reach)) for box in boxes for point in points)
    named = [label for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels() if label.get_text()]
    boxes += [label.get_window_extent() for label in named]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    whole = figure.bbox
    assert all(whole.contains(*corner) for box in boxes for corner in box.get_points())


def test_chance_is_drawn_and_named(results):
    (axes,) = figures.draw_accuracy(results).axes
    (line,) = [line for line in axes.lines if line.get_label() == "chance"]
    assert set(line.get_ydata()) == {0.1}  # ten classes, by the images of the rows
    assert "chance\n10 %" in [text.get_text() for text in axes.texts]
    assert axes.get_ylim()[0] < 0.1
    (axes,) = figures.draw_accuracy({**results, "classes": 1000}).axes
    assert "chance\n0.1 %" in [text.get_text() for text in axes.texts]
    uneven = [row("nopt", 3, 0.5, images=10), row("nopt", 5, 0.5)]
    (axes,) = figures.draw_accuracy({"rows": uneven}).axes
    assert not [text for text in axes.texts if "chance" in text.get_text()]


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "digits: networks trained"),
        ({"dataset": "/home/ann/my photos/flowers/"}, "flowers: networks trained"),
        ({"dataset": r"C:\photos\flowers"}, "flowers: networks trained"),
        ({"dataset": "uoft-cs/cifar10", "config": {"architecture": "convnet-3"}}, "cifar10: ConvNet-3 trained"),
        ({"dataset": "CIFAR-10 (JPEG), 16 px"}, "CIFAR-10 (JPEG), 16 px: networks"),
        ({"dataset": "a/b", "title": "MNIST/USPS"}, "MNIST/USPS: networks"),
        ({"dataset": "x", "config": {"architecture": "vit"}}, "x: vit trained"),
    ],
)
def test_titles_are_names_that_a_reader_knows(results, changes, title):
    (axes,) = figures.draw_accuracy(results | changes).axes
    assert axes.get_title(loc="left").startswith(title)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("images per class", "test accuracy (%, spaced by error)")


def test_no_rows_no_figure(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        report.accuracy_figure({"rows": []}, tmp_path / "accuracy.png")
    with pytest.raises(ValueError, match="no rows"):
        report.results_table({})


def test_styles_are_told_apart_without_colour():
    styles = methods.METHODS.values()
    assert len({(style.marker, style.emphasis) for style in styles}) == len({style.color for style in styles})


def test_compared_datasets_of_any_name_are_told_apart():
    found = methods.find_methods(["peer", "random", "ours", "third", "nopt"])
    assert list(found) == ["random", "nopt", "peer", "ours", "third"]
    assert found["random"] == methods.METHODS["random"] and found["peer"] == methods.find_method("peer")
    assert len({style.marker for style in found.values()} - {"o"}) == 3
    assert len({style.color for style in found.values()}) == 5
    assert len(methods.find_methods(str(i) for i in range(20))) == 20


# --- features


def features(rows, classes, shift=0.0, dimensions=6):
    generator = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % classes
    return torch.randn(rows, dimensions, generator=generator) + 3 * labels[:, None] + shift, labels


@pytest.mark.slow
def test_feature_figure(tmp_path):
    sets = {"plain": features(9, 3, shift=1.0), "nopt": features(9, 3)}
    path = report.feature_figure(features(60, 3), sets, ["a", "b", "c"], tmp_path / "features.png")
    assert picture(path).std() > 5
    assert report.feature_figure(features(60, 3), sets, ["a", "b", "c"], path, classes=[1]).is_file()


def test_features_are_drawn_again_from_the_file_beside_the_picture(tmp_path):
    some = features(9, 3)
    sets = {"plain": features(6, 2, shift=1.0), "nopt": some}  # no plain image of the last class
    path = report.feature_figure(features(60, 3), sets, ["a", "b", "c"], tmp_path / "features.png")
    kept = feature_figures.load_projections(path.with_suffix(".safetensors"))
    again = report_figures.save_figure(feature_figures.draw_features(kept), tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes() and path.with_suffix(".safetensors").stat().st_size < 20_000
    assert [one.names for one in kept] == [("a", "b", "c"), ("a",), ("b",)] and kept[0].sets["plain"][2].isnan().all()
    means = torch.zeros(3, 6)  # those of a larger population
    (_, one) = feature_figures.project_features(features(60, 3), sets, list("abc"), classes=[1], means=means)
    assert one.numbers["nopt"] == pytest.approx(float(some[0][some[1] == 1].mean(0).square().sum()))
    with pytest.raises(FileNotFoundError, match="run the study again"):
        feature_figures.load_projections(tmp_path / "other.safetensors")


def test_samples_are_drawn_again_from_the_file_beside_the_picture(tmp_path):
    levels = torch.arange(256).reshape(1, 1, 1, 16, 16) / 127.5 - 1
    report_figures.save_samples({"plain": levels, "nopt": -levels}, ["a"], tmp_path / "samples.safetensors")
    rows, names = report_figures.load_samples(tmp_path / "samples.safetensors")
    assert list(rows) == ["plain", "nopt"] and names == ["a"]
    torch.testing.assert_close(rows["plain"], levels)
    large = torch.full((2, 1, 3, 256, 256), 0.5)
    report_figures.save_samples({"nopt": large}, ["a", "b"], tmp_path / "large.safetensors")
    assert report_figures.load_samples(tmp_path / "large.safetensors")[0]["nopt"].shape == (2, 1, 3, 128, 128)
    with pytest.raises(FileNotFoundError, match="run the study again"):
        report_figures.load_samples(tmp_path / "other.safetensors")


def test_what_stands_over_a_panel_stays_over_it():
    sets = {"plain": features(90, 10, shift=1.0), "nopt": features(90, 10)}
    names = [f"{'digit ' * 9}{i}" for i in range(10)]
    figure = feature_figures.draw_features(feature_figures.project_features(features(200, 10), sets, names))
    FigureCanvasAgg(figure).draw()
    titles = [axes.title if axes.get_title() else axes._left_title for axes in figure.axes]
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) == 5 and not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_feature_figure_of_one_class_and_few_images(tmp_path):
    path = tmp_path / "features.png"
    assert report.feature_figure(features(3, 1), {"nopt": features(1, 1)}, ["only"], path).is_file()
    real = (torch.randn(4, 6), torch.tensor([0, 0, 0, 1]))  # one class of a single image
    assert report.feature_figure(real, {"nopt": features(2, 2)}, ["a", "b"], path).is_file()


def test_names_of_classes_do_not_lie_on_each_other():
    figure = Figure(figsize=(5, 5), dpi=100)
    axes = figure.add_subplot()
    axes.set(xlim=(-1, 1), ylim=(-1, 1))
    near = {name: torch.tensor([0.01 * i, 0.0]) for i, name in enumerate(("cat", "dog", "horse", "ship"))}
    feature_figures._name_points(axes, near, [torch.tensor([0.1, 0.05])])
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4 and not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    points = [axes.transData.transform(point.numpy()) for point in near.values()]
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_projection_finds_the_long_axes_with_fixed_signs():
    values = torch.zeros(4, 3)
    values[:, 1] = torch.tensor([-3.0, 3.0, 0.0, 0.0])
    values[:, 2] = torch.tensor([0.0, 0.0, 1.0, -1.0])
    center, axes, shares = feature_figures._projection(values + 5)
    torch.testing.assert_close(center, torch.full((3,), 5.0))
    torch.testing.assert_close(axes, torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    assert shares == pytest.approx([0.9, 0.1])


def test_feature_figure_refuses(tmp_path):
    with pytest.raises(ValueError, match="At least three real images"):
        report.feature_figure(features(2, 1), {}, ["a"], tmp_path / "f.png")
    with pytest.raises(ValueError, match=r"Features of 'nopt' have shape \(3, 5\).*\(N, 6\)"):
        report.feature_figure(features(9, 1), {"nopt": features(3, 1, dimensions=5)}, ["a"], tmp_path / "f.png")


@pytest.mark.slow
def test_figures_leave_pyplot_alone(tmp_path, results):
    code = (
        "import sys, json, dsco_hf.studies.tables as r; "
        f"r.accuracy_figure(json.load(open({str(tmp_path / 'r.json')!r})), {str(tmp_path / 'a.png')!r}); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    (tmp_path / "r.json").write_text(json.dumps(results))
    assert run([sys.executable, "-c", code]).returncode == 0


# --- tables


def test_results_table_is_complete_and_in_order(results):
    lines = report.results_table(results).splitlines()
    assert lines[0] == "| method | 1 per class | 3 per class | 10 per class | 43 per class | synthesis |"
    table = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") == 7 for line in table) and len(table) == 2 + 8
    assert [line.split("|")[1].strip() for line in table[2:]][-2:] == ["**DsCo**", "**DsCo + doping**"]
    assert "| 72.00 ± 1.00 (0.1) | 76.00 ± 1.00 (0.033) | 90.00 ± 1.00 (0.01) | 98.40 ± 1.00 (0.0023) |" in table[2]
    assert table[-1].endswith("| – | – | – | 99.72 ± 0.00 | – |")
    assert "20.0 s at 10" in table[4]
    assert "All training data (1,437 images): 99.79 ± 0.14 %. Chance: 10 %." in lines
    assert "*" not in report.results_table(results).replace("**", "")  # no significance is claimed
    assert "whether differences are significant was not tested" in lines[-1]


def test_results_table_of_one_unknown_method():
    table = report.results_table({"rows": [{"method": "new", "images_per_class": 5, "accuracy_mean": 0.5}]})
    assert "| new | 50.00 | – |" in table and "All training data" not in table


@pytest.mark.slow
def test_readme_table_is_written_between_marks_and_checked(tmp_path, results):
    (tmp_path / "results.json").write_text(json.dumps(results))
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\nend\n")

    def run(*options):
        return readme_table.main(["--results", str(tmp_path / "results.json"), "--readme", str(readme), *options])

    assert run("--check") == 1 and "old" in readme.read_text()
    assert run() == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("<!-- results:end -->\nend\n") and "old" not in text
    assert report.results_table(results).strip() in text
    assert run("--check") == 0
    readme.write_text(text + "<!-- cifar10:begin --><!-- cifar10:end -->\n")
    assert run("--check", "--name", "cifar10") == 1
    assert run("--name", "cifar10") == 0 and run("--check", "--name", "cifar10") == 0
    assert readme.read_text().count(report.results_table(results).strip()) == 2 and run("--check") == 0
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="<!-- results:begin -->"):
        run()


@pytest.mark.parametrize("page", ["README.md", "pipeline_card.md"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("results", "quickstart"), ("cifar10", "bench_cifar10_16px"), ("imagenette", "bench_imagenette_32px")],
)
def test_the_tables_shown_are_those_recorded(page, name, folder):
    results = ROOT / "recipes" / "results" / folder / "results.json"
    options = ["--results", str(results), "--readme", str(ROOT / page), "--name", name, "--check"]
    assert readme_table.main(options) == 0


def test_random_real_images_stand_beside_every_discrepancy():
    """In a row of their own, or in the cell where there is none."""
    rows = [row("nopt", 1, 0.5, discrepancy=0.2, random_discrepancy=0.6)]
    assert "| 50.00 ± 1.00 (0.2, random 0.6) |" in report.results_table({"rows": rows})
    rows.append(row("random", 1, 0.4, discrepancy=0.6, random_discrepancy=0.6))
    assert "| 50.00 ± 1.00 (0.2) |" in report.results_table({"rows": rows})
