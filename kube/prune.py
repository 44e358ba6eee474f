"""Uninstall what a project does not need to run: python kube/prune.py pyproject.toml EXTRA ...

For the image: everything is installed as it is locked, tools of development too, and then these are taken out again.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

KEPT = {"pip", "setuptools"}  # they install, and torch imports the latter


def needed(pyproject: Path, extras: list[str]) -> set[str]:
    """Names of the packages that a project needs here, with those that they need in turn.

    Args:
        pyproject: of the project.
        extras: of the project, beside its dependencies.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    todo = [Requirement(line) for line in asked]
    found: dict[str, set[str]] = {}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        wanted = {"", *requirement.extras}
        if wanted <= found.get(name, set()):
            continue
        found[name] = found.get(name, set()) | wanted
        for line in distribution(name).requires or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in found[name]):
                todo.append(further)
    return {canonicalize_name(project["name"]), *found}


def main() -> int:
    """Uninstall what is left over."""
    pyproject, *extras = sys.argv[1:]
    try:
        kept = KEPT | needed(Path(pyproject), extras)
    except PackageNotFoundError as error:
        print(f"error: {error.name} is not installed", file=sys.stderr)
        return 2
    every = {canonicalize_name(one.metadata["Name"]) for one in distributions()}
    if over := sorted(every - kept):
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *over], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
