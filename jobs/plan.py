"""Plan a training before renting GPUs: memory, time and traffic of a step, and the cheapest setting that fits.

python jobs/plan.py --identities 10000000 --dim 512 --parents 5000000 --batch 4096 --backbone iresnet50 \\
    --gpus 8 --gpu-memory 80
python jobs/plan.py ... --scale 8 16 32 64 128 256 512 1024 --plot FILE.png    the same on more and more GPUs
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
from pipeline.planning.calibration import Rates, assumed_rates, benchmark_rates
from pipeline.planning.config import PlanConfig
from pipeline.planning.measured import measured_links
from pipeline.planning.picture import draw_scale
from pipeline.planning.report import as_json, scale_json, show, show_scale
from pipeline.planning.scale import scale_plan
from pipeline.planning.search import make_plan

BACKBONE_OPTIONS = {"backbone": "name", "dim": "embedding_dim", "image_size": "image_size", "channels": "channels"}
FILES = ("benchmark", "scaling", "scale", "plot", "json")
FLOATS = (
    *("gpu_memory", "bandwidth", "latency", "network_bandwidth", "network_latency", "overlap"),
    *("overhead", "backbone_efficiency", "sample_rate"),
    *("loader_images_per_s", "checkpoint_bandwidth"),
)
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
    for name in FLOATS:
        add(name, type=float)
    for name in ("class_group", "gpus_per_node", "checkpoint_every"):
        add(name, type=int)
    for name in ("gpu", "implementation", "precision", "optimiser"):
        add(name, choices=get_args(PlanConfig.model_fields[name].annotation))
    add("fused_update", action=argparse.BooleanOptionalAction)
    add("zero_stage", type=int, choices=(0, 1, 2, 3))
    parser.add_argument("--benchmark", type=Path, default=None, help="calibrate by a JSON of jobs/benchmark.py")
    parser.add_argument(
        "--scaling", type=Path, default=None, help="take latency and bandwidth from a JSON of jobs/benchmark.py scaling"
    )
    parser.add_argument(
        "--scale",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="plan these numbers of GPUs, each with as many samples a GPU as --batch on --gpus",
    )
    parser.add_argument("--plot", type=Path, default=None, metavar="FILE.png", help="draw --scale")
    parser.add_argument("--json", type=Path, default=None, help="write all of the plan to this file")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace) -> PlanConfig:
    """Make the config that the command line asks for.

    Raises:
        ConfigError: an option is out of its range, or two do not go together.
    """
    given = {name: value for name, value in vars(options).items() if name not in FILES}
    if options.scaling is not None:
        given = measured_links(options.scaling) | given
    if options.plot is not None and options.scale is None:
        raise ConfigError("--plot draws what --scale plans: give both")
    backbone = {field: (FACES | given)[option] for option, field in BACKBONE_OPTIONS.items()}
    rest = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name not in BACKBONE_OPTIONS}
    try:
        return PlanConfig(backbone=BackboneConfig(**backbone), **rest)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = {"embedding_dim": "dim"}.get(str(first["loc"][0]), str(first["loc"][0])).replace("_", "-")
        raise ConfigError(f"--{option}: {first['msg']}, not {first['input']!r}") from None


def plan_one(config: PlanConfig, rates: Rates) -> dict[str, Any]:
    """Find and print the cheapest setting."""
    plan = make_plan(config, rates)
    show(plan)
    return as_json(plan)


def plan_scale(config: PlanConfig, rates: Rates, options: argparse.Namespace) -> dict[str, Any]:
    """Print, and draw where asked to, the training on more and more GPUs."""
    plan = scale_plan(config, rates, options.scale)
    show_scale(plan)
    if options.plot is not None:
        draw_scale(plan, options.plot)
    return scale_json(plan)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        config = build(options)
        rates = assumed_rates(config) if options.benchmark is None else benchmark_rates(options.benchmark, config)
        document = plan_one(config, rates) if options.scale is None else plan_scale(config, rates, options)
        if options.json is not None:
            write_json(options.json, document)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
