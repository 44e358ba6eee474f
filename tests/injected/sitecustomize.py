"""On PYTHONPATH, this gives every process that starts the faults that BCT_FAULTS plans (tests/faults.py)."""

import os

if os.environ.get("BCT_FAULTS"):
    from tests.faults import install

    install()
