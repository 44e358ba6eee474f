"""Seconds and memory of an evaluation: 1:1 at IJB-C's size beside scikit-learn, 1:N beside FAISS's flat index."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from pipeline.benchmarks.measure import free_bytes, machine, peak_extra_bytes
from pipeline.errors import ConfigError
from pipeline.evaluation import identification
from pipeline.evaluation.exact import Rows, blocks, exact_scores
from pipeline.evaluation.identification import SearchOutcomes, search
from pipeline.evaluation.metrics import Float32, Int64
from pipeline.evaluation.pairs import FARS, score_pairs, tar_at_fars
from pipeline.schema import Config

SUBJECTS = 3531  # of IJB-C's 23,124 templates
FPIRS, RANKS = (1e-1, 1e-2), (1, 5, 10)
FAMILIES = 97  # people who look alike: impostor scores have a tail
FILL_ROWS = 1 << 14
DIAGONAL_ROWS = 256
CPU = torch.device("cpu")


class EvaluationBenchmark(Config):
    """What is measured."""

    task: Literal["verification", "search"] = Field("verification", description="1:1 over listed pairs, or 1:N")
    templates: int = Field(23_124, ge=20, description="embeddings of the 1:1 protocol")
    pairs: int = Field(15_660_000, ge=100, description="pairs that it lists")
    gallery: int = Field(1_000_000, ge=10, description="distractors of the search, each an identity of its own")
    queries: int = Field(4096, ge=20, description="of the search, every other one with a mate in the gallery")
    dim: int = Field(512, ge=2, description="of an embedding")
    threads: int = Field(os.cpu_count() or 1, ge=1, description="processor threads")
    repeats: int = Field(3, ge=1, description="rounds; medians are told")


def measure_evaluation(config: EvaluationBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark; returns what goes into the JSON file.

    Raises:
        ConfigError: it does not fit into memory, or scikit-learn or FAISS is not installed.
    """
    try:
        from threadpoolctl import threadpool_limits

        from pipeline.benchmarks.evaluation_rivals import set_threads
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, beside which evaluation is measured; pip install -e '.[dev]'"
        ) from None
    torch.set_num_threads(config.threads)
    set_threads(config.threads)
    _check(config)
    with threadpool_limits(config.threads):
        return (_verification if config.task == "verification" else _search)(config, progress)


def _check(config: EvaluationBenchmark) -> None:
    # The gallery, the index's copy of it, and a gigabyte of room; or scores, labels and the ROC curve's six columns.
    items = 2 * config.gallery * config.dim * 4 + (1 << 30)
    needed = items if config.task == "search" else 100 * config.pairs + config.templates * config.dim * 8
    if needed > (free := free_bytes(CPU)):
        raise ConfigError(
            f"this takes about {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} GB are free; lower "
            f"{'--gallery' if config.task == 'search' else '--pairs'} or --dim"
        )


def faces(identity_N: Int64, dim: int, seed: int) -> Float32:
    """Embeddings as of faces: an identity's lie around its centre, the centres of a family around the family's.

    Noise differs from image to image, so that some are hopeless.

    Args:
        identity_N: (N,) identities.
        dim: D.
        seed: of the noise; an identity's centre does not depend on it.

    Returns:
        (N, D) float32, of norms about sqrt(D).
    """
    vectors_ND = np.empty((len(identity_N), dim), np.float32)
    family_FD = np.random.default_rng(1).standard_normal((FAMILIES, dim), np.float32)
    random = np.random.default_rng((2, seed))
    for block in blocks(len(identity_N), FILL_ROWS):
        known_K, place_n = np.unique(identity_N[block], return_inverse=True)
        centre_KD = np.empty((len(known_K), dim), np.float32)
        for centre_D, identity in zip(centre_KD, known_K, strict=True):
            np.random.Generator(np.random.SFC64(int(identity))).standard_normal(dtype=np.float32, out=centre_D)
        centre_KD += np.float32(0.7) * family_FD[known_K % FAMILIES]
        noise_n1 = random.lognormal(-0.1, 0.6, (len(place_n), 1)).astype(np.float32)
        vectors_ND[block] = centre_KD[place_n] + noise_n1 * random.standard_normal((len(place_n), dim), np.float32)
    return vectors_ND


class Turns:
    """Runs several ways in turns; keeps each one's seconds, its peak of memory and its last answer."""

    def __init__(self, ways: dict[str, Callable[[], Any]], repeats: int, progress: Callable[[str], None]) -> None:
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.extra: dict[str, int] = dict.fromkeys(ways, 0)
        self.answers: dict[str, Any] = {}
        for number in range(repeats):
            for way, work in ways.items():  # side by side: what disturbs one disturbs the other
                progress(f"round {number + 1} of {repeats}: {way}")
                extra = peak_extra_bytes(lambda way=way, work=work: self._run(way, work), CPU)  # type: ignore[misc]
                self.extra[way] = max(self.extra[way], extra)

    def _run(self, way: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        self.answers[way] = work()
        self.seconds[way].append(time.perf_counter() - began)

    def ratio(self, rival: list[float]) -> float:
        """Our time over a rival's: median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds["pipeline"], rival, strict=True))

    def result(self, config: EvaluationBenchmark, rival: str) -> dict[str, Any]:
        """What both tasks tell."""
        return {
            "benchmark": "evaluation",
            **config.model_dump(),
            "machine": machine(CPU),
            "seconds": {way: statistics.median(values) for way, values in self.seconds.items()},
            "seconds_all": self.seconds,
            "extra_bytes": self.extra,
            "ratio": self.ratio(self.seconds[rival]),
        }


def _verification(config: EvaluationBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    from pipeline.benchmarks.evaluation_rivals import roc_way

    progress("making templates")
    subjects = min(SUBJECTS, config.templates // 2)
    identity_T = np.arange(config.templates) % subjects  # the first of each is enrolled
    vectors_TD = faces(identity_T, config.dim, 0)
    random = np.random.default_rng(3)
    probes = np.arange(subjects, config.templates)
    pairs_P2 = np.empty((config.pairs, 2), np.int32)
    pairs_P2[:, 0] = np.sort(random.integers(subjects, size=config.pairs))
    pairs_P2[:, 1] = random.choice(probes, config.pairs)
    genuine = min(len(probes), config.pairs // 2)
    pairs_P2[random.choice(config.pairs, genuine, replace=False)] = np.stack([identity_T[probes], probes], 1)[:genuine]
    same_P = identity_T[pairs_P2[:, 0]] == identity_T[pairs_P2[:, 1]]
    impostors = int(np.count_nonzero(~same_P))
    fars = tuple(far for far in FARS if far * impostors >= 1)
    turns = Turns(
        {
            "pipeline": lambda: tar_at_fars(score_pairs(vectors_TD, vectors_TD, pairs_P2), same_P, fars),
            "roc_curve": lambda: roc_way(vectors_TD, pairs_P2, same_P, fars),
        },
        config.repeats,
        progress,
    )
    tar = {way: {f"{far:g}": answer[far] for far in fars} for way, answer in turns.answers.items()}
    off = max(abs(tar["pipeline"][far] - tar["roc_curve"][far]) for far in tar["pipeline"])
    return {
        **turns.result(config, "roc_curve"),
        "genuine": config.pairs - impostors,
        "impostors": impostors,
        "tar": tar,
        "largest_difference_in_pairs": round(off * (config.pairs - impostors)),
    }


def _search(config: EvaluationBenchmark, progress: Callable[[str], None]) -> dict[str, Any]:
    from pipeline.benchmarks.evaluation_rivals import faiss_flat

    progress("making embeddings")
    identity_Q = np.arange(config.queries)  # the odd ones are enrolled
    strangers = config.queries + np.arange(config.gallery)
    identity_G = np.random.default_rng(4).permutation(np.concatenate([identity_Q[1::2], strangers]))
    query_QD, gallery_GD = faces(identity_Q, config.dim, 1), faces(identity_G, config.dim, 2)
    depth, alone = min(max(RANKS), len(identity_G)), []

    def rival() -> Int64:
        found = faiss_flat(query_QD, gallery_GD, depth)
        alone.append(found.seconds)
        return found.item_QK

    def ours(average_precision: bool) -> SearchOutcomes:
        return search(query_QD, identity_Q, gallery_GD, identity_G, average_precision=average_precision)

    ways = {"pipeline": lambda: ours(False), "pipeline_map": lambda: ours(True), "faiss": rival}
    turns = Turns(ways, config.repeats, progress)
    return {
        **turns.result(config, "faiss"),
        "seconds_faiss_search": statistics.median(alone),
        "ratio_faiss_search": turns.ratio(alone),
        **_compared(turns.answers["pipeline_map"], turns.answers["faiss"], query_QD, gallery_GD, identity_G),
    }


def _compared(
    outcomes: SearchOutcomes, item_QK: Int64, query_QD: Float32, gallery_GD: Float32, identity_G: Int64
) -> dict[str, Any]:
    """Our figures, those that an index's items give, and for how many queries its first item scores below ours."""
    hit_QK = identity_G[item_QK] == outcomes.identity_Q[:, None]
    theirs = {f"rank{k}": float(hit_QK[outcomes.mated_Q, :k].any(axis=1).mean()) for k in RANKS}
    ours = {f"rank{k}": value for k, value in identification.rank_k(outcomes, RANKS).items()}
    ours["map"] = identification.mean_average_precision(outcomes)
    for fpir in FPIRS:
        if fpir * np.count_nonzero(~outcomes.mated_Q) >= 1:
            ours[f"tpir@{fpir:g}"] = identification.tpir_at_fpir(outcomes, fpir)
    query = Rows.of(query_QD, "query")
    first = Rows.of(gallery_GD[item_QK[:, 0]], "gallery")
    first_Q = np.concatenate([_diagonal(query[block], first[block]) for block in blocks(len(query), DIAGONAL_ROWS)])
    below_Q = first_Q < np.maximum(outcomes.best_mate_Q, outcomes.best_other_Q)
    return {"figures": {"pipeline": ours, "faiss": theirs}, "faiss_first_below_best": int(below_Q.sum())}


def _diagonal(left: Rows, right: Rows) -> Float32:
    each_N = np.arange(len(left))
    return exact_scores(left, right, each_N, each_N)
