"""How an update's samples are cut into the micro-batches of each rank: pure functions of sizes."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.model.rows import batch_parts


def micro_parts(global_batch: int, accumulation: int, ranks: int) -> list[list[int]]:
    """Samples of each rank in each micro-batch of an update.

    Raises:
        ConfigError: some would have none.
    """
    if global_batch < accumulation * ranks:
        raise ConfigError(
            f"training.global_batch={global_batch} leaves nothing for some of {ranks} processes in "
            f"{accumulation} micro-batches; raise it, or lower training.accumulation or cluster.workers"
        )
    by_rank = [batch_parts(part, accumulation) for part in batch_parts(global_batch, ranks)]
    return [list(parts) for parts in zip(*by_rank, strict=True)]


def first_sample(parts: list[list[int]], rank: int, micro: int) -> int:
    """Where a rank's micro-batch begins in the global batch."""
    before = sum(sizes[other] for sizes in parts for other in range(rank))
    return before + sum(sizes[rank] for sizes in parts[:micro])


def accumulation_on(ranks: int, full: int, accumulation: int, global_batch: int) -> int:
    """Micro-batches of an update on `ranks` processes, where `full` processes need `accumulation`.

    The global batch stays, and no micro-batch, and so no process's memory, grows. Where `ranks` divides
    `full * accumulation` the micro-batches are the same ones, done by fewer.
    """
    wanted = -(-full * accumulation // ranks)
    return max(accumulation, min(wanted, global_batch // ranks))  # a rank needs a sample for each micro-batch
