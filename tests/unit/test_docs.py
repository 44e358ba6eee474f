"""What the docs say can be done as they say it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from pipeline.config import load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_config_of_the_readme_is_valid_with_and_without_the_successor(tmp_path: Path) -> None:
    first, successor, large = blocks("yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(first)
    assert list(load_config(path).generations) == ["v1"]
    tree = yaml.safe_load(first)
    tree["generations"] |= yaml.safe_load(successor)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    config = load_config(path)
    assert config.generations["v2"].parents == ("v1",)
    tree["generations"]["v2"] |= yaml.safe_load(large)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert load_config(path).generations["v2"].classifier.start == "v1"
    assert config.generations["v1"].backbone.name == "iresnet50"


def test_links_and_paths_of_the_docs_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / document).read_text()
        named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
            r"`((?:pipeline|jobs|configs|kube|tests|docs)/[\w./-]*)`", text
        )
        assert named, document
        for path in named:
            beside = (ROOT / document).parent
            assert (ROOT / path).exists() or (beside / path).exists(), f"{document} names {path}"


def test_each_sentence_on_security_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    files = re.findall(r"`((?:unit|e2e)/test_\w+\.py)`", page)
    assert len(files) > 10
    texts = [(ROOT / "tests" / name).read_text() for name in files]
    for function in re.findall(r"`(test_\w+)`", page):
        assert any(f"def {function}(" in text for text in texts), function


def test_make_targets_of_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    docs = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", docs, re.MULTILINE))
    assert {"demo", "test", "lint", "install", "cluster"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_no_address_of_a_registry_is_committed() -> None:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    hosts = ["registry." + "npmjs", "pypi." + "org", "files.python" + "hosted"]
    for name in filter(None, files.split("\0")):
        content = (ROOT / name).read_bytes()
        assert not any(host.encode() in content for host in hosts), name
