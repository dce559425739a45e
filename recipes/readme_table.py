"""Puts the measured table into a Markdown file, between two marks.

    python recipes/readme_table.py --results outputs/quickstart/results.json --readme README.md
    python recipes/readme_table.py --results outputs/quickstart/results.json --readme README.md --check
    python recipes/readme_table.py --results outputs/experiment/results.json --readme README.md --name cifar10

The marks are `<!-- results:begin -->` and `<!-- results:end -->`, each on its own line. `--name` stands in the
place of `results` in them, for a file with several tables. With `--check` nothing is written, and the exit status
is 1 if the file does not show the results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dsco_hf.studies.tables import results_table


def insert_table(text: str, table: str, name: str = "results") -> str:
    """Replaces what stands between the two marks of a name.

    Raises:
        ValueError: if the marks are missing, doubled or in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"The file must contain {begin!r} once and after it {end!r} once.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{rest.split(end)[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("outputs/quickstart/results.json"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--name", default="results", help="of the marks")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the table is out of date")
    options = parser.parse_args(arguments)
    for path in (options.results, options.readme):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    old = options.readme.read_text(encoding="utf-8")
    table = results_table(json.loads(options.results.read_text(encoding="utf-8")))
    new = insert_table(old, table, options.name)
    if options.check:
        print(f"{options.readme} is {'up to date' if old == new else 'out of date'}.")
        return int(old != new)
    options.readme.write_text(new, encoding="utf-8")
    print(f"Wrote the table of {options.results} into {options.readme}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
