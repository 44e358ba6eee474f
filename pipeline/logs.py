"""Log lines for machines: one JSON object each, if BCT_LOG_FORMAT=json; else lines for people, as they always were.

Whatever goes through Python's logging or warnings, and what is said to people, becomes such a line. Every line holds
`time` (UTC), `level`, `logger` and `message`; within a training `run`, `generation`, `rank` and `step`, too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from pipeline.errors import ConfigError
from pipeline.redaction import redacted

VARIABLE = "BCT_LOG_FORMAT"
OURS = "pipeline"  # its loggers tell more than others' do

_place: dict[str, str | int] = {}
_step: Callable[[], int] | None = None


def is_json() -> bool:
    """Whether lines are for machines."""
    return os.environ.get(VARIABLE) == "json"


def environment() -> dict[str, str]:
    """What other processes of the same run need to write as this one does."""
    return {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}


def take_place(
    run: str, generation: str | None = None, rank: int | None = None, step: Callable[[], int] | None = None
) -> None:
    """Say where this process is: what its lines from now on hold.

    Args:
        run: the run's name.
        generation: that it trains.
        rank: of it in the training.
        step: gives the step that it is in.
    """
    global _step  # noqa: PLW0603  a process is in one place
    _place.clear()
    _place["run"] = run
    _place.update({} if generation is None else {"generation": generation})
    _place.update({} if rank is None else {"rank": rank})
    _step = step


def configure() -> None:
    """In a process that is ours: have its log lines written to stderr as JSON, if that is asked for.

    Raises:
        ConfigError: something else is asked for.
    """
    if (wanted := os.environ.get(VARIABLE, "text")) not in ("text", "json"):
        raise ConfigError(f"{VARIABLE}={wanted!r} is neither 'json' nor 'text'")
    root = logging.getLogger()
    if not is_json() or any(isinstance(handler.formatter, JsonLines) for handler in root.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root.handlers = [handler]
    logging.getLogger(OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)


def complain(message: str) -> None:
    """Tell on stderr what ends this process."""
    print(line("ERROR", OURS, message) if is_json() else message, file=sys.stderr, flush=True)


def line(level: str, logger: str, message: str, created: float | None = None, **more: str) -> str:
    """One JSON object, without passwords."""
    moment = datetime.now(UTC) if created is None else datetime.fromtimestamp(created, UTC)
    entry: dict[str, str | int] = {"time": moment.isoformat(timespec="milliseconds"), "level": level, "logger": logger}
    entry |= _place
    if _step is not None:
        entry["step"] = _step()
    entry |= {key: redacted(text) for key, text in {"message": message, **more}.items()}
    return json.dumps(entry, ensure_ascii=False)


class JsonLines(logging.Formatter):
    """Formats Python's own log records."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is a field of it."""
        more = {"exception": self.formatException(record.exc_info)} if record.exc_info else {}
        return line(record.levelname, record.name, record.getMessage(), record.created, **more)
