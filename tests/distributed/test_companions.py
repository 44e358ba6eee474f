"""Learned maps on real ranks: they move as in one process, leave the backbone alone, and reach the artefact."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.compat.base import Method, Parent
from pipeline.compat.methods.adapters import OrthogonalAdapter
from pipeline.compat.methods.baselines import Independent
from pipeline.compat.methods.bt2 import Bt2
from pipeline.compat.methods.fct import Fct
from pipeline.generation import MAPS, Generation
from pipeline.model.classifier import ClassifierConfig, ShardedClassifier
from pipeline.model.heads import Head
from pipeline.model.maps import Direction
from pipeline.model.mesh import ClassMesh
from pipeline.model.rows import batch_parts, initial_rows
from pipeline.training.engine import BackboneEngine, EngineConfig
from pipeline.training.loop import train
from pipeline.training.optimiser import OptimiserConfig
from pipeline.training.trainer import Trainer, TrainingConfig
from tests.dense import dense_loss
from tests.distributed.ranks import run_ranks
from tests.distributed.test_training import BACKBONE, MARGIN, TABLE, Notes, batches, record
from tests.unit.test_maps import OLD, sealed

ROWS, DIM, BATCH, STEPS, STAGES = 11, 6, 7, 4, (0, 1, 3)
METHODS: dict[str, Method] = {
    "bt2": Bt2(),
    "orthogonal-adapter": OrthogonalAdapter(slack=0.02),
    "fct": Fct(hidden=9),
    "independent": Independent(),
}
OPTIMISER = OptimiserConfig(weight_decay=0.1)
FACTOR = 0.7


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, DIM))


def companion_of(method: Method, parent: Generation) -> Any:
    head = Head("v1", torch.ones(3, OLD), range(3), MARGIN)
    torch.manual_seed(1)
    return method.companion(DIM, [Parent(parent, head, slice(0, OLD), None, 0, 1.0, MARGIN)])


def data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, the parent's features of them, labels."""
    torch.manual_seed(step)
    return torch.randn(BATCH, 5), torch.randn(BATCH, OLD), torch.randint(ROWS, (BATCH,))


def moved(rank: int, world_size: int, folder: str) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Weights after some steps, by ZeRO stage and method."""
    parent = Generation(Path(folder) / "v1")
    cases = [(stage, name) for stage in STAGES for name in METHODS]
    return {case: engine_weights(rank, world_size, *case, parent) for case in cases}


def engine_weights(rank: int, world_size: int, stage: int, name: str, parent: Generation) -> dict[str, Tensor]:
    backbone = network()
    companion = companion_of(METHODS[name], parent)
    engine = BackboneEngine(backbone, OPTIMISER, EngineConfig(zero_stage=stage), 6, companion=companion)
    losses = companion.losses if companion else ()
    classifier = ShardedClassifier("new", ROWS, DIM, MARGIN, local_losses=losses, mesh=ClassMesh.of_world("cpu"))
    parts = batch_parts(BATCH, world_size)
    mine = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    weight = torch.tensor([1.0] + [FACTOR] * len(losses))
    for step in range(STEPS):
        images, guides, labels = (part[mine] for part in data(step))
        features, locals_bK = engine.features(images, guides, labels)
        found = classifier(features, labels, parts, guides_bE=guides, locals_bK=locals_bK)
        engine.backward((found * weight).sum(), last=True)
        engine.step(0.05)
    return {key: value for key, value in engine.state().items() if key.startswith("weight.")}


def plain_weights(name: str, parent: Generation) -> dict[str, Tensor]:
    modules = nn.ModuleDict({"backbone": network()})
    if (companion := companion_of(METHODS[name], parent)) is not None:
        modules["companion"] = companion
    rows = initial_rows(0, ROWS, DIM, 0)
    decay = OPTIMISER.weight_decay
    groups = [{"params": [one], "weight_decay": decay * (one.ndim > 1)} for one in modules.parameters()]
    optimiser = torch.optim.AdamW(groups, lr=0.05)
    for step in range(STEPS):
        images, guides, labels = data(step)
        features = modules["backbone"](images)
        loss = dense_loss(features, rows, labels, MARGIN)
        if companion is not None:
            loss = loss + FACTOR * companion(features, guides, labels)[1].mean(dim=0).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {f"weight.{key}": value.detach() for key, value in modules.named_parameters()}


def test_maps_move_as_in_one_process_and_leave_the_backbone_alone(tmp_path: Path) -> None:
    parent = sealed(tmp_path, "v1", OLD, {}, [])
    plain = {name: plain_weights(name, parent) for name in METHODS}
    begun = companion_of(METHODS["fct"], parent).state_dict()
    for result in run_ranks(2, moved, str(tmp_path)):
        for (stage, name), weights in result.items():
            assert weights.keys() == plain[name].keys()
            for key, value in weights.items():
                torch.testing.assert_close(
                    value, plain[name][key], rtol=5e-4, atol=1e-5, msg=f"{key} of {name} differs at ZeRO {stage}"
                )
                if key.startswith("weight.backbone.") and name != "bt2":
                    assert torch.equal(value, result[stage, "independent"][key]), f"{name} moves {key} at ZeRO {stage}"
        assert any(not torch.equal(result[1, "fct"][f"weight.companion.{key}"], value) for key, value in begun.items())
        biases = [result[stage, "orthogonal-adapter"]["weight.companion.adapters.0.bias_E"] for stage in STAGES]
        assert all(bias.abs().max() > 0 for bias in biases)
        backbones = [result[1, name]["weight.backbone.0.weight"] for name in ("bt2", "independent")]
        assert not torch.equal(*backbones), "the rotation's loss reaches the backbone"


def exported(rank: int, world_size: int, folder: str) -> dict[str, dict[str, Tensor]]:
    """Train and seal a generation by each method; the companions' state as the last rank has it."""
    home = Path(folder)
    parent = Generation(home / "v1")
    states = {}
    for name in ("bt2", "orthogonal-adapter", "fct"):
        config = TrainingConfig(steps=2, global_batch=BATCH, engine=EngineConfig(zero_stage=3))
        arguments = (BACKBONE, MARGIN, METHODS[name], config, ClassifierConfig(), "digest", 3)
        trainer = Trainer(name, TABLE, [parent], *arguments, device=torch.device("cpu"))
        places = home / f"{name}-checkpoints", home / name
        open_loader = partial(batches, global_batch=BATCH, rank=rank, world_size=world_size)
        train(trainer, open_loader, Notes([]), *places, record(config, name), TABLE, home / "incidents")
        states[name] = trainer.engine.module_states()[1]
    return states


def test_sealed_generation_holds_the_trained_maps(tmp_path: Path) -> None:
    """At ZeRO 3, where no rank holds a parameter whole."""
    sealed(tmp_path, "v1", OLD, {}, [])
    states = run_ranks(2, exported, str(tmp_path))[1]
    directions: dict[str, Direction] = {"bt2": "query", "orthogonal-adapter": "query", "fct": "gallery"}
    for name, direction in directions.items():
        generation = Generation(tmp_path / name)
        generation.verify()
        assert MAPS in generation.record.files
        learned = generation.load_map("v1", direction).state_dict()
        if name == "fct":
            assert all(torch.equal(value, states[name][f"maps.0.{key}"]) for key, value in learned.items())
        elif name == "orthogonal-adapter":
            assert torch.equal(learned["layers.weight"], states[name]["adapters.0.weight_ED"])
        else:
            rows = learned["layers.weight"]
            assert rows.shape == (OLD, DIM)
            assert not torch.equal(rows, torch.eye(OLD, DIM))
            torch.testing.assert_close(rows @ rows.T, torch.eye(OLD), rtol=0, atol=1e-5)
