"""Ray: connecting to a cluster, and training a generation on its workers. The only place that imports Ray Train."""

from __future__ import annotations

import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray._private.services import canonicalize_bootstrap_address
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.config import RunConfig
from pipeline.console import say
from pipeline.data.manifest import Manifest
from pipeline.errors import ClusterError, PipelineError
from pipeline.generation import RECORD, Generation
from pipeline.identities import IdentityTable
from pipeline.plan import Plan
from pipeline.redaction import redacted

# Set before a worker imports torch. Threads that wait must sleep: on a small machine spinning ones take five to ten
# times the throughput of everybody.
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
POLL_S = 0.5
PROBE_S = 5.0
MEANS_BATCH = 256  # images at a time, where a method asks for class means

Progress = Callable[[str, int, dict[str, float]], None]  # generation, steps done, figures


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or a `ray start` on this machine names, or start a local one.

    Raises:
        ClusterError: it does not answer.
    """
    if ray.is_initialized():
        return
    # Ray runs workers at the lowest priority: on a laptop anything else would starve them. Set where we start it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # One process less to start with each group of workers: what it would tell them, they do not listen to yet.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        ray.init(ray_address(), runtime_env={"env_vars": THREADS}, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray cannot be reached: {redacted(' '.join(str(error).split()))[:300]}") from None


def ray_address() -> str | None:
    """What to join, as `ray.init` takes it: it would wait for minutes for a cluster that is gone.

    Raises:
        ClusterError: RAY_ADDRESS names one that does not answer.
    """
    named = os.environ.get("RAY_ADDRESS")
    if (named or "").startswith("ray://"):
        return named
    # Or the last that `ray start` began on this machine, if any.
    address = canonicalize_bootstrap_address(named)  # type: ignore[arg-type]
    if address is None:
        return None
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError as error:
        if not named:
            return "local"  # it was killed, and left its address
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={named} ({error.strerror or error}): start it, or unset "
            "RAY_ADDRESS, and one is started here"
        ) from None
    return address


def dashboard() -> str:
    """The address of the cluster's dashboard, if this process has joined one that has it."""
    node = ray.worker.global_worker.node if ray.is_initialized() else None
    url = node.address_info.get("webui_url") if node is not None else None
    return f"http://{url}" if url else ""


@ray.remote(num_cpus=0)
class Board:
    """Where rank 0 posts how a training goes and the driver reads it; worker output is never parsed."""

    def __init__(self) -> None:
        self.latest: tuple[str, int, dict[str, float]] = ("", 0, {})

    def post(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Replace what stands there."""
        self.latest = (name, step, metrics)

    def read(self) -> tuple[str, int, dict[str, float]]:
        """The last post."""
        return self.latest


def train_generations(plans: Sequence[Plan], on_progress: Progress) -> None:
    """Train one generation after the other on the cluster's workers, each from its last checkpoint to its artefact.

    None of them may be another's parent. They share one group of workers, which takes Ray half a minute to start.
    Lost workers are replaced `cluster.max_failures` times. A user's mistake found by a worker is raised as it is.

    Raises:
        ClusterError: the workers failed once too often.
    """
    config, names = plans[0].config, ", ".join(plan.record.name for plan in plans)
    _check_resources(config)
    board = Board.remote()  # type: ignore[attr-defined]
    with _Reader(board, on_progress):
        for attempt in range(config.cluster.max_failures + 1):
            try:
                _trainer(plans, board).fit()
                break
            except ray.train.TrainingFailedError as error:
                if mistake := users_mistake(error):
                    raise mistake from None
                cause = _short(error)
                if attempt == config.cluster.max_failures:
                    raise ClusterError(f"training {names} failed {attempt + 1} times; last: {cause}") from error
                say(f"{names}: workers failed ({cause}); going on from the last checkpoint")
    ray.kill(board)


def _trainer(plans: Sequence[Plan], board: Any) -> TorchTrainer:
    cluster = plans[0].config.cluster
    return TorchTrainer(
        _worker,
        train_loop_config={"plans": list(plans), "board": board},
        torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.gpu else {})},
        ),
        # A name of its own each time: Ray resumes, silently, whatever has the same. We resume by our own checkpoints.
        run_config=ray.train.RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}", storage_path=str(plans[0].config.folder / "ray")
        ),
    )


def _worker(arguments: dict[str, Any]) -> None:
    """One rank, from its process group to the sealed artefacts."""
    for plan in arguments["plans"]:
        if not (plan.destination / RECORD).is_file():  # a group that replaces a lost one finds the first ones done
            _train_one(plan, arguments["board"])


def _train_one(plan: Plan, board: Any) -> None:
    from pipeline.data.loader import TrainingLoader, iterate_identities
    from pipeline.data.quarantine import Quarantine
    from pipeline.data.store import open_store
    from pipeline.data.store_metadata import metadata_folder
    from pipeline.training.loop import train
    from pipeline.training.trainer import Trainer

    config = plan.config
    generation = config.generations[plan.record.name]
    threads = max(1, int(config.cluster.cpus_per_worker))
    torch.set_num_threads(threads)
    device = ray.train.torch.get_device()
    folder = metadata_folder(plan.data, config.data.store)
    identities, manifest = IdentityTable.load(plan.identities), Manifest.load(folder)
    store = open_store(plan.data, manifest, config.data.store)

    def images_of(first_row: int, end_row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        part = (identities, first_row, end_row, config.preprocess, MEANS_BATCH)
        return iterate_identities(folder, manifest, *part, threads=threads, device=device, store=store)

    trainer = Trainer(
        plan.record.name,
        identities,
        [Generation(path) for path in plan.parents],
        generation.backbone,
        generation.margin,
        generation.compat,
        generation.training,
        generation.classifier,
        plan.record.config_digest,
        generation.seed,
        device,
        images_of,
    )

    def open_loader(start_step: int) -> TrainingLoader:
        return TrainingLoader(
            folder,
            manifest,
            identities,
            config.preprocess,
            generation.augment,
            seed=generation.seed,
            global_batch=generation.training.global_batch,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            order=config.data.order,
            threads=threads,
            device=device,
            start_step=start_step,
            store=store,
            quarantine=Quarantine(plan.quarantine, dist.get_rank(), config.data.quarantine_limit),
            patience_s=generation.training.guards.loader_timeout_s,
        )

    observer = _Observer(plan, board) if dist.get_rank() == 0 else _Silence()
    with observer, closing(store):
        places = plan.checkpoints, plan.destination
        train(trainer, open_loader, observer, *places, plan.record, identities, plan.quarantine)


class _Silence:
    """The observer of all ranks but 0."""

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing: rank 0 tells."""

    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class _Observer(_Silence):
    """Rank 0's: posts to the driver's board and to the tracking server, and waits for neither."""

    def __init__(self, plan: Plan, board: Any) -> None:
        from pipeline.tracking.tracker import MlflowTracker

        self.name, self.board, self.tracker = plan.record.name, board, MlflowTracker(plan.tracking_uri, plan.run_id)
        board.post.remote(self.name, 0, {})

    def report(self, step: int, metrics: dict[str, float]) -> None:
        self.board.post.remote(self.name, step, metrics)
        self.tracker.log(step, metrics)

    def __exit__(self, *_: object) -> None:
        self.tracker.close()


class _Reader:
    """Reads the board in a thread while the driver waits for the workers."""

    def __init__(self, board: Any, on_progress: Progress) -> None:
        self.board, self.on_progress = board, on_progress
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _follow(self) -> None:
        last = ("", 0)
        while not self.ended.wait(POLL_S) or self._tell(last) != last:
            last = self._tell(last)

    def _tell(self, last: tuple[str, int]) -> tuple[str, int]:
        try:
            name, step, metrics = ray.get(self.board.read.remote(), timeout=10)
        except (ray.exceptions.RayError, TimeoutError):
            return last
        if (name, step) != last:
            self.on_progress(name, step, metrics)
        return name, step


def users_mistake(error: BaseException | None) -> PipelineError | None:
    """The PipelineError at the bottom of what Ray wraps a worker's exception in, if there is one."""
    seen: list[BaseException] = []
    pending: list[Any] = [error]
    while pending:
        one = pending.pop()
        if isinstance(one, PipelineError):
            return one
        if isinstance(one, BaseException) and one not in seen:
            seen.append(one)
            failures = getattr(one, "worker_failures", {})
            pending += [one.__cause__, getattr(one, "cause", None), getattr(one, "_base_exc", None), *failures.values()]
    return None


def _short(error: BaseException) -> str:
    """The last line that says something, of an error of many."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    told = next(iter(failures.values()), error)
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    return redacted(lines[-1])[:300] if lines else type(told).__name__


def _check_resources(config: RunConfig) -> None:
    """Ask for no more than the cluster has: Ray would wait for ever."""
    cluster, there = config.cluster, ray.cluster_resources()  # type: ignore[no-untyped-call]
    needed = {"CPU": cluster.workers * cluster.cpus_per_worker, "GPU": cluster.workers if cluster.gpu else 0}
    for kind, amount in needed.items():
        if amount > there.get(kind, 0):
            raise ClusterError(
                f"cluster.workers={cluster.workers} need {amount:g} {kind}, but the Ray cluster has "
                f"{there.get(kind, 0):g}; lower cluster.workers or cluster.cpus_per_worker, or add nodes"
            )
