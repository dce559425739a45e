"""The package is a one-way street: a room imports only rooms above it, and a file only files above it in its room."""

import ast
from pathlib import Path

import pytest

import dsco_hf


PACKAGE = Path(dsco_hf.__path__[0])
ORDER = {
    "utils": ["markdown", "names", "processes", "safety", "values", "files", "configs", "origins", "progress"],
    "data": ["images", "labels", "schema", "shards", "pixels", "splits", "image_folders", "opening", "datasets"],
    "generators": [
        *["base", "steps", "prompts", "families", "denoisers", "failures"],
        *["latents", "data", "training"],
    ],
    "evaluators": [
        *["augmentation", "preprocessing", "configurations", "models", "protocol_fields"],
        *["protocols", "batches", "training", "evaluation"],
    ],
    "matching": [
        *["files", "kernels", "features", "feature_spec"],
        *["population", "targets", "kept", "objectives", "discrepancy"],
    ],
    "sampling": ["models", "loading", "hosts", "call", "methods", "peers", "flat", "checks", "pipeline"],
    "concentration": [
        *["methods", "selection", "config_records", "set_records", "concentrate"],
        *["additions", "records", "run_folder", "runs"],
    ],
    "costs": ["tracing", "passes", "probe", "plan"],
    "studies": [
        *["options", "figures", "generator_check", "metrics"],
        *["kept", "plans", "tables", "study", "lossless"],
    ],
    "hub": ["cards", "push", "given", "model_cards", "folder", "models", "remake", "verification", "publish"],
}
# A folder of a room counts as one file there, and has its own order.
FOLDERS = {
    "generators.families": ["dit", "unet", "stable_diffusion", "pixart", "stable_diffusion_3"],
    "matching.objectives": ["base", "mean_matching", "regression", "evidence"],
    "sampling.methods": ["noise", "nopt", "released", "combined"],
    "sampling.peers": ["statistics", "best_of_n", "mgd3", "d4m", "uag", "s3", "dmgd", "d3hr", "igd"],
    "concentration.selection": ["features", "base", "dynamics", "difficulty", "coverage", "ridge_rule"],
    "concentration.additions": ["beginning", "doping", "soft_labels"],
    "studies.figures": ["accuracy", "features", "efficiency", "page"],
    "studies.lossless": [
        "curves",
        "noninferiority",
        "search",
        "checks",
        "find",
        "options",
        "planned",
        "report",
        "efficiency",
    ],
}
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = list(ORDER)


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules (and names) that a file imports, relative imports resolved."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join((PACKAGE.name, *(part for part in parts if part != "__init__")))


def place(name: str) -> tuple[int, ...]:
    """Where a module stands: its room's place, its own, that in a folder; an `__init__` comes after its files."""
    _, *parts = name.split(".")
    orders = [NAMES, *([ORDER[parts[0]]] if parts else []), FOLDERS.get(".".join(parts[:2]), [])]
    return tuple(order.index(part) for order, part in zip(orders, parts, strict=False)) + (
        (len(orders[len(parts)]),) if len(parts) < len(orders) else ()
    )


def test_few_rooms_of_few_files():
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES} - {"__init__.py"} == set(ORDER)
    assert len(ORDER) <= 10
    for room, files in (ORDER | FOLDERS).items():
        folder = PACKAGE.joinpath(*room.split("."))
        modules = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
        assert {path.stem for path in modules} - {"__init__"} == set(files)
        assert len(modules) <= 10


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_imports_only_what_stands_above_it(path):
    own = module_name(path)
    names = {module_name(file) for file in FILES}
    imported = imported_modules(path) & names - {own, PACKAGE.name}
    if own != PACKAGE.name:
        assert PACKAGE.name not in imported_modules(path), "a file of the package imports files, not the package"
    below = sorted(name for name in imported if place(name) >= place(own))
    assert not below, f"{own} imports {below}, which stand below it or beside it"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_package_never_imports_recipes_or_tests(path):
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & {"recipes", "tests"}


def test_recipes_import_the_package_only():
    recipes = PACKAGE.parent / "recipes"
    names = {path.stem for path in recipes.rglob("*.py")} | {"recipes", "tests"}
    for path in recipes.rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & names, f"{path.name} imports {roots & names}"
