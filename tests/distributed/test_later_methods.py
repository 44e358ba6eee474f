"""The later methods on real ranks equal plain versions over the whole batch, identity by identity."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.compat.base import Method, Parent
from pipeline.compat.methods.advbct import AdvBct, Discriminators
from pipeline.compat.methods.lce import Lce
from pipeline.compat.methods.mixbct import MixBct
from pipeline.compat.methods.ract import Nccl, Ract
from pipeline.compat.methods.unibct import UniBct
from pipeline.model.classifier import ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.margins import MarginConfig
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import row_range
from tests.dense import dense_loss
from tests.distributed.ranks import run_ranks

DIM, OLD, ROWS = 7, 5, 23
GUIDES = (slice(2, 2 + OLD), slice(0, 2))  # the first parent's features are not the first columns
NEW_MARGIN = MarginConfig(name="cosface", scale=8.0, m3=0.1)
OLD_MARGIN = MarginConfig(name="arcface", scale=6.0, m2=0.3)
NO_IMAGES, ONE_IMAGE = (4, 9, 22), (3, 17)  # identities of the table
REPEATS = [20, 3, 3, 11, 1, 0, 22, 5, 9, 3, 17, 20, 4]
NOBODY = [4, 9, 22, 4, 9, 9]  # none has a mean
PARTS = {1: {13: [13], 6: [6]}, 3: {13: [2, 7, 4], 6: [1, 2, 3]}}
METHODS: dict[str, Method] = {
    "ract": Ract(),
    "ract old": Ract(negatives="old", temperature=0.3),
    "nccl": Nccl(temperature=0.2),
    "lce": Lce(boundary_weight=1.5),
    "lce mean": Lce(boundary="mean", align=False),
    "advbct": AdvBct(elasticity=0.25),
    "unibct": UniBct(margin=0.2),
}


def draw(labels: list[int]) -> SimpleNamespace:
    """A batch and what a parent knows of the identities, whole."""
    generator = torch.Generator().manual_seed(5)
    features, guides, weight, means, spread = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((len(labels), DIM), (len(labels), 7), (ROWS, DIM), (ROWS, OLD), (ROWS,))
    )
    means = F.normalize(means) * torch.rand(ROWS, 1, generator=generator, dtype=torch.float64)
    means[list(NO_IMAGES)] = 0
    spread = spread.tanh() * 0.5 + 0.3
    means[list(ONE_IMAGE)] = F.normalize(means[list(ONE_IMAGE)])
    spread[list(ONE_IMAGE)] = 1.0
    return SimpleNamespace(features=features, guides=guides, weight=weight, means=means, spread=spread)


def view(data: SimpleNamespace, mesh: ClassMesh, number: int = 0) -> Parent:
    """This rank's part of a parent; the second one has two dimensions."""
    first, end = row_range(ROWS, mesh.shard, mesh.shards)
    guide = GUIDES[number]
    means = data.means[first:end, : guide.stop - guide.start]
    head = Head("", means, torch.arange(first, end), OLD_MARGIN)
    generation = cast(Any, SimpleNamespace(record=SimpleNamespace(name=f"old{number}")))
    return Parent(generation, head, guide, means, first, 1.0, NEW_MARGIN, data.spread[first:end], mesh)


def weights(count: int) -> Tensor:
    return torch.tensor([1.0, 0.7, 2.5][:count], dtype=torch.float64)


def on_ranks(rank: int, world_size: int) -> dict[str, Any]:
    mesh = ClassMesh.of_world("cpu")
    found: dict[str, Any] = {}
    for labels in (REPEATS, NOBODY):
        data, parts = draw(labels), PARTS[world_size][len(labels)]
        mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        for name, method in METHODS.items():
            parent = view(data, mesh)
            features = data.features[mine].clone().requires_grad_()
            companion = discriminators([parent]) if isinstance(method, AdvBct) else None
            shown, local = (
                companion(features, data.guides[mine], torch.tensor(labels)[mine]) if companion else (features, None)
            )
            classifier = ShardedClassifier(
                "new",
                ROWS,
                DIM,
                NEW_MARGIN,
                method.heads(parent),
                batch_losses=method.batch_losses(parent),
                local_losses=companion.losses if companion else (),
                mesh=mesh,
            )
            classifier.weight_CD = data.weight[classifier.first_row : classifier.end_row].clone()
            losses = classifier(shown, torch.tensor(labels)[mine], parts, 0, None, data.guides[mine], local)
            (losses * weights(len(losses))).sum().backward()
            assert features.grad is not None
            judged = [p.grad.tolist() for p in companion.parameters() if p.grad is not None] if companion else []
            found[f"{name} {len(labels)}"] = {
                "losses": losses.tolist(),
                "names": classifier.loss_names,
                "features": features.grad.tolist(),
                "judged": judged,
            }
        found[f"mixbct {len(labels)}"] = mixed(data, mesh, mine, labels, rank)
    return found


def discriminators(parents: list[Parent]) -> Discriminators:
    torch.manual_seed(11)
    return Discriminators(parents, 6, 0.4).double()


def mixed(data: SimpleNamespace, mesh: ClassMesh, mine: slice, labels: list[int], rank: int) -> dict[str, Any]:
    companion = MixBct(share=0.6).companion(DIM, [view(data, mesh), view(data, mesh, 1)])
    assert companion is not None
    features = data.features[mine].clone().requires_grad_()
    torch.manual_seed(rank)
    shown, local = companion(features, data.guides[mine], torch.tensor(labels)[mine])
    assert local.shape == (len(features), 0)
    shown.square().sum().backward()
    assert features.grad is not None
    return {"shown": shown.tolist(), "features": features.grad.tolist()}


def plain_contrast(features: Tensor, old: Tensor, labels: list[int], temperature: float, both: bool) -> Tensor:
    losses = []
    for i, label in enumerate(labels):
        cosines = [F.cosine_similarity(features[i, :OLD], old[i], dim=0)]
        for j, other in enumerate(labels):
            if other != label:
                cosines.append(F.cosine_similarity(features[i, :OLD], old[j], dim=0))
                if both:
                    cosines.append(F.cosine_similarity(features[i], features[j], dim=0))
        probability = torch.softmax(torch.stack(cosines) / temperature, dim=0)[0]
        losses.append(-torch.log(probability))
    return torch.stack(losses).mean()


def plain_neighbourhood(features: Tensor, old: Tensor, labels: list[int], temperature: float) -> Tensor:
    losses = []
    for i, label in enumerate(labels):
        cosines = torch.stack([F.cosine_similarity(features[i, :OLD], o, dim=0) for o in old])
        probability = torch.softmax(cosines / temperature, dim=0)
        same = [j for j, other in enumerate(labels) if other == label]
        trust = [(1 + F.cosine_similarity(old[i], old[j], dim=0)) / 2 for j in same]
        losses.append(-(torch.stack(trust) * torch.log(probability[same])).mean())
    return torch.stack(losses).mean()


def plain_boundary(name: str, data: SimpleNamespace, features: Tensor, labels: list[int]) -> Tensor:
    losses = []
    for feature, label in zip(features, labels, strict=True):
        mean = data.means[label]
        if label in NO_IMAGES or label in ONE_IMAGE:
            continue
        cosine = F.cosine_similarity(feature[:OLD], mean, dim=0)
        if name == "lce":
            losses.append(1.5 * torch.relu(data.spread[label] - cosine))
        elif name == "lce mean":
            losses.append(torch.relu(mean.norm() - cosine))
        else:
            furthest = math.sqrt(2 - 2 * float(data.spread[label]))
            radius = furthest + 0.25 * (0.5 - furthest)
            losses.append(torch.relu((F.normalize(feature[:OLD], dim=0) - mean / mean.norm()).norm() - radius))
    return torch.stack(losses).mean() if losses else features.sum() * 0


def plain_centres(data: SimpleNamespace, features: Tensor, labels: list[int], margin: MarginConfig) -> Tensor:
    rows = [row for row in range(ROWS) if row not in NO_IMAGES]
    own = torch.tensor([rows.index(label) if label in rows else -1 for label in labels])
    return dense_loss(features[:, :OLD], data.means[rows], own, margin)


def plain(name: str, labels: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, feature gradient, and those of the discriminator."""
    data = draw(labels)
    features = data.features.clone().requires_grad_()
    old, judged = data.guides[:, GUIDES[0]], []
    losses = [dense_loss(features, data.weight, torch.tensor(labels), NEW_MARGIN)]
    if name.startswith("ract"):
        losses.append(plain_contrast(features, old, labels, 0.05 if name == "ract" else 0.3, name == "ract"))
    elif name == "nccl":
        losses.append(plain_neighbourhood(features, old, labels, 0.2))
    elif name == "unibct":
        losses.append(plain_centres(data, features, labels, MarginConfig(name="cosface", scale=6.0, m3=0.2)))
    else:
        if name == "lce":
            losses.append(plain_centres(data, features, labels, NEW_MARGIN))
        losses.append(plain_boundary(name, data, features, labels))
    total = (torch.stack(losses) * weights(len(losses))).sum()
    (gradient,) = torch.autograd.grad(total, features, retain_graph=True)
    if name == "advbct":
        judge = discriminators([view(data, ClassMesh())]).judges[0]
        new = F.normalize(features[:, :OLD])
        logits = torch.cat([judge(new), judge(F.normalize(old))])
        origin = torch.cat([torch.zeros(len(labels), 1), torch.ones(len(labels), 1)]).double()
        adversarial = 2 * F.binary_cross_entropy_with_logits(logits, origin)
        judged = list(torch.autograd.grad(2.5 * adversarial, list(judge.parameters()), retain_graph=True))
        gradient -= 0.4 * torch.autograd.grad(2.5 * adversarial, features)[0]
        losses.append(adversarial)
    return torch.stack(losses).detach(), gradient, judged


def plain_mixed(labels: list[int], parts: list[int]) -> tuple[Tensor, Tensor, int]:
    """Mixed features, the gradient of the sum of their squares, and how many were replaced."""
    data, drawn, which = draw(labels), [], []
    for rank, part in enumerate(parts):
        torch.manual_seed(rank)
        drawn.append(torch.rand(part) < 0.6)
        which.append(torch.randint(2, (part,)))
    shown, gradient, replaced = data.features.clone(), 2 * data.features, 0
    for i, (label, take, parent) in enumerate(zip(labels, torch.cat(drawn), torch.cat(which), strict=True)):
        old = data.guides[i, GUIDES[int(parent)]]
        cosine = F.cosine_similarity(old, data.means[label, : len(old)], dim=0)
        if take and cosine >= data.spread[label]:
            replaced += 1
            shown[i], gradient[i] = 0, 0
            shown[i, : len(old)] = old / old.norm() * data.features[i].norm()
    return shown, gradient, replaced


@pytest.mark.parametrize("world_size", [1, 3])
def test_losses_and_gradients_equal_the_plain_ones(world_size: int) -> None:
    ranks = run_ranks(world_size, on_ranks)
    for labels in (REPEATS, NOBODY):
        for name in METHODS:
            found = [rank[f"{name} {len(labels)}"] for rank in ranks]
            losses, gradient, judged = plain(name, labels)
            for one in found:
                torch.testing.assert_close(torch.tensor(one["losses"]).double(), losses, rtol=1e-6, atol=1e-9)
            features = torch.tensor([row for one in found for row in one["features"]], dtype=torch.float64)
            torch.testing.assert_close(features, gradient)
            for number, expected in enumerate(judged):
                total = sum(torch.tensor(one["judged"][number], dtype=torch.float64) for one in found)
                torch.testing.assert_close(total, expected)
        shown, gradient, replaced = plain_mixed(labels, PARTS[world_size][len(labels)])
        found = [rank[f"mixbct {len(labels)}"] for rank in ranks]
        for key, expected in (("shown", shown), ("features", gradient)):
            whole = torch.tensor([row for one in found for row in one[key]], dtype=torch.float64)
            torch.testing.assert_close(whole, expected)
        assert 0 < replaced < len(labels) or labels is NOBODY, "the case shows nothing"
    assert ranks[0]["advbct 13"]["names"] == ["new", "old0/boundary", "old0/adversarial"]
    assert ranks[0]["lce 13"]["names"] == ["new", "old0", "old0/boundary"]
