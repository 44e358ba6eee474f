"""Export a generation for those who serve it: as ONNX, as a torch program, as safetensors; stamped, and checked first.

python jobs/export.py --config FILE --generation NAME --out FOLDER         of a run
python jobs/export.py --artefact FOLDER --out FOLDER                       wherever it lies
python jobs/export.py ... --formats onnx,torch                             only these

NAME.onnx and NAME.pt2 take float32 pixels of 0 to 255, (batch, channels, side, side), and give unit vectors: what is
left to do is to resize images to side x side. NAME.safetensors holds the weights alone. See pipeline.export.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def run(arguments: argparse.Namespace) -> None:
    """Export, and print a line for each file."""
    from pipeline.config import load_config
    from pipeline.export.exporting import export, parse_formats
    from pipeline.generation import Generation

    formats = parse_formats(arguments.formats)
    if arguments.config is None:
        artefact = arguments.artefact
    else:
        artefact = load_config(arguments.config, arguments.overrides).folder / "generations" / arguments.generation
    for made in export(Generation(artefact), arguments.out, formats):
        print(f"{made.path}  cosine {made.cosine:.6f} to the backbone's embeddings, largest error {made.error:.1e}")


def main() -> int:
    """Parse the arguments and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="config keys to set, values as YAML")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", type=Path, help="YAML file of the run that trained it")
    where.add_argument("--artefact", type=Path, metavar="FOLDER", help="folder of the generation")
    parser.add_argument("--generation", metavar="NAME", help="with --config: which generation")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--formats", default="onnx,torch,safetensors", help="of the files (default: %(default)s)")
    arguments = parser.parse_args()
    if (arguments.config is None) != (arguments.generation is None):
        parser.error("--config and --generation go together")
    if arguments.overrides and arguments.config is None:
        parser.error("overrides are of a --config; leave them out with --artefact")

    from pipeline.job import exit_code

    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
