"""What the registry is told of an evaluation: verdicts and self-tests as tags, the cards and the pictures anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.generation import Generation
from pipeline.registry import Registry
from pipeline.tracking.pages import log_page
from pipeline.tracking.verdicts import findings_of, self_test_tag, verdict_tags


def record_evaluation(
    registry: Registry, generations: Mapping[str, Generation], report: Mapping[str, Any], data: str, again: bool = False
) -> None:
    """Write what an evaluation on the test set found to the versions of the generations that were evaluated.

    What was found of other ancestors before stays. The tags are written last: an attempt that was cut off is
    completed by the next.

    Args:
        registry: of the family.
        generations: that were evaluated, by name.
        report: as `evaluation.report.build_report` makes it.
        data: digest of the test set's manifest.
        again: the report is an old one: where the tags say all of it already, nothing is done.

    Raises:
        RegistryError: the store refuses, or a tag was changed by hand and cannot be read.
    """
    digests = {name: generation.digest for name, generation in generations.items()}
    family = registry.versions()
    fresh = {}
    for name, digest in digests.items():
        if (one := family.get(name)) is not None and one.digest == digest:
            fresh[name] = verdict_tags(one, findings_of(report, name, digests)) | self_test_tag(report, name, data)
    if again and all(family[name].tags.get(tag) == text for name, tags in fresh.items() for tag, text in tags.items()):
        return
    family |= {name: replace(family[name], tags={**family[name].tags, **tags}) for name, tags in fresh.items()}
    with registry.errors("recording the evaluation"):
        for name, one in family.items():
            card = log_page(registry.client, one, family, generations.get(name) if name in fresh else None, report)
            if card:
                registry.client.update_model_version(registry.family, one.version, card)
        for name, tags in fresh.items():
            for tag, text in tags.items():
                registry.client.set_model_version_tag(registry.family, family[name].version, tag, text)
