"""Cards that were looked at once and must not change unseen."""

from __future__ import annotations

import os
from pathlib import Path


GOLDEN = Path(__file__).parents[1] / "golden"


def check_golden(name: str, text: str) -> None:
    """Compares with a stored card; DSCO_HF_UPDATE_GOLDEN=1 stores it anew, to be looked at before it is committed."""
    path = GOLDEN / name
    if os.environ.get("DSCO_HF_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
