"""What a version's page shows people: the model card as its description; with its run the card whole, the config, and a
picture of the lineage.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.generation import Generation
from pipeline.tracking.lineage_picture import Edge, plot_lineage
from pipeline.tracking.model_card import model_card
from pipeline.tracking.store import artefact_errors
from pipeline.tracking.verdicts import read_findings
from pipeline.tracking.versions import RegisteredGeneration

if TYPE_CHECKING:
    from mlflow import MlflowClient

CARD, CONFIG, PICTURE = "model-card.md", "config.yaml", "lineage.png"
MAX_DESCRIPTION = 5000  # characters; the column of MLflow's databases, which PostgreSQL holds to
_CUT = f"\n\n*Shortened: the whole card is the artefact `{CARD}` of the run.*\n"

Family = Mapping[str, RegisteredGeneration]


def about(family: str) -> str:
    """What the registered model's page says before its versions."""
    return (
        f"Search models of the family {family}: each version is a generation, named by its tag `generation`. "
        "`serving` embeds the queries of today; `candidate` is the newest that may follow (`jobs/promote.py`). "
        "Whose galleries a generation may search is on its page, in its tags `compatible_with` and "
        "`incompatible_with`, and in the picture `lineage.png` of its run."
    )


def log_first_page(client: MlflowClient, generation: Generation, drafted: RegisteredGeneration, known: Family) -> str:
    """Log the artefacts of a generation that is about to become a version.

    Args:
        client: of the store.
        generation: the artefact.
        drafted: the version to be.
        known: the versions that are there, by name, oldest first.

    Returns:
        The version's description.

    Raises:
        RegistryError: the artefact store refuses.
    """
    with artefact_errors(f"logging the config of {drafted.name!r} to MLflow's artefacts", "register"):
        client.log_dict(drafted.run_id, dict(generation.record.config), CONFIG)
    return log_page(client, drafted, {**known, drafted.name: drafted}, generation, None)


def log_page(
    client: MlflowClient,
    one: RegisteredGeneration,
    family: Family,
    generation: Generation | None = None,
    report: Mapping[str, Any] | None = None,
) -> str:
    """Log the picture of a version's lineage and, where its artefact is given, its card.

    Args:
        client: of the store.
        one: the version.
        family: all versions by name, oldest first, with their verdicts.
        generation: its artefact; None: the card stays as it is.
        report: of the latest evaluation; None: it was not evaluated.

    Returns:
        The card, as long as a description may be; empty where there is no artefact.

    Raises:
        RegistryError: the artefact store refuses, or a verdict was changed by hand.
    """
    edges = {(name, old): edge for name, each in family.items() for old, edge in _edges(each).items()}
    parents = {name: each.parents for name, each in family.items()}
    card = "" if generation is None else model_card(generation.record, report, f"models:/{one.model_id}")
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / PICTURE
        plot_lineage(one.name, parents, edges, picture)
        with artefact_errors(f"logging the page of {one.name!r} to MLflow's artefacts", "evaluate"):
            client.log_artifact(one.run_id, str(picture))
            if card:
                client.log_text(one.run_id, card, CARD)
    return shortened(card)


def shortened(card: str) -> str:
    """A card as long as a description may be, cut between two sections."""
    if len(card) <= MAX_DESCRIPTION:
        return card
    room = MAX_DESCRIPTION - len(_CUT)
    end = card.rfind("\n## ", 0, room)
    return card[: end if end > 0 else room].rstrip() + _CUT


def _edges(one: RegisteredGeneration) -> dict[str, Edge]:
    found = read_findings(one)
    first = {old: next(iter(finding.differences.values()), (None,))[0] for old, finding in found.items()}
    return {
        old: Edge(finding.held, "" if (value := first[old]) is None else f"{100 * value:+.1f}")
        for old, finding in found.items()
    }
