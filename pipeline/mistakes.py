"""What is wrong with a config, each mistake in one line that names the key and the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.errors import ConfigError
from pipeline.redaction import redacted

Location = tuple[int | str, ...]


def mistakes(error: pydantic.ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One short sentence for each thing that is wrong in a config of the model `root`."""
    for problem in error.errors():
        location: Location = problem["loc"]
        path = ".".join(str(part) for part in _walk(location, root)[0])
        if problem["type"] == "extra_forbidden":
            model = _walk(location[:-1], root)[1]
            yield f"unknown key {path}" + _nearest(str(location[-1]), list(model.model_fields) if model else [])
        elif problem["type"] == "union_tag_invalid":
            choice, tag = (problem["ctx"][key].strip("'") for key in ("discriminator", "tag"))
            known = [word.strip(" '") for word in problem["ctx"]["expected_tags"].split(",")]
            yield f"unknown {path}.{choice} {tag!r}" + (_nearest(tag, known) or f"; known are {', '.join(known)}")
        elif problem["type"] == "missing":
            yield f"{path} is missing"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            told = f" (given: {redacted(repr(given))})" if isinstance(given, (str, int, float, bool)) else ""
            yield f"{path}: {message}{told}" if path else message


def option_mistake(error: pydantic.ValidationError) -> ConfigError:
    """The first thing that is wrong in a config made of a command line's options, by the option's name."""
    first = error.errors()[0]
    told = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return ConfigError(told)
    return ConfigError(f"--{str(first['loc'][0]).replace('_', '-')} {redacted(str(first['input']))}: {told}")


def _nearest(word: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f", did you mean {nearest[0]}?" if nearest else ""


def _walk(location: Location, root: type[BaseModel]) -> tuple[list[int | str], type[BaseModel] | None]:
    """The keys on the way to `location` as the user wrote them, and the model of the section there, if it is one.

    Below a mapping's free names stands the model of its values; below a section that may be one of several models
    pydantic names the chosen one, which the user's file does not.
    """
    keys: list[int | str] = []
    model: type[BaseModel] | None = root
    parts = iter(location)
    for part in parts:
        keys.append(part)
        field = model.model_fields.get(str(part)) if model else None
        annotation: Any = field.annotation if field else None
        if getattr(annotation, "__origin__", None) is dict:
            keys += [name for name in [next(parts, None)] if name is not None]
            annotation = annotation.__args__[1]
        elif field and field.discriminator:
            annotation = _chosen(field, next(parts, None))
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return keys, model


def _chosen(field: FieldInfo, tag: int | str | None) -> type[BaseModel] | None:
    """Of a section that may be one of several models, the one that `tag` names."""
    models: tuple[type[BaseModel], ...] = field.annotation.__args__ if field.annotation else ()
    return next((model for model in models if model.model_fields[str(field.discriminator)].default == tag), None)
