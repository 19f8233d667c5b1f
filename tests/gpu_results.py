"""Where tests on a GPU leave their measurements for ``tests.gpu_report``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: Folder for the results; nothing is written without it.
FOLDER = "SMARTATTN_TEST_RESULTS"


def write(name: str, value: Any) -> None:
    """Saves plain values as ``<name>.json`` if a report is being made, and prints small ones."""
    if folder := os.environ.get(FOLDER):
        Path(folder, f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    if not isinstance(value, list):
        print(f"{name}: {json.dumps(value)}")
