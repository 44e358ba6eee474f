"""Learned maps: what they are to compute, what an artefact keeps of them, and that evaluation goes by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.compat.base import Companion, Method, Parent
from pipeline.compat.methods import METHODS
from pipeline.compat.methods.adapters import AffineAdapter, OrthogonalAdapter, departure
from pipeline.compat.methods.bt2 import Bt2, rotation_matrix
from pipeline.compat.methods.fct import Fct
from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import ConfigError, GenerationError
from pipeline.evaluation.backfill import backfill
from pipeline.evaluation.compatibility import Embeddings, Mapped, comparable_query
from pipeline.evaluation.embedding import apply_maps
from pipeline.evaluation.figures import Images
from pipeline.evaluation.lineage import Lineage
from pipeline.evaluation.measurement import measure
from pipeline.evaluation.settings import EvaluationConfig
from pipeline.generation import MAPS, Generation, GenerationRecord, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.heads import Head
from pipeline.model.maps import LearnedMap
from pipeline.model.margins import MarginConfig
from tests.unit.embeddings import embed

MARGIN = MarginConfig(name="cosface", scale=10.0, m3=0.1)
TABLE = IdentityTable(("a", "b", "c"))
OLD, NEW = 5, 7
METHODS_WITH_MAPS = [Bt2(), AffineAdapter(), OrthogonalAdapter(slack=0.1), Fct(hidden=11)]


def sealed(folder: Path, name: str, dim: int, parents: dict[str, str], maps: list[LearnedMap]) -> Generation:
    backbone = BackboneConfig(name="small", embedding_dim=dim, image_size=8, width=4)
    beside = folder / f".{name}"
    beside.mkdir()
    write_classifier_part(beside, torch.ones(3, dim), 0, 3)
    record = GenerationRecord(
        family="test",
        name=name,
        parents=parents,
        backbone=backbone,
        preprocess=PreprocessConfig(size=8, resize=8),
        margin=MARGIN,
        identities=3,
        config={},
        config_digest="c",
        data_digest="d",
        code_version="test",
    )
    images = torch.zeros(2, 1, 8, 8)
    return seal(beside, folder / name, record, build_backbone(backbone).state_dict(), TABLE, images, maps)


@pytest.fixture
def old(tmp_path: Path) -> Generation:
    return sealed(tmp_path, "v1", OLD, {}, [])


def view(old: Generation) -> Parent:
    return Parent(old, Head("v1", torch.ones(3, OLD), range(3), MARGIN), slice(2, 2 + OLD), None, 0, 1.0, MARGIN)


def companion_of(method: Method, old: Generation) -> Companion:
    """A companion as training leaves it: no parameter is where it began."""
    companion = method.companion(NEW, [view(old)])
    assert companion is not None
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in companion.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return companion


def batch() -> tuple[Tensor, Tensor]:
    """Features, and guides of which two columns are another parent's."""
    generator = torch.Generator().manual_seed(5)
    features, guides = torch.randn(9, NEW, generator=generator), torch.randn(9, 2 + OLD, generator=generator)
    return features.requires_grad_(), guides


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(dim=1, keepdim=True).sqrt()


def test_rotation_is_the_exponential_and_orthogonal() -> None:
    angles = torch.randn(NEW * (NEW - 1) // 2, generator=torch.Generator().manual_seed(0))
    skew = np.zeros((NEW, NEW))
    skew[np.tril_indices(NEW, -1)] = angles.double().numpy()
    skew -= skew.T
    expected, term = np.eye(NEW), np.eye(NEW)
    for power in range(1, 80):
        term = term @ skew / power
        expected += term
    rotation = rotation_matrix(angles, NEW)
    np.testing.assert_allclose(rotation.numpy(), expected, atol=2e-5)
    np.testing.assert_allclose((rotation @ rotation.T).numpy(), np.eye(NEW), atol=1e-5)
    assert torch.equal(rotation_matrix(torch.zeros_like(angles), NEW), torch.eye(NEW)), "training begins at the slice"


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (7, 5), (6, 6)])
def test_departure_is_measured_on_the_smaller_side(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    singular = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert float(departure(weight)) == pytest.approx(np.sqrt(((singular**2 - 1) ** 2).sum()))
    left, _, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    assert float(departure(torch.from_numpy(left @ right))) < 1e-12


def test_losses_are_the_plain_ones(old: Generation) -> None:
    features, guides = batch()
    new, parent = features.detach().double(), guides[:, 2:].double()
    for method in METHODS_WITH_MAPS:
        assert METHODS[method.method] is type(method)
        companion = companion_of(method, old)
        classified, losses = companion(features, guides, torch.zeros(9, dtype=torch.int64))
        assert classified is features
        assert losses.shape == (9, len(companion.losses))
        state = {name: value.detach().double() for name, value in companion.state_dict().items()}
        if isinstance(method, Bt2):
            rotated = new @ rotation_matrix(state["rotations.0.angles_A"], NEW)[:OLD].T
            expected = [1 - (unit(rotated) * unit(parent)).sum(dim=1)]
        elif isinstance(method, Fct):
            mapped = nn.Module.double(cast(nn.ModuleList, companion.maps)[0])(parent)
            expected = [(mapped - unit(new)).square().sum(dim=1)]
        else:
            weight = state["adapters.0.weight_ED"]
            mapped = unit(new) @ weight.T + state["adapters.0.bias_E"]
            expected = [(mapped - unit(parent)).square().sum(dim=1)]
            if isinstance(method, OrthogonalAdapter):
                distance = (weight @ weight.T - torch.eye(OLD, dtype=torch.float64)).square().sum().sqrt()
                assert distance > method.slack
                expected.append((distance - method.slack).expand(9))
        torch.testing.assert_close(losses.double(), torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_only_the_rotation_reaches_the_backbone(old: Generation) -> None:
    for method in METHODS_WITH_MAPS:
        features, guides = batch()
        companion = companion_of(method, old)
        losses = companion(features, guides, torch.zeros(9, dtype=torch.int64))[1]
        losses.sum().backward()
        assert (features.grad is not None) == isinstance(method, Bt2), method.method
        for name, parameter in companion.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_penalty_is_free_within_the_slack_and_kind_at_orthogonality(old: Generation) -> None:
    features, guides = batch()
    for slack in (0.0, 100.0):
        companion = OrthogonalAdapter(slack=slack).companion(NEW, [view(old)])
        assert companion is not None
        losses = companion(features, guides, torch.zeros(9, dtype=torch.int64))[1]
        assert torch.equal(losses[:, 1], torch.zeros(9))
        losses[:, 1].sum().backward()
        gradients = [parameter.grad for parameter in companion.parameters() if parameter.grad is not None]
        assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients), "and no NaN"


def test_a_rotation_needs_as_many_dimensions_as_the_parent(old: Generation) -> None:
    with pytest.raises(ConfigError, match=r"embedding_dim of at least 5, that of 'v1'; it is 4"):
        Bt2().companion(4, [view(old)])


@pytest.mark.parametrize("method", METHODS_WITH_MAPS, ids=lambda method: method.method)
def test_what_is_trained_is_what_the_artefact_maps_by(tmp_path: Path, old: Generation, method: Method) -> None:
    companion = companion_of(method, old)
    maps = companion.exported_maps(companion.state_dict())
    new = Generation(sealed(tmp_path, "v2", NEW, {"v1": old.digest}, maps).path)
    new.verify()
    vectors = {"v1": np.random.default_rng(1).standard_normal((600, OLD)).astype(np.float32)}
    vectors["v2"] = np.random.default_rng(2).standard_normal((600, NEW)).astype(np.float32)
    mapped = apply_maps({"v1": old, "v2": new}, "v2", vectors)
    features, guides = torch.from_numpy(vectors["v2"]), torch.from_numpy(vectors["v1"])
    with torch.no_grad():
        losses = companion(features, torch.cat([guides[:, :2], guides], dim=1), torch.zeros(600, dtype=torch.int64))[1]
    got = torch.from_numpy(mapped["v1"].vectors_ND)
    if isinstance(method, Bt2):
        expected = 1 - (unit(got) * unit(guides)).sum(dim=1)
    else:
        expected = (got - unit(features if isinstance(method, Fct) else guides)).square().sum(dim=1)
    assert mapped["v1"].direction == ("gallery" if isinstance(method, Fct) else "query")
    torch.testing.assert_close(losses[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert apply_maps({"v1": old, "v2": new}, "v1", vectors) == {}
    assert apply_maps({"v2": new}, "v2", vectors) == {}, "the parent is not evaluated"


def test_changed_map_missing_map_and_another_parent_are_named(tmp_path: Path, old: Generation) -> None:
    companion = companion_of(AffineAdapter(), old)
    new = sealed(tmp_path, "v2", NEW, {"v1": old.digest}, companion.exported_maps(companion.state_dict()))
    with pytest.raises(GenerationError, match="'v2' has no gallery map of 'v1', but query v1"):
        new.load_map("v1", "gallery")
    with pytest.raises(GenerationError, match="'v1' has no query map of 'v0', but no map at all"):
        old.load_map("v0", "query")
    other = sealed(tmp_path, "elsewhere", OLD, {}, [])
    vectors = {"v1": np.ones((3, OLD), np.float32), "v2": np.ones((3, NEW), np.float32)}
    with pytest.raises(GenerationError, match="'v2' has a map for another 'v1' than the one at"):
        apply_maps({"v1": other, "v2": new}, "v2", vectors)
    content = bytearray((new.path / MAPS).read_bytes())
    content[-3] ^= 4
    (new.path / MAPS).write_bytes(bytes(content))
    for use in (new.verify, lambda: new.load_map("v1", "query")):
        with pytest.raises(GenerationError, match=r"maps\.safetensors has changed since it was written"):
            use()


def test_artefact_without_maps_is_as_it_was(old: Generation) -> None:
    assert not (old.path / MAPS).exists()
    assert '"maps"' not in (old.path / "generation.json").read_text(), "its digest is that of older versions"


def turned(direction: str) -> tuple[Embeddings, Embeddings]:
    """v2 is v1 in an unrelated basis, with a map that undoes that, either way."""
    old = embed("v1", 0.3, dim=6)
    basis = np.linalg.qr(np.random.default_rng(8).standard_normal((6, 6)))[0].astype(np.float32)
    new = embed("v2", 0.3, dim=6)
    new = replace(new, vectors_ND=new.vectors_ND @ basis)
    if direction == "query":
        return replace(new, mapped={"v1": Mapped("query", new.vectors_ND @ basis.T)}), old
    return replace(new, mapped={"v1": Mapped("gallery", old.vectors_ND @ basis)}), old


@pytest.mark.parametrize("direction", ["query", "gallery"])
def test_every_figure_goes_by_the_map(direction: str) -> None:
    new, old = turned(direction)
    config = EvaluationConfig(ranks=(1,), far=(0.05,), fpir=(0.2,), bootstrap=0)
    pairs = [("v1", "v1"), ("v2", "v2"), ("v2", "v1")]
    measured = measure({"v1": old, "v2": new}, pairs, config)
    lost = measure({"v1": old, "v2": replace(new, mapped={})}, pairs, config)
    for metric in config.metric_names:
        own = measured.estimate("v1", "v1", metric).value
        assert measured.estimate("v2", "v1", metric).value == pytest.approx(own), metric
        assert lost.estimate("v2", "v1", metric).value < own, metric
    # Every item scores as it did, whichever of them are embedded again.
    curve = backfill(new, old, Images.of(old, config), config)["random"]["rank1"]
    assert curve == pytest.approx([measured.estimate("v1", "v1", "rank1").value] * len(curve))
    assert backfill(replace(new, mapped={}), old, Images.of(old, config), config)["random"]["rank1"][0] < curve[0]


def test_smaller_queries_search_by_a_map_alone() -> None:
    old, small = embed("v1", 0.3, dim=6), embed("v2", 0.3, dim=4)
    with pytest.raises(GenerationError, match="queries of v2 have 4 dimensions"):
        comparable_query(small, old)
    vectors = old.vectors_ND + 1
    assert comparable_query(replace(small, mapped={"v1": Mapped("query", vectors)}), old) is vectors
    lineage = Lineage(("v1", "v2"), {"v2": ("v1",)}, {})
    assert ("v2", "v1") not in lineage.pairs({"v1": 6, "v2": 4})
    assert ("v2", "v1") in lineage.pairs({"v1": 6, "v2": 4}, {("v2", "v1")})
