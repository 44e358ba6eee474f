"""The promotion of a generation: the gates that it must pass, and the step from `candidate` to `serving`; and back.

Gates and step are one: they happen under the family's lock, so that what was judged is what is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.console import say
from pipeline.errors import ConfigError, DataError, GenerationError, PromotionRefusedError, RegistryError
from pipeline.promotion.lock import lock_of, promoting
from pipeline.promotion.serving import Kind, Serving
from pipeline.registry import Registry
from pipeline.stamp import Stamp
from pipeline.tracking.verdicts import read_self_test
from pipeline.tracking.versions import RegisteredGeneration
from pipeline.vectors import read_stamp, vector_files

MARGIN = 0.5  # points
WAIT_SECONDS = 600.0  # for another promotion; the reload test of a large backbone takes a minute


@dataclass(frozen=True)
class Galleries:
    """Whose vectors there are still, as the user says.

    Attributes:
        files: stamped vector files, folders of them, or galleries of jobs/search.py.
        names: of generations.
    """

    files: Sequence[Path] = ()
    names: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.files or self.names)


@dataclass(frozen=True)
class Gate:
    """One condition of a promotion, and what was found."""

    name: str
    passed: bool
    told: str


def promote(
    registry: Registry,
    name: str | None,
    judged: Sequence[str],
    galleries: Galleries = Galleries(),
    margin: float = MARGIN,
    wait_seconds: float = WAIT_SECONDS,
) -> None:
    """Let a generation serve, if it passes every gate; if it serves already, say so.

    Args:
        registry: of the family.
        name: of the generation; None: the candidate.
        judged: names of the metrics of the self-test gate.
        galleries: whose vectors its queries will search; nothing: those of the generation that serves, and of those
            whose vectors that one's galleries hold.
        margin: points by which its self-test may be worse than that of the generation that serves.
        wait_seconds: for another promotion to end.

    Raises:
        PromotionRefusedError: gates failed; each was printed on a line of its own. Nothing has changed.
        RegistryError: a generation is not registered; or another promotion does not end; or the store refuses.
        DataError: a gallery's file is broken, or has no stamp.
    """
    if not 0 <= margin < float("inf"):
        raise ConfigError(f"--margin {margin} must be a number of points, at least 0")
    serving = Serving(registry)
    with promoting(registry, wait_seconds):
        wanted = _find(registry, name) if name is not None else serving.candidate()
        if wanted is None:
            raise RegistryError(f"{registry.where} has no candidate: name the generation (--generation)")
        now = serving.now()
        if now is not None and now.version == wanted.version:
            serving.drop_candidate(now)
            say(f"{now.name} serves already")
            return
        live = _live(registry, serving, now, galleries)
        gates = [*_criterion(registry, wanted, live.values()), _self_test(wanted, now, judged, margin)]
        _judge(f"{wanted.name} may not serve", [*gates, *_artefact(wanted)])
        _move(serving, now, wanted, _digests(live, wanted), "promote")
    say(f"{wanted.name} serves{'' if now is None else f' instead of {now.name}'} (version {wanted.version})")


def rollback(registry: Registry, galleries: Galleries = Galleries(), wait_seconds: float = WAIT_SECONDS) -> None:
    """Let the generation serve that served before; once more: the one before that.

    Its artefact must be whole and reproduce its self-test. Galleries are judged only if they are named: what it could
    search when it served it can search still, but not the vectors that its successor has made since.

    Raises:
        PromotionRefusedError: gates failed; each was printed on a line of its own. Nothing has changed.
        RegistryError: nothing serves, or nothing did before; or the version was deleted by hand; or as `promote`.
    """
    serving = Serving(registry)
    with promoting(registry, wait_seconds):
        now = serving.now()
        if now is None:
            raise RegistryError(f"nothing serves in {registry.where}: there is nothing to roll back")
        before = serving.before(now)
        if before is None:
            raise RegistryError(f"{now.name!r} is the first that serves in {registry.where}: nothing served before it")
        wanted = _find(registry, before.generation)
        if wanted.digest[:12] != before.digest:
            raise RegistryError(
                f"{before.generation!r}, which served before {now.name!r}, was version {before.version} "
                f"({before.digest}); the name is another generation's now: promote one that is left"
            )
        live = _live(registry, serving, now, galleries) if galleries else {}
        _judge(f"{wanted.name} may not serve again", [*_criterion(registry, wanted, live.values()), *_artefact(wanted)])
        theirs = {**serving.galleries(wanted), **serving.galleries(now), now.name: now.digest}
        theirs.pop(wanted.name, None)
        _move(serving, now, wanted, _digests(live, wanted) if galleries else theirs, "rollback")
    say(f"{wanted.name} (version {wanted.version}) serves again instead of {now.name}, whose vectors it cannot search")


def unlock(registry: Registry) -> None:
    """Remove the lock that a killed promotion has left."""
    with registry.errors("removing the lock"):
        lock_of(registry).remove()
    say(f"no promotion of {registry.family!r} is going on any more")


def _find(registry: Registry, name: str) -> RegisteredGeneration:
    found = registry.find(name)
    if found is None:
        raise RegistryError(f"generation {name!r} {registry.why_missing(name)}")
    return found


def _move(
    serving: Serving, now: RegisteredGeneration | None, to: RegisteredGeneration, theirs: Mapping[str, str], kind: Kind
) -> None:
    """Check once more that nobody has moved the alias by hand meanwhile, and move it."""
    again = serving.now()
    if (again and again.version) != (now and now.version):
        raise RegistryError(
            f"the alias 'serving' was moved by hand while {to.name!r} was judged "
            f"({again.name if again else 'nothing'} serves): run the same command again"
        )
    serving.move(to, now, theirs, kind)


def _live(
    registry: Registry, serving: Serving, now: RegisteredGeneration | None, galleries: Galleries
) -> dict[str, Stamp]:
    """A stamp of each generation that still has gallery vectors, by digest."""
    theirs: dict[str, str] = {}
    if galleries:
        theirs = {name: _find(registry, name).digest for name in galleries.names}
    elif now is not None or (now := _lost(registry, serving)) is not None:
        theirs = {**serving.galleries(now), now.name: now.digest}
    found = [_stamp(registry.family, name, digest) for name, digest in theirs.items()]
    for place in galleries.files:
        built = (place / "gallery.json").is_file()  # of jobs/search.py
        found += [read_stamp(file) for file in vector_files(place / "parts" if built else place)]
    return {stamp.digest: stamp for stamp in found}


def _lost(registry: Registry, serving: Serving) -> RegisteredGeneration | None:
    """The generation that served last, where nothing serves: the alias was deleted, or not set yet when we were killed.

    Raises:
        RegistryError: its version was deleted by hand, and with it what is known of its galleries.
    """
    last = serving.last()
    found = None if last is None else registry.find(last.generation)
    if last is not None and (found is None or found.version != last.version):
        raise RegistryError(
            f"{last.generation!r} (version {last.version}) served last in {registry.where}, and was deleted by hand: "
            "say whose gallery vectors are left (--gallery, --live)"
        )
    return found


def _stamp(family: str, generation: str, digest: str) -> Stamp:
    """Of a generation of which no file is at hand; what is not known is not looked at where the digests differ."""
    return Stamp(family=family, generation=generation, digest=digest, dim=1, normalised=True, preprocess="")


def _digests(live: Mapping[str, Stamp], wanted: RegisteredGeneration) -> dict[str, str]:
    return {stamp.generation: digest for digest, stamp in live.items() if digest != wanted.digest}


def _criterion(registry: Registry, wanted: RegisteredGeneration, live: Iterable[Stamp]) -> Iterator[Gate]:
    """One gate for each gallery."""
    verdicts, own = registry.verdicts(), _stamp(registry.family, wanted.name, wanted.digest)
    for stamp in live:
        if stamp.digest != wanted.digest:
            name = f"criterion on {stamp.generation}"
            yield _gate(name, partial(verdicts.require, own, stamp), "compatible with its gallery vectors")


def _self_test(
    wanted: RegisteredGeneration, now: RegisteredGeneration | None, judged: Sequence[str], margin: float
) -> Gate:
    """Its own figures against those of the generation that serves, on one test set."""
    name = "self-test"
    if now is None:
        return Gate(name, True, "nothing serves that it could be worse than")
    mine, theirs = read_self_test(wanted), read_self_test(now)
    if mine is None or theirs is None or set(judged) - (mine[1].keys() & theirs[1].keys()):
        both = f"{wanted.name} and {now.name}"
        return Gate(name, False, f"{both} were not both evaluated on {', '.join(judged)}: run jobs/evaluate.py")
    if mine[0] != theirs[0]:
        return Gate(name, False, f"{wanted.name} and {now.name} were measured on two test sets: evaluate them together")
    points = {metric: 100 * (mine[1][metric] - theirs[1][metric]) for metric in judged}
    told = ", ".join(f"{metric} {value:+.2f}" for metric, value in points.items())
    passed = all(value >= -margin - 1e-9 for value in points.values())
    return Gate(name, passed, f"{told} points against {now.name}; {margin:g} less are allowed")


def _artefact(wanted: RegisteredGeneration) -> list[Gate]:
    """Its files are the registered ones, and what they hold does what it did."""
    whole = _gate("artefact", lambda: wanted.open().verify(), "every file is as it was registered")
    if not whole.passed:
        return [whole, Gate("reload", False, "not tried: the artefact is not whole")]
    return [whole, _gate("reload", lambda: wanted.open().reproduce_selftest(), "gives the features that it gave")]


def _gate(name: str, check: Callable[[], object], told: str) -> Gate:
    try:
        check()
    except (DataError, GenerationError) as error:
        return Gate(name, False, str(error))
    return Gate(name, True, told)


def _judge(refusal: str, gates: Sequence[Gate]) -> None:
    """Print the gates, a line each.

    Raises:
        PromotionRefusedError: some failed.
    """
    for gate in gates:
        say(f"gate {gate.name}: {'passed' if gate.passed else 'FAILED'}: {gate.told}")
    if failed := [gate.name for gate in gates if not gate.passed]:
        raise PromotionRefusedError(
            f"{refusal}: {len(failed)} of {len(gates)} gates failed ({', '.join(failed)}); nothing has changed"
        )
