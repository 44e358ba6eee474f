"""Exports of a generation for those who serve it without this package.

An ONNX file and a torch program (`.pt2`) hold the whole way from pixels to embeddings: they take float32 pixels of 0 to
255, (batch, channels, side, side) where side is the preprocessing's `resize`, grey or RGB, and any batch from 1 up; the
centre square, mean and standard deviation, the backbone and the division by the length are inside. What is left to the
caller is to decode an image and to resize it to side x side with an antialiased linear filter (Pillow's BILINEAR), as
DALI does here. They give unit vectors, `embeddings`, (batch, dim) float32.

The safetensors file holds the backbone's weights alone, for code that builds the network itself: it takes images that
are preprocessed already, and its features are not normalised, as its stamp says.

Every export says what made it: the stamp under `bct.stamp` (`pipeline/stamp.py`), the preprocessing under
`bct.preprocess`. It is loaded again, and compared with the generation's own backbone on the self-test's images before
it appears under its name.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.preprocess import PreprocessConfig
from pipeline.errors import ConfigError
from pipeline.export.exported import Exported, Sample
from pipeline.files import write_atomically
from pipeline.generation import BACKBONE, SELFTEST, Generation
from pipeline.model.backbones import Backbone, build_backbone
from pipeline.stamp import STAMP, Stamp

Format = Literal["onnx", "torch", "safetensors"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
PREPROCESS, CONFIG = "bct.preprocess", "bct.backbone"  # keys beside STAMP
PIXELS, EMBEDDINGS = "pixels", "embeddings"  # input and output of the ONNX graph
OPSET = 18  # what the exporter writes without converting; every onnxruntime since 1.14 reads it
_ONNX_LIMIT = 2**31 - 2**20  # bytes of weights; protobuf takes no message of 2 GiB
_ABOUT = (
    f"{PIXELS}: float32 of 0 to 255, (batch, channels, side, side), images resized to side x side with an antialiased "
    f"linear filter. {EMBEDDINGS}: unit vectors. The metadata say which generation they are of ({STAMP})."
)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Embedder(nn.Module):
    """What is exported: pixels of 0 to 255 to unit vectors, with a generation's preprocessing inside."""

    def __init__(self, backbone: Backbone, preprocess: PreprocessConfig) -> None:
        super().__init__()
        self.trunk, self.head, self.relu = backbone.trunk, backbone.head, backbone.relu
        self.mean, self.std = preprocess.mean, preprocess.std
        self.first, self.stop = preprocess.margin, preprocess.margin + preprocess.size

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, S, S) float32 pixels of 0 to 255, S the `resize` of the preprocessing, to (B, D) unit vectors.

        The backbone's parts without its choice of a memory layout: strides mean nothing to ONNX.
        """
        square_BCHW = pixels[:, :, self.first : self.stop, self.first : self.stop]
        features_BD: Tensor = self.head(self.trunk((square_BCHW - self.mean) * (1 / self.std)))
        return F.normalize(F.relu(features_BD) if self.relu else features_BD)


def export(generation: Generation, folder: Path, formats: Sequence[Format] = FORMATS) -> list[Exported]:
    """Write NAME.onnx, NAME.pt2 and NAME.safetensors, each whole or not at all, and none before all are compared.

    Files of these names are replaced.

    Args:
        generation: the artefact.
        folder: where the files go; it is made.
        formats: which of them.

    Raises:
        GenerationError: it has no backbone, has changed, or does not reproduce its self-test; or an export does not
            give its embeddings.
        ConfigError: packages are missing, the weights are more than an ONNX file holds, or the folder takes no files.
    """
    told = _told(generation)
    if "onnx" in formats:
        _require_onnx(generation)
    for name in (BACKBONE, SELFTEST):
        generation.verify_file(name)
    generation.reproduce_selftest()
    backbone, preprocess = generation.load_backbone(), generation.record.preprocess
    assert isinstance(backbone, Backbone)
    assert preprocess is not None, "what has a backbone has a preprocessing"
    sample = Sample.of(generation, backbone, preprocess)
    program = None if set(formats) == {"safetensors"} else trace(Embedder(backbone, preprocess), sample)
    made: list[tuple[Exported, bytes]] = []
    for kind in dict.fromkeys(formats):
        path = folder / f"{generation.record.name}{SUFFIXES[kind]}"
        if kind == "safetensors":
            content, embed = _safetensors(generation, backbone)
        else:
            assert program is not None
            content, embed = (_onnx if kind == "onnx" else _torch)(program, told)
        made.append((sample.compare(embed, path, preprocessed=kind == "safetensors"), content))
    for exported, content in made:
        try:
            write_atomically(exported.path, content)
        except OSError as error:
            raise ConfigError(f"{exported.path} cannot be written ({error.strerror}): name another --out") from None
    return [exported for exported, _ in made]


def parse_formats(text: str) -> tuple[Format, ...]:
    """Formats by name, separated by commas.

    Raises:
        ConfigError: one is not known.
    """
    names = text.split(",")
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--formats names {name!r}: choose of {', '.join(FORMATS)}")
    return tuple(kind for kind in FORMATS if kind in names)


def trace(embedder: nn.Module, sample: Sample) -> torch.export.ExportedProgram:
    """The embedder as a program for any batch. Traced on zeros: a program keeps the images that it was traced on."""
    pixels_BCSS = torch.zeros_like(sample.pixels_NCSS[:2])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of its trees
        program = torch.export.export(
            embedder.eval(), (pixels_BCSS,), dynamic_shapes={PIXELS: {0: torch.export.Dim.DYNAMIC}}
        )
    for node in program.graph.nodes:  # where in our source it was traced is nobody's business
        node.meta.pop("stack_trace", None)
    return program


def _onnx(program: torch.export.ExportedProgram, told: dict[str, str]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # no torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[PIXELS],
            output_names=[EMBEDDINGS],
            dynamic_shapes={PIXELS: {0: "batch"}},
            opset_version=OPSET,
            verbose=False,
        )
    assert exported is not None
    model: Any = exported.model_proto
    for node in model.graph.node:  # the exporter's own notes on how it came to be
        node.ClearField("metadata_props")
    model.doc_string = _ABOUT
    for key, value in told.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda pixels: torch.from_numpy(session.run([EMBEDDINGS], {PIXELS: pixels.numpy()})[0])


def _torch(program: torch.export.ExportedProgram, told: dict[str, str]) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.export.save(program, buffer, extra_files=told)
        module = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    return buffer.getvalue(), module


def _safetensors(generation: Generation, backbone: Backbone) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    config = generation.record.backbone
    assert config is not None
    told = _told(generation, normalised=False) | {CONFIG: config.model_dump_json()}
    content = safetensors.torch.save({name: one.contiguous() for name, one in backbone.state_dict().items()}, told)
    again = build_backbone(config)
    again.load_state_dict(safetensors.torch.load(content))
    again.eval()
    return content, lambda images_BCHW: F.normalize(again(images_BCHW))


def _told(generation: Generation, normalised: bool = True) -> dict[str, str]:
    """What every export says of itself."""
    stamp, preprocess = Stamp.of(generation, normalised), generation.record.preprocess
    assert preprocess is not None, "what has a stamp has a preprocessing"
    return {STAMP: stamp.model_dump_json(), PREPROCESS: preprocess.model_dump_json()}


def _require_onnx(generation: Generation) -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"exporting to ONNX needs the packages {', '.join(_PACKAGES)}, of which {name} does not import "
                f"({str(error).splitlines()[0]}): pip install bct-pipeline[export], or leave onnx out of --formats"
            ) from None
    if (size := (generation.path / BACKBONE).stat().st_size) > _ONNX_LIMIT:
        raise ConfigError(
            f"generation {generation.record.name!r} has {size / 2**30:.1f} GiB of weights, an ONNX file holds 2: "
            "leave onnx out of --formats"
        )
