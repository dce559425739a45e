"""The package is a one-way street: a file imports only what stands above it."""

import ast
from pathlib import Path

import pytest

import dsco_hf


PACKAGE = Path(dsco_hf.__path__[0])
ORDER = [
    "names",
    "yaml_text",
    "schema",
    "values",
    "memory",
    "pace",
    "team",
    "files",
    "labels",
    "configs",
    "pace",
    "digests",
    "seeds",
    "safety",
    "weights",
    "methods",
    "samples",
    "markdown",
    "config_records",
    "cards",
    "model_cards",
    "shards",
    "push",
    "paths",
    "splits",
    "image_folders",
    "opening",
    "images",
    "pixels",
    "image_sizes",
    "data",
    "kernels",
    "origins",
    "preprocessing",
    "features",
    "feature_spec",
    "feature_files",
    "population",
    "target_files",
    "targets",
    "quantile",
    "made_targets",
    "objectives",
    "noise",
    "failures",
    "components",
    "latents",
    "checks",
    "plan",
    "optimization",
    "model_hub",
    "pipeline_loading",
    "pipeline",
    "generators",
    "generator_data",
    "fine_tuning",
    "generator_checkpoints",
    "generator_training",
    "generator_evaluation",
    "set_records",
    "kept",
    "concentrate",
    "run_folder",
    "runs",
    "tracing",
    "costs",
    "probe",
    "shapes",
    "evaluators",
    "model_loading",
    "clarity",
    "doping",
    "metrics",
    "records",
    "joined_records",
    "given",
    "folder",
    "verification",
    "remake",
    "hub",
    "figures",
    "feature_figures",
    "report",
    "study_plans",
    "studies",
]
ORDER_OF_EVALUATORS = [
    "norms",
    "configurations",
    "models",
    "augmentation",
    "protocol_fields",
    "protocols",
    "checks",
    "losses",
    "checkpoints",
    "batches",
    "training",
    "evaluation",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules (and names) that a file imports, relative imports resolved."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def place(name: str) -> tuple[int, int]:
    """Where a module of the package stands: (place in the package, place within `evaluators`)."""
    parts = name.split(".")[1:]
    if not parts:
        return (len(ORDER), 0)  # the package's own __init__ may import all
    inner = ORDER_OF_EVALUATORS.index(parts[1]) if parts[0] == "evaluators" and len(parts) > 1 else 99
    return (ORDER.index(parts[0]), inner)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join((PACKAGE.name, *(part for part in parts if part != "__init__")))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_has_its_place(path):
    name = module_name(path)
    if name.startswith(f"{PACKAGE.name}.evaluators."):
        assert name.rpartition(".")[2] in ORDER_OF_EVALUATORS
    elif name != PACKAGE.name:
        assert name.split(".")[1] in ORDER


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
