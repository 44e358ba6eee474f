"""Templates as IJB-B and IJB-C use them: one vector for all the images of a person that a template holds.

The frames of one medium (a video) are averaged first, then the media are summed and the sum is brought to length 1, so
that a video of a thousand frames counts as much as a still. Source: Whitelam et al., "IARPA Janus Benchmark-B Face
Dataset", CVPRW 2017, for templates and media; this order of pooling is that of the field's public IJB evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.protocols import GALLERY, QUERY, Protocol
from pipeline.errors import DataError
from pipeline.evaluation.compatibility import Embeddings
from pipeline.evaluation.exact import Integers, Rows
from pipeline.evaluation.figures import in_hash_order
from pipeline.evaluation.metrics import Float32, Int64

CHUNK_IMAGES = 8192  # 32 MiB of float64 at D = 512


def pool(
    vectors_ND: Float32,
    image_R: Integers,
    template_R: Integers,
    media_R: Integers,
    weight_N: npt.NDArray[np.floating] | None = None,
    *,
    chunk_images: int = CHUNK_IMAGES,
) -> tuple[Int64, Float32]:
    """Average the frames of each medium, sum the media of each template, and divide by the sum's L2 norm.

    Vectors are taken at the length they have; normalise them before, if a template's images shall count alike.

    Args:
        vectors_ND: (N, D) float32 image embeddings.
        image_R: (R,) rows of `vectors_ND`; an image may belong to several templates.
        template_R: (R,) the template that holds the image.
        media_R: (R,) of which medium it is; numbers mean something within a template only.
        weight_N: (N,) factor of each image's vector, such as a detector's score; none: 1. The mean of a medium
            divides by the number of its frames, not by the sum of the weights.
        chunk_images: about how many images are gathered at a time; a template is never cut.

    Returns:
        (T,) int64 templates, ascending, and their (T, D) float32 unit vectors.

    Raises:
        DataError: there is no image, or a template's sum is zero or not finite; names the template.
    """
    assert image_R.shape == template_R.shape == media_R.shape
    assert weight_N is None or weight_N.shape == (len(vectors_ND),)
    if not len(image_R):
        raise DataError("no template holds an image: nothing to evaluate")
    order_R = np.lexsort((media_R, template_R))
    template_R, media_R = template_R[order_R], media_R[order_R]
    is_template_R = np.diff(template_R, prepend=template_R[0] - 1) != 0
    is_media_R = is_template_R | (np.diff(media_R, prepend=media_R[0]) != 0)
    first_T, first_M = np.flatnonzero(is_template_R), np.flatnonzero(is_media_R)
    pooled_TD = np.empty((len(first_T), vectors_ND.shape[1]), np.float32)
    for chunk, rows in _whole_templates(first_T, len(order_R), chunk_images):
        taken_r = image_R[order_R[rows]]
        taken_rD = vectors_ND[taken_r].astype(np.float64)
        if weight_N is not None:
            taken_rD *= weight_N[taken_r, None]
        media = slice(*np.searchsorted(first_M, (rows.start, rows.stop)))
        edges_m = np.append(first_M[media], rows.stop)
        mean_mD = np.add.reduceat(taken_rD, edges_m[:-1] - rows.start) / np.diff(edges_m)[:, None]
        sum_tD = np.add.reduceat(mean_mD, np.searchsorted(first_M[media], first_T[chunk]))
        norm_t = np.linalg.norm(sum_tD, axis=1)
        if (bad_t := ~np.isfinite(norm_t) | (norm_t == 0)).any():
            raise DataError(
                f"template {template_R[first_T[chunk]][bad_t.argmax()]} has no direction: its images' embeddings are "
                "all zeros, cancel out or are not finite; embed again with a checkpoint that is finite"
            )
        pooled_TD[chunk] = sum_tD / norm_t[:, None]
    return template_R[first_T].astype(np.int64), pooled_TD


def enrol_templates(embeddings: Embeddings, groups: int, seed: int) -> list[Embeddings]:
    """The test images with a template for each identity in the gallery, as IJB-C's galleries have.

    The groups (cameras, typefaces) are put in the order of a hash of (seed, group), and cut into folds of so many; each
    fold is enrolled once, and all images of the other groups are queries. A template is pooled from the unit embeddings
    of an identity's images in the fold, each a medium of its own.

    Args:
        embeddings: of single images.
        groups: of a fold.
        seed: of their order.

    Returns:
        For each fold the queries, in order, then the templates, whose group is -1.

    Raises:
        DataError: there are not more groups than are to be enrolled.
    """
    order = in_hash_order(embeddings.group_N, seed)
    if not 0 < groups < len(order):
        raise DataError(f"templates of {groups} groups leave no query: the test images have {len(order)} groups")
    folds = [order[first : first + groups] for first in range(0, len(order) - groups + 1, groups)]
    return [_enrolled(embeddings, np.isin(embeddings.group_N, fold)) for fold in folds]


def _enrolled(embeddings: Embeddings, enrolled_N: npt.NDArray[np.bool_]) -> Embeddings:
    """Templates of the enrolled images, behind the others."""
    image_R = np.flatnonzero(enrolled_N)
    identity_R, media_R = embeddings.identity_N[image_R], np.arange(len(image_R))

    def pooled(vectors_ND: Float32) -> Float32:
        unit_ND = Rows.of(vectors_ND, "embedding").unit().astype(np.float32)
        return np.concatenate([vectors_ND[~enrolled_N], pool(unit_ND, image_R, identity_R, media_R)[1]])

    template_T = np.unique(identity_R)
    queries = int((~enrolled_N).sum())
    return replace(
        embeddings,
        vectors_ND=pooled(embeddings.vectors_ND),
        identity_N=np.concatenate([embeddings.identity_N[~enrolled_N], template_T]),
        group_N=np.concatenate([embeddings.group_N[~enrolled_N], np.full(len(template_T), -1)]),
        is_gallery_N=np.arange(queries + len(template_T)) >= queries,
        mapped={name: replace(one, vectors_ND=pooled(one.vectors_ND)) for name, one in embeddings.mapped.items()},
    )


def _whole_templates(first_T: Int64, images: int, chunk_images: int) -> Iterator[tuple[slice, slice]]:
    """Yield (templates, their rows), each about `chunk_images` rows, or one template that has more."""
    edges_T = np.append(first_T, images)
    start = 0
    while start < len(first_T):
        stop = int(np.searchsorted(edges_T, edges_T[start] + chunk_images, side="right")) - 1
        stop = max(stop, start + 1)
        yield slice(start, stop), slice(int(edges_T[start]), int(edges_T[stop]))
        start = stop


@dataclass(frozen=True)
class Templates:
    """The templates of a protocol as one generation embeds them.

    Attributes:
        template_T: (T,) int64 numbers of the protocol, ascending.
        identity_T: (T,) int64 codes of subjects. A template whose subject the protocol does not tell has a code of its
            own: then pairs of one identity are known from the list of pairs alone.
        vectors_TD: (T, D) float32 unit vectors.
    """

    template_T: Int64
    identity_T: Int64
    vectors_TD: Float32

    def rows(self, template_K: Integers) -> Int64:
        """Return where templates stand, (K,) rows; all must be there."""
        row_K = np.searchsorted(self.template_T, template_K)
        assert (self.template_T[np.minimum(row_K, len(self.template_T) - 1)] == template_K).all(), "unknown template"
        return row_K


def pool_templates(
    vectors_ND: Float32,
    keys: Sequence[str],
    protocol: Protocol,
    weight_N: npt.NDArray[np.floating] | None = None,
) -> Templates:
    """Pool a data set's image embeddings into the templates of its protocol.

    Args:
        vectors_ND: (N, D) float32 image embeddings.
        keys: the N samples' keys, each once.
        protocol: as `protocols.load_protocol` reads it beside the shards.
        weight_N: (N,) factors, as in `pool`.

    Raises:
        DataError: the protocol has no templates, or names a sample that is not there, or `pool` fails.
    """
    assert len(vectors_ND) == len(keys), f"{len(vectors_ND)} embeddings of {len(keys)} samples"
    if (table := protocol.templates) is None:
        raise DataError("the data set's protocol has no templates; evaluate it by its pairs or roles")
    image_R = pc.index_in(table["key"], value_set=pa.array(keys, pa.string()))
    if image_R.null_count:
        missing = table["key"].filter(pc.is_null(image_R))
        raise DataError(
            f"{image_R.null_count} images of templates are not embedded, such as {missing[0].as_py()!r}; "
            "see to the images that were rejected, and pack again"
        )
    template_T, vectors_TD = pool(
        vectors_ND, image_R.to_numpy(), table["template"].to_numpy(), table["media"].to_numpy(), weight_N
    )
    return Templates(template_T, _identities(template_T, protocol.template_roles), vectors_TD)


def _identities(template_T: Int64, roles: pa.Table | None) -> Int64:
    """Codes of the templates' subjects, (T,) int64."""
    if roles is None:
        return np.arange(len(template_T))
    subjects = roles["subject"].combine_chunks().dictionary_encode()
    place_T = pc.index_in(pa.array(template_T), value_set=roles["template"])
    code_T = pc.take(subjects.indices, place_T).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.where(code_T >= 0, code_T, len(subjects.dictionary) + np.arange(len(code_T)))


def listed_pairs(templates: Templates, protocol: Protocol) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Return the protocol's pairs of templates as (P, 2) rows of `templates`, and whether each is of one identity.

    Raises:
        DataError: the protocol lists no pairs of templates.
    """
    if (table := protocol.template_pairs) is None:
        raise DataError("the data set's protocol lists no pairs of templates; evaluate it by its searches")
    pairs_P2 = np.empty((len(table), 2), np.int32)
    for side, column in enumerate(("first", "second")):
        pairs_P2[:, side] = templates.rows(table[column].to_numpy())
    return pairs_P2, table["same"].to_numpy()


def searches(templates: Templates, protocol: Protocol) -> dict[str, tuple[Int64, Int64]]:
    """Return, for each gallery of the protocol, the rows of `templates` that search it, and its own.

    Every query of every list searches each gallery, as IJB-C's mixed probes search G1 and G2.

    Returns:
        name of the gallery's list -> ((Q,) rows, (G,) rows).

    Raises:
        DataError: the protocol has no search of templates.
    """
    if (table := protocol.template_roles) is None:
        raise DataError("the data set's protocol has no search of templates; pack it with its 1N files")
    is_query = pc.equal(table["role"], QUERY)
    query_Q = templates.rows(np.unique(table["template"].filter(is_query).to_numpy()))
    galleries = table.filter(pc.equal(table["role"], GALLERY))
    return {
        name: (query_Q, templates.rows(galleries["template"].filter(pc.equal(galleries["list"], name)).to_numpy()))
        for name in galleries["list"].unique().to_pylist()
    }
