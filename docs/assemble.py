"""Puts the pages of the site together in build/docs, from which mkdocs builds it.

    python docs/assemble.py && mkdocs build --strict

The pages are docs/*.md, the README as the first one, one for each folder of recipes/results with its table and
pictures, and one for each room of the package with what it gives to users. Links between files of the repository
become links between pages; formulas in dollars become MathML, so that no page needs a script for them.
"""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from latex2mathml.converter import convert


ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "docs"
RESULTS = ROOT / "recipes" / "results"
ROOMS = {
    "concentration": "Concentrating, doping, choosing",
    "sampling": "The pipeline and its methods",
    "matching": "Targets and objectives",
    "evaluators": "Evaluators and protocols",
    "generators": "Generators",
    "studies": "Studies",
    "hub": "Publishing and reading",
    "data": "Reading images",
}
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def main() -> None:
    """Makes build/docs anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    for page, place in sources().items():
        write(place, relinked(page.read_text(encoding="utf-8"), page, place) + tables(page))
    for room, title in ROOMS.items():
        write(SITE / "api" / f"{room}.md", reference(room, title))


def sources() -> dict[Path, Path]:
    """Which file of the repository becomes which page."""
    pages = {page: SITE / page.name for page in sorted((ROOT / "docs").glob("*.md"))}
    others = {ROOT / name: SITE / name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
    results = {page: SITE / "results" / f"{page.parent.name}.md" for page in sorted(RESULTS.glob("*/README.md"))}
    return {ROOT / "README.md": SITE / "index.md", **pages, **others, **results}


def write(place: Path, text: str) -> None:
    """A page; folders are made."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def relinked(text: str, page: Path, place: Path) -> str:
    """A page's text, its links as they are on the site and its formulas as MathML; code is left as it is."""
    parts = _CODE.split(text)
    parts[::2] = [_LINK.sub(lambda link: moved(link, page, place), mathml(part)) for part in parts[::2]]
    # the text of a link may be code
    return _LINK.sub(lambda link: moved(link, page, place), "".join(parts)) if "](" in text else "".join(parts)


def moved(link: re.Match[str], page: Path, place: Path) -> str:
    """A link to a file of the repository, as one to a page, or to a copy of the file."""
    target = (page.parent / link[2]).resolve()
    if "://" in link[2] or not target.is_relative_to(ROOT) or not target.exists() or SITE in target.parents:
        return link[0]
    target = target / "README.md" if (target / "README.md").is_file() else target
    if target in sources():
        found = sources()[target]
    elif target.is_dir():
        found = SITE / "results.md"
    else:  # a picture, a results file, a recipe
        found = SITE / "files" / target.relative_to(ROOT)
        found.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(target, found)
    steps = Path(*[".."] * len(place.parent.relative_to(SITE).parts), found.relative_to(SITE))
    return f"{link[1]}{steps.as_posix()}{link[3] or ''}{link[4]}"


def mathml(text: str) -> str:
    """Formulas in `$…$` and `$$…$$` as MathML."""
    block = re.sub(r"\$\$(.+?)\$\$", lambda found: convert(found[1].strip(), display="block"), text, flags=re.DOTALL)
    # in a span, as Markdown takes a <math> that begins a line for a block
    return re.sub(r"\$([^$]+)\$", lambda found: f"<span>{convert(found[1].replace(chr(10), ' '))}</span>", block)


def tables(page: Path) -> str:
    """The recorded tables and pictures of a folder of results, under its text, where this does not show them."""
    if page.parent.parent != RESULTS:
        return ""
    place, shown = SITE / "results" / "x.md", page.read_text(encoding="utf-8")
    found = [path for path in sorted(page.parent.glob("*.md")) if path != page]
    text = "".join(f"\n\n## {path.name}\n\n{unheaded(path.read_text(encoding='utf-8'))}" for path in found)
    pictures = [path.name for path in sorted(page.parent.glob("*.png")) if f"]({path.name})" not in shown]
    return relinked(text + "".join(f"\n\n![{name}]({name})" for name in pictures), page, place)


def unheaded(text: str) -> str:
    """A page without a first heading of its own."""
    return re.sub(r"\A\s*# .*\n", "", text)


def reference(room: str, title: str) -> str:
    """The page of a room: each public name of the package that comes from it."""
    tree = ast.parse((ROOT / "dsco_hf" / "__init__.py").read_text(encoding="utf-8"))
    found = [
        f"dsco_hf.{node.module}.{name.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == room
        for name in node.names
    ]
    return f"# {title}\n\n" + "\n\n".join(f"::: {name}" for name in found) + "\n"


if __name__ == "__main__":
    main()
