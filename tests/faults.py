"""Faults, by kind, rank, step and place, in whatever process trains: a test's ranks, Ray's workers, a job.

    faults = [Fault("kill", "before save", rank=1, step=3)]
    subprocess.run([...], env={**os.environ, **environment(faults, folder)})    # a job, and all that it starts
    install(faults, folder)                                                     # this process

Places are "before" or "after" a phase of a step (`Pulse`: restore, load, forward, losses, backward, update, report,
save, export), the commit of a checkpoint (before: its shards are there, but not its metadata) and the registration of a
generation. A fault happens once, however often a process comes by: FOLDER keeps which ones have happened. The product
knows nothing of this: `tests/injected` is put on PYTHONPATH, and its functions are wrapped as they are imported.
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

PLANNED, HAPPENED = "BCT_FAULTS", "BCT_FAULTS_HAPPENED"
ROOT = Path(__file__).parents[1]
EXIT_CODE = 13
DAY_S = 86400.0
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}

Kind = Literal[
    "exception",
    "exit",  # os._exit: no handler runs, no buffer is flushed
    "kill",  # SIGKILL
    "terminate",  # SIGTERM
    "stop",  # SIGSTOP: it takes what is sent to it, and answers nothing
    "hang",
    "clock",  # goes back by a day
    "nan",  # in the images before `forward`; in the features' gradient in `losses`
    "overflow",  # of the gradient, inside the backbone
    "write_error",  # of a checkpoint's data: the disk is full
    "no_room",  # on the disk of the checkpoints, as the system tells
    "no_memory",
]


class InjectedError(Exception):
    """What an `exception` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: what happens.
        place: "before PHASE" or "after PHASE", for kinds that may happen anywhere; the others have one of their own.
        rank: whom it happens to; None: whoever comes first.
        step: at which, the first is 0, and a save belongs to the step before it; None: the first that comes.
    """

    kind: Kind
    place: str = ""
    rank: int | None = None
    step: int | None = None


def environment(faults: Sequence[Fault], folder: Path) -> dict[str, str]:
    """Variables under which a process, and those that it starts, have faults.

    Args:
        faults: planned.
        folder: where is written which of them have happened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT / "tests" / "injected"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    planned = json.dumps([asdict(fault) for fault in faults])
    return {PLANNED: planned, HAPPENED: str(folder), "PYTHONPATH": os.pathsep.join(paths)}


def happened(folder: Path) -> list[str]:
    """Numbers of the faults that have happened, and to which process."""
    return sorted(path.name for path in folder.glob("fault-*"))


def install(faults: Sequence[Fault] | None = None, folder: Path | None = None) -> None:
    """Wrap the product's functions in this process, those already imported and those that will be.

    Args:
        faults: planned; None: those of the environment.
        folder: as `environment`'s.
    """
    if faults is not None and folder is not None:
        os.environ.update(environment(faults, folder))
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    for name, wrap in WRAPPED.items():
        if name in sys.modules:
            wrap(sys.modules[name])
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are wrapped, and wraps them once they have been executed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if fullname in WRAPPED else None
        if spec is not None and spec.loader is not None:
            execute: Callable[[ModuleType], None] = spec.loader.exec_module

            def executed(module: ModuleType) -> None:
                execute(module)
                WRAPPED[fullname](module)

            spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


class _State:
    """The step that this process is in."""

    step: int | None = None


def _due(kinds: Sequence[str], place: str = "") -> Fault | None:
    """The fault that is planned here and has not happened, if there is one; from now on it has."""
    for number, planned in enumerate(json.loads(os.environ.get(PLANNED, "[]"))):
        fault = Fault(**planned)
        fits = fault.kind in kinds and fault.place == place and fault.step in (None, _State.step)
        if fits and fault.rank in (None, _rank()):
            try:
                (Path(os.environ[HAPPENED]) / f"fault-{number}").open("x").close()
            except FileExistsError:
                continue
            return fault
    return None


def _rank() -> int | None:
    distributed = sys.modules.get("torch.distributed")
    there = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed.get_rank() if distributed is not None and there else None


def _strike(place: str) -> None:
    """Let happen what is planned at a place."""
    fault = _due(("exception", "exit", "kill", "terminate", "stop", "hang", "clock"), place)
    if fault is None:
        return
    if fault.kind == "exception":
        raise InjectedError(f"injected {place}")
    if fault.kind == "exit":
        os._exit(EXIT_CODE)
    if fault.kind == "clock":
        now = time.time
        time.time = lambda: now() - DAY_S
        return
    if fault.kind == "hang":
        threading.Event().wait()
    os.kill(os.getpid(), SIGNALS[fault.kind])


def _wrap_phases(module: ModuleType) -> None:
    """Every phase of a step goes through `Pulse`."""
    original = module.Pulse.__call__

    @contextmanager
    def call(self: Any, phase: str, step: int | None = None) -> Iterator[None]:
        _State.step = self.step if step is None else step
        with original(self, phase, step):
            _strike(f"before {phase}")
            yield
            _strike(f"after {phase}")

    module.Pulse.__call__ = call


def _around(owner: Any, name: str, place: str) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        _strike(f"before {place}")
        result = original(*arguments, **named)
        _strike(f"after {place}")
        return result

    setattr(owner, name, call)


def _wrap_engine(module: ModuleType) -> None:
    original = module.BackboneEngine.features

    def features(self: Any, images: Any, *others: Any) -> Any:
        images = images * float("nan") if _due(("nan",), "before forward") else images
        features, losses = original(self, images, *others)
        return (module.scale_gradient(features, 1e38) if _due(("overflow",)) else features), losses

    module.BackboneEngine.features = features


def _wrap_classifier(module: ModuleType) -> None:
    original = module.ShardedClassifier.__call__

    def call(self: Any, features: Any, *others: Any) -> Any:
        from pipeline.model.gradients import scale_gradient

        spoilt = _due(("nan",), "in losses") is not None
        return original(self, scale_gradient(features, float("nan")) if spoilt else features, *others)

    module.ShardedClassifier.__call__ = call


def _wrap_writer(module: ModuleType) -> None:
    original = module.Writer.write_data

    def write_data(self: Any, *arguments: Any) -> Any:
        if _due(("write_error",)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *arguments)

    module.Writer.write_data = write_data


def _wrap_guards(module: ModuleType) -> None:
    original = module.free_bytes
    setattr(module, "free_bytes", lambda folder: 1000 if _due(("no_room",)) else original(folder))  # noqa: B010


def _wrap_gradients(module: ModuleType) -> None:
    original = module.Trainer._update

    def update(self: Any, rate: float) -> Any:
        if _due(("no_memory",)):
            import torch

            torch.empty(1 << 55)  # torch's own allocator says no
        return original(self, rate)

    module.Trainer._update = update


WRAPPED: dict[str, Callable[[ModuleType], None]] = {
    "pipeline.training.watchdog": _wrap_phases,
    "pipeline.training.checkpoint_place": lambda module: _around(module.Place, "commit", "commit"),
    "pipeline.family": lambda module: _around(module.Member, "complete", "register"),
    "pipeline.training.engine": _wrap_engine,
    "pipeline.model.classifier": _wrap_classifier,
    "pipeline.training.checkpoint_files": _wrap_writer,
    "pipeline.training.guards": _wrap_guards,
    "pipeline.training.trainer": _wrap_gradients,
}
