"""Draws all figures of a study again, as PNG and PDF, from its result files alone.

    python recipes/figures.py outputs/experiment
    python recipes/figures.py recipes/results/cifar10_16px --cost denoiser_calls

Writes to figures/ in that folder: features (targets and small sets in the RKHS, figure 1 of the paper, arXiv
2603.27987), accuracy (its figure 3), cost (its figure 4, and accuracy against cost with its Pareto front), samples
(its figure 5), efficiency (what an image is worth, and what is left of the difference) and efficiency.json. features
and samples are drawn from features.safetensors and samples.safetensors, which a study writes beside results.json.
"""

from __future__ import annotations

from dsco.options import answer


answer(__name__, __file__)  # --help and mistakes, before anything heavy is imported

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from dsco_hf.studies.figures.accuracy import draw_accuracy, draw_samples, load_samples, save_figure
from dsco_hf.studies.figures.efficiency import draw_cost, draw_efficiency
from dsco_hf.studies.figures.features import draw_features, load_projections
from dsco_hf.studies.lossless.efficiency import efficiency
from dsco_hf.utils.configs import parse_config
from dsco_hf.utils.files import write_json


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Options of this recipe.

    Attributes:
        study: folder with a results.json.
        cost: number of a row that is drawn as its cost: "seconds", "denoiser_calls", "flops", or
            "flops_dit_xl_2", those of the same drawing with DiT-XL/2 at 256 px.
        output_dir: by default figures/ in the study's folder.
    """

    study: str = "outputs/experiment"
    cost: str = "seconds"
    output_dir: str | None = None


def main(arguments: list[str] | None = None) -> None:
    """Reads the results, draws what they hold, and says what was left out."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        given[0] = f"--study={given[0]}"
    recipe = parse_config(Figures, given, description=__doc__)
    file = Path(recipe.study) / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{recipe.study} has no results.json: give the output folder of a finished study.")
    results = json.loads(file.read_text(encoding="utf-8"))
    folder = Path(recipe.output_dir or Path(recipe.study) / "figures")
    figures = {
        "features": lambda: draw_features(load_projections(file.with_name("features.safetensors"))),
        "accuracy": lambda: draw_accuracy(results),
        "cost": lambda: draw_cost(results, cost=recipe.cost),
        "samples": lambda: draw_samples(*load_samples(file.with_name("samples.safetensors"))),
    }

    def worth():
        report = efficiency(results)
        write_json(folder / "efficiency.json", report)
        return draw_efficiency(report, results)

    for name, draw in {**figures, "efficiency": worth}.items():
        try:
            figure = draw()
        except (ValueError, FileNotFoundError) as error:
            print(f"{name}: not drawn. {error}")
            continue
        for suffix in ("png", "pdf"):
            print(save_figure(figure, folder / f"{name}.{suffix}"))


if __name__ == "__main__":
    main()
