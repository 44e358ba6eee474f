"""One thread at a time where Python source is parsed."""

from __future__ import annotations

import threading

# Before CPython 3.11.8, two threads that parse at once may break each other: "SystemError: AST constructor recursion
# depth mismatch" (python/cpython issue 106905). NumPy parses the head of a file, DALI the source of a graph.
PARSING = threading.Lock()
