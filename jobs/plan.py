"""Plan a training before renting GPUs: memory, time and traffic of a step, and the cheapest setting that fits.

python jobs/plan.py --identities 10000000 --dim 512 --parents 5000000 --batch 4096 --backbone iresnet50 \\
    --gpus 8 --gpu-memory 80
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pydantic

from pipeline.errors import ConfigError, PipelineError
from pipeline.files import write_json
from pipeline.model.backbones import BackboneConfig
from pipeline.planning.calibration import assumed_rates, benchmark_rates
from pipeline.planning.config import PlanConfig
from pipeline.planning.report import as_json, show
from pipeline.planning.search import make_plan

BACKBONE_OPTIONS = {"backbone": "name", "dim": "embedding_dim", "image_size": "image_size", "channels": "channels"}
FACES = {"image_size": 112, "channels": 3}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; options that are left out are left to `PlanConfig`."""
    parser = argparse.ArgumentParser(
        prog="jobs/plan.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )

    def add(name: str, **how: Any) -> None:
        field = PlanConfig.model_fields[name]
        default = "" if field.is_required() or field.default in (None, ()) else f" [{field.default}]"
        how.setdefault("required", field.is_required())
        parser.add_argument("--" + name.replace("_", "-"), help=f"{field.description}{default}", **how)

    add("identities", type=int)
    parser.add_argument("--dim", type=int, required=True, help="dimension of the features")
    add("parents", type=int, nargs="*")
    add("parent_dim", type=int, nargs="+")
    add("batch", type=int)
    parser.add_argument("--backbone", default="iresnet50", help="iresnet50, resnet50, timm:NAME, ... [iresnet50]")
    parser.add_argument("--image-size", type=int, help=f"side of the images, pixels [{FACES['image_size']}]")
    parser.add_argument("--channels", type=int, choices=(1, 3), help=f"of the images [{FACES['channels']}]")
    add("gpus", type=int)
    for name in ("gpu_memory", "bandwidth", "overhead", "backbone_efficiency", "sample_rate"):
        add(name, type=float)
    add("class_group", type=int)
    for name in ("implementation", "precision", "optimiser"):
        add(name, choices=get_args(PlanConfig.model_fields[name].annotation))
    add("fused_update", action=argparse.BooleanOptionalAction)
    add("zero_stage", type=int, choices=(0, 1, 2, 3))
    parser.add_argument("--benchmark", type=Path, default=None, help="calibrate by a JSON of jobs/benchmark.py")
    parser.add_argument("--json", type=Path, default=None, help="write all of the plan to this file")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> PlanConfig:
    """Make the config that the command line asks for.

    Raises:
        ConfigError: an option is out of its range, or two do not go together.
    """
    given = {name: value for name, value in vars(options).items() if name not in ("benchmark", "json")}
    backbone = {field: (FACES | given)[option] for option, field in BACKBONE_OPTIONS.items()}
    rest = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name not in BACKBONE_OPTIONS}
    try:
        return PlanConfig(backbone=BackboneConfig(**backbone), **rest)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = {"embedding_dim": "dim"}.get(str(first["loc"][0]), str(first["loc"][0])).replace("_", "-")
        raise ConfigError(f"--{option}: {first['msg']}, not {first['input']!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        config = build(options)
        rates = assumed_rates(config) if options.benchmark is None else benchmark_rates(options.benchmark, config)
        plan = make_plan(config, rates)
        show(plan)
        if options.json is not None:
            write_json(options.json, as_json(plan))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
