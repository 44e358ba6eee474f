"""The DeepSpeed engine that holds the backbone, and nothing else."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from pipeline.compat.base import Companion
from pipeline.model.gradients import scale_gradient
from pipeline.schema import Config
from pipeline.training.optimiser import OptimiserConfig, backbone_groups, build_optimiser, set_learning_rate
from pipeline.training.zero import initialise


class EngineConfig(Config):
    """How DeepSpeed spreads the backbone over the ranks."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="ZeRO: 1 shards optimiser state, 2 gradients, 3 weights")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16 autocasts matrix products, batch norms stay fp32; only faster on processors that have it",
    )


class _Pair(nn.Module):
    """A backbone and its method's learned parts, which DeepSpeed trains as one."""

    def __init__(self, backbone: nn.Module, companion: Companion | None) -> None:
        super().__init__()
        self.backbone, self.companion = backbone, companion

    def forward(self, images_bCHW: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        features_bD = self.backbone(images_bCHW).float()
        if self.companion is None:
            return features_bD, features_bD.new_zeros(len(features_bD), 0)
        classified_bD, losses_bK = self.companion(features_bD, guides_bE, labels_b)
        return classified_bD.float(), losses_bK.float()


class BackboneEngine:
    """A backbone, and what its method sets beside it, under DeepSpeed.

    The classifier gives each rank the gradient of the *global* mean loss with respect to its own features; DeepSpeed
    averages the backbone's gradients over the ranks, which would divide by their number once too often. The features
    leave the engine through a factor of world_size on their gradient: this is the one place that knows.
    """

    def __init__(
        self,
        backbone: nn.Module,
        optimiser: OptimiserConfig,
        config: EngineConfig,
        samples_per_rank: int,
        accumulation: int = 1,
        companion: Companion | None = None,
    ) -> None:
        pair = _Pair(backbone, companion)
        self.config, self.world_size, self.clip = config, dist.get_world_size(), optimiser.clip
        base = build_optimiser(optimiser, backbone_groups(pair, optimiser))
        autocast = config.precision == "bf16"
        self._engine: Any = initialise(
            pair, base, config.zero_stage, autocast, samples_per_rank, accumulation, optimiser.clip
        )
        self._base = base
        self._make_optimiser_state()
        self._buffers = [buffer for _, buffer in self._engine.module.named_buffers()]
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    def begin(self) -> None:
        """Begin an update. If it is given up, batch norm's statistics go back to what they are now."""
        _copy(self._buffers_before, self._buffers)

    def features(self, images_bCHW: Tensor, guides_bE: Tensor, labels_b: Tensor) -> tuple[Tensor, Tensor]:
        """(b, D) float32 features of this rank's images as the classifier is to see them, (b, K) local losses."""
        features_bD, losses_bK = self._engine(images_bCHW, guides_bE, labels_b)
        factor = float(self.world_size)
        return scale_gradient(features_bD, factor), scale_gradient(losses_bK, factor)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a micro-batch's share of the loss; after the `last` one of an update, join the ranks'.

        The classifier has divided by the samples of the whole update already: DeepSpeed must not divide again.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, rate: float) -> float | None:
        """Update the backbone and return the norm of its gradient before clipping.

        The norm is that of the ranks' joined gradient, so that all of them answer alike: None if it is not a finite
        number, and then nothing has moved.
        """
        set_learning_rate(self._base, rate)
        set_learning_rate(self._engine.optimizer, rate)
        if self.config.zero_stage == 0:
            norm = float(self._clip())
            moved = math.isfinite(norm)
            if moved:
                self._engine.step()
        else:
            self._engine.step()  # throws a gradient away if its norm is no number
            norm, moved = float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()
        if not moved:
            self._give_up()
        return norm if moved else None

    def discard(self, loss: Tensor, begun: bool) -> None:
        """Give up an update; nothing moves.

        DeepSpeed throws a gradient away if it is no number, and only then.

        Args:
            loss: of one of its micro-batches, whose backward has not been done.
            begun: whether that of another has.
        """
        if begun:
            self.backward(loss * math.nan, last=True)
            if self.config.zero_stage != 0:
                self._engine.step()
        self._give_up()

    def _give_up(self) -> None:
        if self.config.zero_stage == 0:
            self._engine.zero_grad()
        _copy(self._buffers, self._buffers_before)

    def _clip(self) -> Tensor:
        """Without ZeRO the gradients are plain, and DeepSpeed would not tell their norm."""
        return nn.utils.clip_grad_norm_(self._engine.module.parameters(), self.clip or math.inf)

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and optimiser state in full, by name: the same at any world size and ZeRO stage.

        Collective. Batch norms' running statistics are averaged over the ranks, in place, so that a run that goes on
        and one that resumes have the same.
        """
        state = {f"buffer.{name}": buffer for name, buffer in self._averaged_buffers()}
        for name, parameter in self._engine.module.named_parameters():
            state[f"weight.{name}"] = self._full(parameter, None)
            for key in self._optimiser_keys() if parameter.requires_grad else ():
                state[f"optimiser.{key}.{name}"] = self._full(parameter, key)
        return state

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Restore what `state` gave. Collective."""
        for name, buffer in self._engine.module.named_buffers():
            buffer.copy_(state[f"buffer.{name}"])
        for name, parameter in self._engine.module.named_parameters():
            self._set_full(parameter, None, state[f"weight.{name}"])
            for key in self._optimiser_keys() if parameter.requires_grad else ():
                self._set_full(parameter, key, state[f"optimiser.{key}.{name}"])
        self._set_steps(step)

    def module_states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State dicts, in full, of the backbone and of its companion, for the artefact. Collective."""
        kinds = ("weight.", "buffer.")
        whole = {name.split(".", 1)[1]: value for name, value in self.state().items() if name.startswith(kinds)}
        backbone, companion = (
            {name.removeprefix(f"{part}."): value for name, value in whole.items() if name.startswith(f"{part}.")}
            for part in ("backbone", "companion")
        )
        return backbone, companion

    def state_bytes(self) -> int:
        """Bytes of what `state` gives."""
        slots = len(self._optimiser_keys())
        parameters = self._engine.module.parameters()
        weights: list[tuple[int, bool]] = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in parameters]
        numbers = sum(size * (1 + slots * learned) for size, learned in weights)
        return 4 * numbers + sum(int(buffer.nbytes) for buffer in self._buffers)

    def _averaged_buffers(self) -> list[tuple[str, Tensor]]:
        buffers = list(self._engine.module.named_buffers())
        for _, buffer in buffers:
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(self.world_size)
        return buffers

    def _optimiser_keys(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq") if isinstance(self._base, torch.optim.AdamW) else ("momentum_buffer",)

    def _full(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """A weight (key None) or a slot of its optimiser, whole on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._outside_zero(parameter):
            with self._gathered(parameter):
                return (parameter if key is None else self._base.state[parameter][key]).detach().clone()
        value = safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        assert value is not None, "ZeRO holds no such state"
        return cast(Tensor, value).detach().view(getattr(parameter, "ds_shape", parameter.shape))

    def _set_full(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            with self._gathered(parameter, modifier_rank=0):  # the copy that computes
                parameter.data.copy_(value)
            if not self._outside_zero(parameter):
                safe_set_full_fp32_param(parameter, value)  # the copy that the optimiser moves
        elif self._outside_zero(parameter):
            self._base.state[parameter][key].copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _outside_zero(self, parameter: nn.Parameter) -> bool:
        """Whether ZeRO keeps no fp32 copy of it: there is no ZeRO, or the weight is frozen."""
        return self.config.zero_stage == 0 or not parameter.requires_grad

    def _gathered(self, parameter: nn.Parameter, modifier_rank: int | None = None) -> AbstractContextManager[None]:
        """Stage 3 cuts frozen weights too; others are whole already."""
        import deepspeed

        if self.config.zero_stage < 3:
            return nullcontext()
        gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter], modifier_rank)
        return gathered

    def _make_optimiser_state(self) -> None:
        """Make every slot now, at zero: torch would at the first step, and ZeRO would link those of one group only."""
        own = [parameter for group in self._base.param_groups for parameter in group["params"]]
        flat = self._engine.optimizer.fp32_partitioned_groups_flat if self.config.zero_stage == 3 else own
        for parameter in flat:
            state = self._base.state[parameter]
            for key in self._optimiser_keys():
                state.setdefault(key, torch.zeros_like(parameter))
            if isinstance(self._base, torch.optim.AdamW):
                state.setdefault("step", torch.tensor(0.0))
        if self.config.zero_stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_steps(self, step: int) -> None:
        for state in self._base.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(step))


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for mine, other in zip(to, source, strict=True):
        mine.copy_(other)
