"""The site's pages, the notebooks, and the workflow that runs what CI runs."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


def pages_of(entry):
    """The files in a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages_of(part)]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    named = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | {"index.md", "contributing.md", "changelog.md"}
    pages |= {f"results/{page.parent.name}.md" for page in (ROOT / "recipes" / "results").glob("*/README.md")}
    api = {page for page in named if page.startswith("api/")}
    assert sorted(named) == sorted(pages | api)
    rooms = {page.removeprefix("api/").removesuffix(".md") for page in api}
    public = (ROOT / "dsco_hf" / "__init__.py").read_text(encoding="utf-8")
    assert rooms == set(re.findall(r"^from \.(\w+)", public, re.MULTILINE))


def test_formulas_are_closed_and_stand_in_no_code():
    for page in (ROOT / "docs").glob("*.md"):
        text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert text.count("$") % 2 == 0, page


@pytest.mark.slow
@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_notebooks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    small = tmp_path / page.name
    small.write_text(text.replace("steps=200", "steps=10").replace("range(2)", "range(1)"), encoding="utf-8")
    runpy.run_path(str(small))
    assert capsys.readouterr().out.strip()
    assert len(NOTEBOOKS) == 3 and text.count("\n# %%") >= 8


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["test"]
    steps = re.findall(r"^step \w+ \d+ (.*)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    run = [step["run"] for step in job["steps"] if "run" in step]
    assert [command for command in run if command.startswith("make ")] == steps
    matrix = job["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.slow
def test_the_site_is_put_together_without_a_link_that_leads_nowhere(tmp_path):
    pytest.importorskip("latex2mathml", reason="`make docs` installs what the site is built with")
    done = subprocess.run([sys.executable, ROOT / "docs" / "assemble.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = ROOT / "build" / "docs"
    assert "<math" in (built / "method.md").read_text(encoding="utf-8")
    assert "::: dsco_hf.concentration.concentrate.concentrate" in (built / "api" / "concentration.md").read_text()
    for page in built.rglob("*.md"):
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)\s#]+)", text):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"
