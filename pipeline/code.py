"""Which code is running: recorded with every generation."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """The package's version and the commit: of the git checkout (`+` where it has been edited), or BCT_COMMIT's.

    An image has no checkout, and says in its environment what it was built of.
    """
    here = Path(__file__).parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found = os.environ.get("BCT_COMMIT", "")[:12]
    return f"{version('bct-pipeline')}{f' ({found})' if found else ''}"
