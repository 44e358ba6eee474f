"""The model card of a generation: what it is, what it may search, how well, and how it is used; as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.evaluation.rendering import percent
from pipeline.generation_record import GenerationRecord

MOST = 10  # ancestors that are told one by one, the newest; a description has little room

Report = Mapping[str, Any]


def model_card(record: GenerationRecord, report: Report | None, model_uri: str) -> str:
    """Write the card.

    Args:
        record: of the generation.
        report: as `evaluation.report.build_report` makes it; None, or one without it: it was not evaluated.
        model_uri: MLflow's, to load it by: models:/ID.
    """
    told = report if report is not None and record.name in report["generations"] else None
    parts = [
        f"{record.name} of {record.family}. {_what(record)}",
        "## What it may search",
        "\n".join(_verdicts(record, told)),
        *([] if told is None else ["## How good it is", *_figures(record.name, told)]),
        "## How to use it",
        *_use(record, model_uri),
        "## Where it comes from",
        "\n".join(_origin(record)),
    ]
    return "\n\n".join(parts) + "\n"


def _what(record: GenerationRecord) -> str:
    if record.backbone is None or record.preprocess is None:
        return (
            f"An old model, of which there are embeddings only, {record.embedding_dim} dimensions, "
            f"{record.identities:,} identities. It embeds nothing more; its gallery can be searched by generations "
            "trained against it."
        )
    side, colour = record.preprocess.size, "grey" if record.preprocess.channels == 1 else "colour"
    steps = record.training.get("steps")
    trained = "" if steps is None else f" It was trained for {steps:,.0f} steps."
    return (
        f"Embeds {colour} images of {side} x {side} pixels as vectors of {record.embedding_dim} values, of length 1 "
        f"(backbone {record.backbone.name}, margin {record.margin.name}, {record.identities:,} identities).{trained}"
    )


def _verdicts(record: GenerationRecord, report: Report | None) -> Iterator[str]:
    """A line for each ancestor, newest first."""
    judged = {} if report is None else _judged(record.name, report)
    waiting = [parent for parent in record.parents if parent not in judged]
    for place, (older, one) in enumerate(reversed(judged.items())):
        if place == MOST:
            yield f"- {len(judged) - MOST} older generations: see the evaluation's report.md."
            break
        assert report is not None, "what is judged was judged in a report"
        points = ", ".join(f"{name} {percent(one['differences'][name], True)}" for name in report["criterion_on"])
        yield f"- **{older}**: {_words(record.name, older, one)} Points over {older} alone: {points}."
    for parent in waiting:
        yield f"- **{parent}**: not judged yet. It was trained to search {parent}'s gallery; evaluate before it does."
    if not record.parents:
        yield "Its own gallery only: it was trained without a parent."


def _words(name: str, older: str, one: Mapping[str, Any]) -> str:
    if not one["held"]:
        return f"**not compatible.** Queries of {name} must not search {older}'s gallery: embed it again first."
    sure = "" if one["certain"] else " On this test set the gain is within chance."
    return f"**compatible.** Queries of {name} may search {older}'s gallery as it is.{sure}"


def _judged(name: str, report: Report) -> dict[str, Mapping[str, Any]]:
    """The criterion on each ancestor."""
    pairs = {tuple(pair.split("/")): one for pair, one in report["criterion"].items() if one["ancestor"]}
    return {older: one for (newer, older), one in pairs.items() if newer == name}


def _figures(name: str, report: Report) -> Iterator[str]:
    """The self-test, and the update gain where there is a paragon."""
    rows = [f"{metric} {percent(row[f'{name}/{name}'])} %" for metric, row in report["matrix"].items()]
    yield f"Self-test, with its 95 % interval: {', '.join(rows)}."
    paragon = report["paragons"].get(name)
    for older in list(_judged(name, report))[-MOST:]:
        gains = report["update_gain"].get(f"{name}/{older}", {})
        told = ", ".join(f"{metric} {percent(gain)} %" for metric, gain in gains.items() if gain is not None)
        if told:
            yield f"Update gain on {older}'s gallery, of what {paragon} gains after a whole backfill: {told}."


def _use(record: GenerationRecord, model_uri: str) -> Iterator[str]:
    name = record.name
    if record.backbone is not None:
        yield "Load it, and embed a few images (`pipeline` must be importable; many: `jobs/embed.py`):"
        yield "\n".join(
            (
                "```python",
                "import mlflow, pandas as pd",
                f'model = mlflow.pyfunc.load_model("{model_uri}")',
                'model.predict(pd.DataFrame({"image": [open("image.png", "rb").read()]}))  # vector, stamp',
                "```",
            )
        )
    yield "Let it serve, if it passes the gates; and go back:"
    yield "\n".join(
        (
            "```sh",
            f"python jobs/promote.py --config FILE --generation {name}",
            "python jobs/promote.py --config FILE --rollback",
            "```",
        )
    )
    yield (
        "Search: the stamp travels with every vector, and `pipeline.search` refuses a gallery of a generation that is "
        "not recorded as compatible. Move a gallery over at leisure with `jobs/backfill.py`."
    )


def _origin(record: GenerationRecord) -> Iterator[str]:
    parents = ", ".join(f"{name} (`{digest[:12]}`)" for name, digest in record.parents.items())
    yield f"- parents: {parents or 'none'}"
    yield f"- data: manifest `{record.data_digest[:12]}`, {record.identities:,} identities"
    yield f"- config: `{record.config_digest[:12]}`, the artefact `config.yaml` of the run; code: {record.code_version}"
    yield "- picture: `lineage.png` of the run; pictures of the evaluation: its folder `plots`"
