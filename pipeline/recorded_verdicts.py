"""Where the jobs that search take the verdicts from: the registry, or a file where there is none."""

from __future__ import annotations

from pathlib import Path

import pydantic

from pipeline.errors import DataError
from pipeline.schema import Config
from pipeline.stamp import Verdict, Verdicts


class _Entry(Config):
    """One of a file's verdicts; newer and older are digests of the generations' artefacts."""

    newer: str
    older: str
    held: bool
    told: str = ""


def read_verdicts(path: Path) -> Verdicts:
    """The verdicts of a file: a JSON list of {newer, older, held, told}, the generations by their digests.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        entries = pydantic.TypeAdapter(list[_Entry]).validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a JSON list of verdicts") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path}: {where}: {first['msg']}; it must be a JSON list of objects with newer, older, held, told"
        ) from None
    return Verdicts(Verdict(**entry.model_dump()) for entry in entries)


def recorded_verdicts(file: Path | None, config: Path | None, family: str) -> Verdicts:
    """The verdicts of a family.

    Args:
        file: as `read_verdicts`; given, nothing else is asked.
        config: YAML of a run, which says where the registry is; none: the default home's.
        family: of the generations.

    Raises:
        DataError: as `read_verdicts`.
        ConfigError: the config cannot be read.
        RegistryError: the registry does not answer.
    """
    if file is not None:
        return read_verdicts(file)
    from pipeline.config import load_config
    from pipeline.registry_opening import open_registry

    return open_registry(load_config(config) if config else None, family).verdicts()
