"""What an evaluation found of a generation, as tags of its version.

    compatible_with     JSON: of each ancestor whose gallery it may search, by name, the digest and the differences
    incompatible_with   JSON: of each that it may not
    self_test           JSON: the digest of the test set, and its own figures on it

A difference is [value, low, high]: by how much its queries on the ancestor's gallery are better than the ancestor's
own, with the ends of the 95 % interval; shares, not percent. Only metrics that were judged on are told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RegistryError
from pipeline.evaluation.rendering import percent
from pipeline.stamp import Verdict
from pipeline.tracking.versions import RegisteredGeneration

COMPATIBLE, INCOMPATIBLE, SELF_TEST = "compatible_with", "incompatible_with", "self_test"
# MLflow 3.17 takes 100,000 characters in a version's tag (mlflow.utils.validation), MySQL's TEXT 65,535 bytes.
MAX_TAG = 60_000
DIGITS = 6

Interval = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Finding:
    """The verdict on one ancestor.

    Attributes:
        digest: of the ancestor.
        held: the criterion held on every metric judged.
        differences: (value, low, high) by metric, shares.
    """

    digest: str
    held: bool
    differences: Mapping[str, Interval]

    @property
    def told(self) -> str:
        """`rank1 +1.9 [+0.8, +3.1], tar@1e-3 ...`, in points of a percent."""
        return ", ".join(
            f"{name} {percent({'value': value, 'low': low, 'high': high}, signed=True)}"
            for name, (value, low, high) in self.differences.items()
        )


def findings_of(report: Mapping[str, Any], name: str, digests: Mapping[str, str]) -> dict[str, Finding]:
    """The verdicts of a report on a generation and its ancestors, by the ancestor's name.

    Args:
        report: as `evaluation.report.build_report` makes it.
        name: of the generation.
        digests: of all that were evaluated, by name.
    """
    found = {}
    for pair, judged in report["criterion"].items():
        newer, older = pair.split("/")
        if newer == name and judged["ancestor"]:
            differences = {metric: _interval(judged["differences"][metric]) for metric in report["criterion_on"]}
            found[older] = Finding(digests[older], judged["held"], differences)
    return found


def read_findings(generation: RegisteredGeneration) -> dict[str, Finding]:
    """The verdicts that a version's tags hold, by the ancestor's name.

    An ancestor that stands in both tags, as it may while they are being written, counts as incompatible.

    Raises:
        RegistryError: a tag was changed by hand, and cannot be read.
    """
    found: dict[str, Finding] = {}
    for tag, held in ((COMPATIBLE, True), (INCOMPATIBLE, False)):
        try:
            for name, entry in json.loads(generation.tags.get(tag, "{}")).items():
                told = {metric: _ends(ends) for metric, ends in entry.get("differences", {}).items()}
                found[name] = Finding(str(entry["digest"]), held, told)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _unreadable(generation, tag) from None
    return found


def verdict_tags(generation: RegisteredGeneration, fresh: Mapping[str, Finding]) -> dict[str, str]:
    """The tags of a version after an evaluation; what it did not judge stays. In the order of writing."""
    known = {**read_findings(generation), **fresh}
    if not known:
        return {}
    # The refusals first: if writing ends between the two, nothing is allowed that should not be.
    return {tag: _json({n: f for n, f in known.items() if f.held is held}) for tag, held in _BY_TAG}


def self_test_tag(report: Mapping[str, Any], name: str, data: str) -> dict[str, str]:
    """The tag of a generation's own figures on a test set of that digest."""
    figures = {metric: _interval(row[f"{name}/{name}"]) for metric, row in report["matrix"].items()}
    return {SELF_TEST: json.dumps({"data": data, "figures": figures})}


def read_self_test(generation: RegisteredGeneration) -> tuple[str, dict[str, float]] | None:
    """The digest of the test set and the figures by metric, shares; None: it was not evaluated.

    Raises:
        RegistryError: the tag was changed by hand, and cannot be read.
    """
    if (text := generation.tags.get(SELF_TEST)) is None:
        return None
    try:
        told = json.loads(text)
        figures = {name: float(ends[0]) for name, ends in told["figures"].items() if ends[0] is not None}
        return str(told["data"]), figures
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise _unreadable(generation, SELF_TEST) from None


def all_verdicts(generations: Iterable[RegisteredGeneration]) -> list[Verdict]:
    """The verdicts of versions, oldest first, so that of two on one pair the newest stands last."""
    return [
        Verdict(one.digest, finding.digest, finding.held, finding.told)
        for one in generations
        for finding in read_findings(one).values()
    ]


_BY_TAG = ((INCOMPATIBLE, False), (COMPATIBLE, True))


def _json(findings: Mapping[str, Finding]) -> str:
    """As much as a tag takes: with too many ancestors the oldest lose their differences first, then their place."""
    entries: dict[str, dict[str, Any]] = {
        name: {"digest": one.digest, "held": one.held, "differences": one.differences} for name, one in findings.items()
    }
    sizes = {name: len(json.dumps({name: entry})) for name, entry in entries.items()}
    for name in list(entries):
        if sum(sizes.values()) <= MAX_TAG:
            break
        entries[name] = {key: value for key, value in entries[name].items() if key != "differences"}
        sizes[name] = len(json.dumps({name: entries[name]}))
    for name in list(entries):
        if sum(sizes.values()) <= MAX_TAG:
            break
        del entries[name], sizes[name]
    return json.dumps(entries)


def _interval(value: Mapping[str, float | None]) -> Interval:
    return _ends([value["value"], value["low"], value["high"]])


def _ends(ends: list[float | None]) -> Interval:
    value, low, high = (None if end is None else round(float(end), DIGITS) for end in ends)
    return value, low, high


def _unreadable(generation: RegisteredGeneration, tag: str) -> RegistryError:
    return RegistryError(
        f"the tag {tag!r} of version {generation.version} ({generation.name!r}) cannot be read, it was changed by "
        "hand: delete it in MLflow, and evaluate again (jobs/evaluate.py)"
    )
