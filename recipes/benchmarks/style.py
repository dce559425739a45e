"""How the package is written, in numbers: lengths, types, docstrings, shapes, and imports that go one way.

    python recipes/benchmarks/style.py --out style.json

Read from the source alone: nothing of the package is imported.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path


PACKAGE = Path(__file__).parents[2] / "dsco_hf"
LONGEST_FUNCTION, LONGEST_FILE = 60, 450
Function = ast.FunctionDef | ast.AsyncFunctionDef
# dimensions in backticks such as `(B, C, H, W)`, or words that say as much; "(Smith et al. 2012, eq. 5)" is no shape
_SHAPE = re.compile(r"`\([^()`]*,[^()`]*\)`|\bscalar|\bshaped (?:like|alike|as)\b|\b(?:same|any) shape")


def functions(tree: ast.AST, public: bool = True) -> Iterator[tuple[Function, bool]]:
    """All functions of a file, and whether each is public: neither it nor a class or function around it is private."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            mine = public and not node.name.startswith("_")
            yield node, mine
            yield from functions(node, False)
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, public and not node.name.startswith("_"))
        else:
            yield from functions(node, public)


def own_lines(node: Function) -> int:
    """Lines of a function's body, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def annotations(node: ast.AST) -> list[ast.expr | None]:
    """The types that a function or an assignment gives."""
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if not isinstance(node, Function):
        return []
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return [node.returns, *(argument.annotation for argument in arguments if argument is not None)]


def is_any(kind: ast.expr | None) -> bool:
    """Whether a type says nothing."""
    return isinstance(kind, ast.Name) and kind.id == "Any"


def is_typed(node: Function) -> bool:
    """Whether all arguments but self and cls, and what is returned, have types."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    named = [argument for argument in arguments if argument is not None and argument.arg not in ("self", "cls")]
    return node.returns is not None and all(argument.annotation is not None for argument in named)


def takes_tensors(node: Function) -> bool:
    """Whether tensors pass through a function, by its types."""
    types = [argument.annotation for argument in [*node.args.args, *node.args.kwonlyargs]] + [node.returns]
    return any("torch.Tensor" in ast.unparse(kind) for kind in types if kind is not None)


def measure(package: Path = PACKAGE) -> dict[str, object]:
    """The figures of all files of a package."""
    lengths, lines = {}, {}
    counts = dict.fromkeys(("functions", "typed", "public", "documented", "tensors", "shapes", "any"), 0)
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree, name = ast.parse(text), path.relative_to(package).as_posix()
        lines[name] = len(text.splitlines())
        counts["any"] += sum(is_any(kind) for node in ast.walk(tree) for kind in annotations(node))
        documented = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name[0] != "_"]
        for node, public in functions(tree):
            lengths[f"{name}:{node.name}"] = own_lines(node)
            counts["functions"] += 1
            counts["typed"] += is_typed(node)
            if public:
                documented.append(node)  # type: ignore[arg-type]
            if public and takes_tensors(node):
                counts["tensors"] += 1
                counts["shapes"] += _SHAPE.search(ast.get_docstring(node) or "") is not None
        counts["public"] += len(documented)
        counts["documented"] += sum(ast.get_docstring(node) is not None for node in documented)
    longest = sorted(lengths, key=lengths.__getitem__, reverse=True)
    return {
        "lines": sum(lines.values()),
        "files": len(lines),
        "longest_file": max(lines.values()),
        "files_above_limit": {name: count for name, count in lines.items() if count > LONGEST_FILE},
        "median_function": statistics.median(lengths.values()),
        "functions_above_limit": {name: lengths[name] for name in longest if lengths[name] > LONGEST_FUNCTION},
        "typed_percent": round(100 * counts["typed"] / counts["functions"], 1),
        "any": counts["any"],
        "docstrings_percent": round(100 * counts["documented"] / counts["public"], 1),
        "shapes_percent": round(100 * counts["shapes"] / max(1, counts["tensors"]), 1),
    }


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    figures = measure()
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures))
    return figures


if __name__ == "__main__":
    main()
