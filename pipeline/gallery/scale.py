"""One scale for scores of several generations.

A query's cosines with vectors of an older generation spread less than those with vectors of its own, of strangers as
of mates. In one order, raw, the items that have moved would crowd out the others: rank-1 *falls* while the first fifth
of a gallery is embedded again (docs/upgrade.md has the curve). So each generation's cosines are brought to the mean and
the deviation that those of the newest have, over pairs of strangers: the z-norm of speaker verification (Auckenthaler
et al., "Score Normalization for Text-Independent Speaker Verification Systems", 2000), with the gallery's newest
vectors as the cohort. It asks for no labels and no queries, and leaves the order within a generation as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.evaluation.metrics import Float32, Float64
from pipeline.gallery.hits import Objects
from pipeline.gallery.index import Segment
from pipeline.stamp import Stamp

SAMPLE = 1024  # vectors of each generation that are compared
LEAST = 32  # fewer tell too little: scores stay as they are


@dataclass(frozen=True)
class Scale:
    """What a generation's cosines become: `factor * cosine + shift`."""

    factor: float
    shift: float

    def __call__(self, scores: Float32) -> Float32:
        """Scores of any shape; -inf, which is no score, stays."""
        scaled: Float32 = (self.factor * scores.astype(np.float64) + self.shift).astype(np.float32)
        return scaled


@dataclass(frozen=True)
class Sample:
    """Some vectors of a generation: keys and identities of S, and (S, D) float32 rows of length 1."""

    keys: Objects
    identities: Objects
    unit_SD: Float32


def scales_of(segments: Sequence[Segment]) -> Mapping[Stamp, Scale]:
    """The scale of each generation whose scores must change; none in a gallery of one generation.

    They depend on which vectors are searched, and not on how the gallery is cut into parts.

    Args:
        segments: oldest first; the generation of the last one sets the scale.
    """
    parts: dict[Stamp, list[Segment]] = {}
    for segment in segments:
        if segment.live:
            parts.setdefault(segment.stamp, []).append(segment)
    if len(parts) < 2:
        return {}
    samples = {stamp: _sample(of_stamp) for stamp, of_stamp in parts.items()}
    newest = next(segment.stamp for segment in reversed(segments) if segment.live)
    cohort = samples.pop(newest)
    if len(cohort.keys) < LEAST:
        return {}
    mean, deviation = moments(cohort, cohort)
    found = {}
    for stamp, sample in samples.items():
        if len(sample.keys) >= LEAST and stamp.dim <= newest.dim:
            its_mean, its_deviation = moments(cohort, sample)
            if min(deviation, its_deviation) > 0:
                factor = deviation / its_deviation
                found[stamp] = Scale(factor, mean - factor * its_mean)
    return found


def moments(cohort: Sample, items: Sample) -> tuple[float, float]:
    """Mean and standard deviation of the cosines of strangers; (0, 0) where there are none.

    A pair of one key, or of one known identity, is left out.

    Args:
        cohort: of at least as many dimensions, of which the leading ones are compared, renormalised.
        items: of the gallery.
    """
    leading_CD: Float64 = cohort.unit_SD[:, : items.unit_SD.shape[1]].astype(np.float64)
    norm_C = np.linalg.norm(leading_CD, axis=1)
    cosines_CS = leading_CD @ items.unit_SD.T.astype(np.float64) / np.where(norm_C > 0, norm_C, 1)[:, None]
    same_CS = cohort.keys[:, None] == items.keys[None, :]
    same_CS |= (cohort.identities[:, None] == items.identities[None, :]) & (items.identities != "")[None, :]
    strangers = cosines_CS[~same_CS]
    return (float(strangers.mean()), float(strangers.std())) if len(strangers) else (0.0, 0.0)


def _sample(segments: Sequence[Segment]) -> Sample:
    """The SAMPLE vectors whose keys hash lowest, of one generation."""
    hashes, places = [], []
    for number, segment in enumerate(segments):
        rows_N = np.flatnonzero(segment.live_N)
        hash_N = pd.util.hash_array(segment.keys.to_numpy(zero_copy_only=False)[rows_N], categorize=False)
        lowest_N = np.argsort(hash_N)[:SAMPLE]
        hashes.append(hash_N[lowest_N])
        places += [(number, row) for row in rows_N[lowest_N]]
    taken = [places[place] for place in np.argsort(np.concatenate(hashes))[:SAMPLE]]
    samples = []
    for number, segment in enumerate(segments):
        rows_S = np.array([row for which, row in taken if which == number], np.int64)
        keys_S, identities_S = (
            column.take(rows_S).to_numpy(zero_copy_only=False) for column in (segment.keys, segment.identities)
        )
        samples.append(Sample(keys_S, identities_S, segment.unit(rows_S)))
    return Sample(
        np.concatenate([one.keys for one in samples]),
        np.concatenate([one.identities for one in samples]),
        np.concatenate([one.unit_SD for one in samples]),
    )
