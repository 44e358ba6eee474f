"""Starting DeepSpeed: the one place that says what it is asked for."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn


def initialise(
    backbone: nn.Module,
    optimiser: torch.optim.Optimizer,
    stage: int,
    autocast: bool,
    samples: int,
    accumulation: int,
    clip: float | None,
) -> Any:
    """A DeepSpeed engine around a backbone and its optimiser.

    Args:
        backbone: on its device.
        optimiser: of its parameters.
        stage: of ZeRO.
        autocast: matrix products in bf16.
        samples: of this rank in a micro-batch.
        accumulation: micro-batches of an update.
        clip: largest norm of the gradient; None: any.
    """
    device = next(backbone.parameters()).device
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops

    # DeepSpeed calls it by its old name, for all ranks and runs.
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory all-reduce is compiled at first use: a minute, and a C++ compiler. Gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=backbone,
        optimizer=optimiser,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": samples,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip if clip and stage else 0.0,  # its default is 1.0, silently
            "zero_optimization": {"stage": stage},
            "torch_autocast": {"enabled": autocast, "dtype": "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**12,
        },
    )
    return engine
