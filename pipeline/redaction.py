"""Secrets in what is printed or recorded: a URL may carry a password, a token or a signature."""

from __future__ import annotations

import re

LONGEST = 300  # characters of another library's words
_HIDDEN = "***"
# A password ends at the last @ before white space or a quote: one that was not encoded may hold / and @. A port that a
# slash follows is none.
_PASSWORD = re.compile(r"//([^/@:\s'\"]*):(?!\d+/)[^\s'\"]*@")
_TOKEN = re.compile(r"(https?://)[^/@:\s'\"]+@")
_QUERY = re.compile(
    r"([?&][^=&#\s'\"]*(?:pass|pwd|secret|token|key|sig|credential|auth)[^=&#\s'\"]*=)[^&#\s'\"]+", re.I
)


def redacted(text: str) -> str:
    """A URI, or a text that holds some, without passwords, tokens and signatures: to be printed or recorded."""
    text = _PASSWORD.sub(rf"//\1:{_HIDDEN}@", text)
    text = _TOKEN.sub(rf"\1{_HIDDEN}@", text)
    return _QUERY.sub(rf"\1{_HIDDEN}", text)


def in_short(error: BaseException) -> str:
    """An error's words in one line; its type, where it has none."""
    return redacted(" ".join(str(error).split()))[:LONGEST] or type(error).__name__


def with_kind(error: BaseException) -> str:
    """An error's type and words in one line."""
    kind = type(error).__name__
    return kind if (words := in_short(error)) == kind else f"{kind}: {words}"


def without_secret(uri: str) -> str:
    """The URI of a config, which is written down and recorded.

    Raises:
        ValueError: it holds a secret.
    """
    if redacted(uri) != uri:
        raise ValueError("a config is kept and shown: leave the secret out, and give it in the environment")
    return uri
