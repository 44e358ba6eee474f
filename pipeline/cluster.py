"""Ray: connecting to a cluster, and training a generation on its workers. The only place that imports Ray Train."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray._private.services import canonicalize_bootstrap_address
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import logs
from pipeline.console import say
from pipeline.errors import ClusterError, StoppedError
from pipeline.plan import Plan
from pipeline.redaction import in_short
from pipeline.termination import on_sigterm
from pipeline.workers.board import Board, Ear, heed_sigterm
from pipeline.workers.config import THREADS
from pipeline.workers.failures import last_words, users_mistake, waited_in_vain
from pipeline.workers.foreman import Foreman, Progress
from pipeline.workers.interface import speak_on_rays_network
from pipeline.workers.observers import Poster, Silence

PROBE_S = 5.0
MEANS_BATCH = 256  # images at a time, where a method asks for class means


def connect() -> None:
    """Join the cluster that RAY_ADDRESS or a `ray start` on this machine names, or start a local one.

    Raises:
        ClusterError: it does not answer.
    """
    if ray.is_initialized():
        return
    # Ray runs workers at the lowest priority: on a laptop anything else would starve them. Set where we start it.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # One process less to start with each group of workers: the driver watches the nodes itself.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        variables = {"env_vars": THREADS | logs.environment()}
        # A Ray that ends with this process has no dashboard: nobody could know of it in time, and it takes its share.
        quiet = partial(ray.init, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        quiet(ray_address(), runtime_env=variables)
    except Exception as error:  # noqa: BLE001  where it cannot start, Ray raises just that
        raise ClusterError(f"Ray cannot be reached: {in_short(error)}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray has set its own, which knows nothing of checkpoints


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


def train_generations(plans: Sequence[Plan], on_progress: Progress) -> None:
    """Train one generation after the other on the cluster's workers, each from its last checkpoint to its artefact.

    None of them may be another's parent. They share one group of workers, which takes Ray half a minute to start.
    Lost workers are replaced, but `cluster.max_failures` times at most without getting any further. Between
    `cluster.min_workers` and `cluster.workers` the group follows what the nodes have room for. A user's mistake found
    by a worker is raised as it is.

    Raises:
        ClusterError: Ray does not answer, or the workers failed once too often.
        StoppedError: SIGTERM, or too few nodes are left; the last checkpoint stands.
    """
    connect()
    cluster, names = plans[0].config.cluster, ", ".join(plan.record.name for plan in plans)
    # Beside the driver, where no lost node takes it along. A soft affinity puts an actor without CPUs anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    with Foreman(cluster, board, on_progress) as foreman, on_sigterm(foreman.terminate):
        try:
            _train_until_sealed(plans, board, foreman, names)
        except (KeyboardInterrupt, ray.exceptions.RayError):
            if not foreman.terminated:
                raise
            late = f"no checkpoint within cluster.preemption_deadline_s={cluster.preemption_deadline_s:g}"
            raise StoppedError(f"{names}: told to end (SIGTERM), {late}; the one before stands") from None
    ray.kill(board)


def _train_until_sealed(plans: Sequence[Plan], board: Any, foreman: Foreman, names: str) -> None:
    cluster, failures, workers = plans[0].config.cluster, 0, foreman.first_muster()
    while True:
        foreman.engage(workers)
        try:
            if _trainer(plans, board, workers).fit().return_value:  # type: ignore[attr-defined]  # see _trainer
                return
            told = "the workers stopped after a checkpoint"
        except ray.train.TrainingFailedError as error:
            if mistake := users_mistake(error):
                raise mistake from None
            told, vain = f"workers failed ({last_words(error)})", waited_in_vain(error)
            failures = (0 if foreman.got_further() else failures) + (not vain)
            if failures > cluster.max_failures and not foreman.terminated:
                raise ClusterError(f"training {names} failed {failures} times; last: {last_words(error)}") from error
            if vain:
                foreman.ask_for_what_is_free()
        if foreman.terminated:
            raise StoppedError(f"{names}: told to end (SIGTERM); {told}")
        workers = foreman.muster()
        say(f"{names}: {told}; going on from the last checkpoint with {workers} of {cluster.workers} workers")


def _trainer(plans: Sequence[Plan], board: Any, workers: int) -> TorchTrainer:
    cluster = plans[0].config.cluster
    # mypy reads the types of Ray Train's first version, whose results had no return value; the second one runs.
    return TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"plans": list(plans), "board": board},
        torch_config=_TorchConfig(backend=cluster.collectives),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=cluster.gpu,
            resources_per_worker=cluster.needs,
            placement_strategy=cluster.placement,
        ),
        # A name of its own each time: Ray resumes, silently, whatever has the same. We resume by our own checkpoints.
        # Workers that cannot be started are ours to ask again, for as many as there is room for then.
        run_config=ray.train.RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str(plans[0].config.folder / "ray"),
            worker_runtime_env={"env_vars": {**THREADS, **cluster.environment}},  # type: ignore[call-arg]
            failure_config=ray.train.FailureConfig(controller_failure_limit=0),  # type: ignore[call-arg]
        ),
    )


class _HeedingBackend(_TorchBackend):
    """Ray Train's, whose workers find each other, and heed SIGTERM.

    A handler can only be set from the main thread, where this runs.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(speak_on_rays_network)
        super().on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(heed_sigterm)


class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_HeedingBackend]:
        return _HeedingBackend


def _worker(arguments: dict[str, Any]) -> bool:
    """One rank, from its process group to the sealed artefacts; False if it was asked to stop before."""
    from pipeline.workers.rank import train_rank

    logs.configure()
    board, listen = arguments["board"], Ear(arguments["board"], dist.get_rank())
    device = ray.train.torch.get_device()
    for plan in (plan for plan in arguments["plans"] if not plan.sealed):
        observer = Poster(plan, board) if dist.get_rank() == 0 else Silence(plan, dist.get_rank())
        with observer:
            if not train_rank(plan, device, observer, listen):
                return False
    return True
