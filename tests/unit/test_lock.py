"""What is installed is what was locked: every package with its version and the sha256 of its files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"


@pytest.fixture(scope="module")
def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package."""
    lines = LOCK.read_text().replace("\\\n", " ").splitlines()
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)==([\w.!+]+)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line)
        assert match, f"no pinned and hashed package: {line[:80]}"
        found[str(canonicalize_name(match[1]))] = match[2], match[3].split()
    assert len(found) == len(lines)
    return found


def test_every_package_is_pinned_with_hashes_and_holds_what_the_project_asks_for(
    locked: dict[str, tuple[str, list[str]]],
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for requirement in map(Requirement, [*asked, *extras["dev"], *extras["export"], *extras["npm"]]):
        if requirement.name == project["project"]["name"]:
            continue
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_install_takes_nothing_but_what_the_lock_hashes() -> None:
    script = (ROOT / ".ci" / "install").read_text()
    installs = [line for line in script.splitlines() if line.startswith('"${pip[@]}"')]
    assert [line.split()[-1] for line in installs] == [
        '"pip>=25"',
        '--hash=sha256:$taken")',
        "requirements.lock",
        '".[dev,npm]"',
    ]
    assert all("--require-hashes --no-deps --requirement" in line for line in installs[1:3])
    assert 'grep -q "$taken" requirements.lock ||' in script, "torch's own build is locked, too"


def test_the_bill_of_materials_lists_the_lock(tmp_path: Path, locked: dict[str, tuple[str, list[str]]]) -> None:
    pytest.importorskip("cyclonedx_py", reason="`make install` brings it")
    recipe = re.search(
        r"cyclonedx-py (requirements .*) --output-file sbom.json (requirements.lock)",
        Path(ROOT / "Makefile").read_text(),
    )
    assert recipe
    command = [
        sys.executable,
        "-m",
        "cyclonedx_py",
        *recipe[1].split(),
        "--output-file",
        str(tmp_path / "s.json"),
        recipe[2],
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    told: dict[str, Any] = json.loads((tmp_path / "s.json").read_bytes())
    assert (told["bomFormat"], told["metadata"]["component"]["name"]) == ("CycloneDX", "bct-pipeline")
    assert float(told["specVersion"]) >= 1.5
    parts = {str(canonicalize_name(part["name"])): part for part in told["components"]}
    assert parts.keys() == locked.keys()
    for name, (version, hashes) in locked.items():
        assert parts[name]["type"] == "library"
        assert parts[name]["version"] == version
        assert parts[name]["purl"] == f"pkg:pypi/{name}@{version}"
        told_of = {one["content"] for source in parts[name]["externalReferences"] for one in source["hashes"]}
        assert told_of == {one.rpartition(":")[2] for one in hashes}
