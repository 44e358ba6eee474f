"""Exports: what is written gives the generation's embeddings from plain pixels, says whose they are, or is refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.export import main
from pipeline.data.decoding import Decoder
from pipeline.data.preprocess import AugmentConfig, PreprocessConfig
from pipeline.data.reading import Work
from pipeline.errors import ConfigError, DataError, GenerationError
from pipeline.export.exported import read_exported_stamp
from pipeline.export.exporting import FORMATS, PREPROCESS, Format, export, parse_formats
from pipeline.generation import BACKBONE, Generation, GenerationRecord, complete, seal, write_classifier_part
from pipeline.identities import IdentityTable
from pipeline.model.backbones import BackboneConfig, build_backbone
from pipeline.model.margins import MarginConfig
from pipeline.stamp import STAMP, Stamp
from tests import pictures

ROWS = 4
SMALL = BackboneConfig(name="small", embedding_dim=6, image_size=8, width=4)
MODELS = {
    "small": SMALL,
    "relu": SMALL.model_copy(update={"relu": True, "embedding_dim": 24}),
    "colour": SMALL.model_copy(update={"channels": 3, "embedding_dim": 33, "image_size": 13}),
    "iresnet18": BackboneConfig(name="iresnet18", embedding_dim=16, image_size=32),
}


def images(preprocess: PreprocessConfig) -> list[bytes]:
    """Encoded, of no size that a backbone takes; a smooth one and noise."""
    drawn = [pictures.ramp(), pictures.ramp().rotate(90), pictures.ramp().rotate(180), pictures.noise(3, side=40)]
    return [pictures.encode(image.convert("L" if preprocess.channels == 1 else "RGB")) for image in drawn]


def decoded(preprocess: PreprocessConfig) -> Tensor:
    """(N, C, H, W) as the product's own decoder gives them."""
    raws, numbers = images(preprocess), np.zeros(4, np.int64)
    decoder = Decoder(preprocess, AugmentConfig(), 0, len(raws), 1, torch.device("cpu"))
    [(_, images_NCHW)] = decoder.run([Work(0, numbers, numbers, numbers, raws)])
    return images_NCHW.contiguous()


def resized(preprocess: PreprocessConfig) -> Tensor:
    """(N, C, S, S) pixels, as the docs tell a user to make them."""
    opened = [Image.open(io.BytesIO(raw)) for raw in images(preprocess)]
    small = [image.resize((preprocess.resize,) * 2, Image.Resampling.BILINEAR) for image in opened]
    pixels = [np.asarray(image, np.float32).reshape(*image.size, -1).transpose(2, 0, 1) for image in small]
    return torch.from_numpy(np.stack(pixels))


def record_of(config: BackboneConfig | None, name: str = "v1") -> GenerationRecord:
    side = 8 if config is None else config.image_size
    preprocess = PreprocessConfig(size=side, resize=side + 3, channels=config.channels if config else 1, mean=120.0)
    return GenerationRecord(
        family="test",
        name=name,
        backbone=config,
        preprocess=preprocess if config else None,
        dim=None if config else 6,
        margin=MarginConfig(name="norm_softmax"),
        identities=ROWS,
        config={},
        config_digest="c",
        data_digest="d",
        code_version="test",
    )


def make(folder: Path, config: BackboneConfig, shift: float = 0.0) -> Generation:
    """A generation with statistics of its own in each BatchNorm, as training leaves them.

    Args:
        folder: where it is made.
        config: of its backbone.
        shift: added to the features before the last BatchNorm, and to the mean that it subtracts.
    """
    record = record_of(config)
    assert record.preprocess is not None
    building = folder / ".building"
    building.mkdir(parents=True)
    write_classifier_part(building, torch.randn(ROWS, config.embedding_dim), 0, ROWS)
    torch.manual_seed(0)
    backbone = build_backbone(config)
    seen_NCHW = decoded(record.preprocess)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # the statistics of what it has seen, not a tenth of them
    backbone(seen_NCHW)  # in training mode
    state = backbone.state_dict()
    state["head.feature_norm.bias"].normal_()
    state["head.project.bias"] += shift
    state["head.feature_norm.running_mean"] += shift
    return seal(building, folder / "v1", record, state, IdentityTable.from_keys("abcd"), seen_NCHW)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Generation:
    return make(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Generation, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    generation = make(folder, MODELS[request.param])
    made = export(generation, folder / "out" / "deep")
    assert [one.path.name for one in made] == ["v1.onnx", "v1.pt2", "v1.safetensors"]
    assert sorted(path.name for path in (folder / "out" / "deep").iterdir()) == sorted(one.path.name for one in made)
    for one in made:
        assert 1 - 1e-6 < one.cosine <= 1
        assert 0 <= one.error < 1e-5
    return generation, folder / "out" / "deep"


def embeddings(generation: Generation, images_NCHW: Tensor) -> Tensor:
    with torch.no_grad():
        return F.normalize(generation.load_backbone()(images_NCHW))


@pytest.mark.parametrize("batch", [1, 2, 5, 17])
def test_pixels_become_the_generations_unit_vectors_at_any_batch_size(
    exported: tuple[Generation, Path], batch: int
) -> None:
    generation, folder = exported
    preprocess = generation.record.preprocess
    assert preprocess is not None
    generator = torch.Generator().manual_seed(batch)
    shape = (batch, preprocess.channels, preprocess.resize, preprocess.resize)
    pixels = torch.randint(
        256, shape, generator=generator
    ).float()  # the margin must not matter, but where it lies must
    first, stop = preprocess.margin, preprocess.margin + preprocess.size
    expected_ND = embeddings(generation, (pixels[:, :, first:stop, first:stop] - preprocess.mean) / preprocess.std)

    session = onnxruntime.InferenceSession(folder / "v1.onnx", providers=["CPUExecutionProvider"])
    of_onnx_ND = torch.from_numpy(session.run(["embeddings"], {"pixels": pixels.numpy()})[0])
    torch.testing.assert_close(of_onnx_ND, expected_ND, atol=1e-5, rtol=0)
    of_torch_ND = torch.export.load(folder / "v1.pt2").module()(pixels)
    torch.testing.assert_close(of_torch_ND, expected_ND, atol=1e-5, rtol=0)
    torch.testing.assert_close(of_onnx_ND.norm(dim=1), torch.ones(batch), atol=1e-5, rtol=0)


def test_what_the_docs_tell_a_user_to_do_gives_what_the_product_gives(exported: tuple[Generation, Path]) -> None:
    """Pillow and onnxruntime against DALI and torch; noise makes the most of every level of a pixel."""
    generation, folder = exported
    preprocess = generation.record.preprocess
    assert preprocess is not None
    pixels, seen = resized(preprocess), decoded(preprocess)
    first, stop = preprocess.margin, preprocess.margin + preprocess.size
    levels = pixels[:, :, first:stop, first:stop] - (seen * preprocess.std + preprocess.mean)
    assert float(levels.abs().max()) < 1.1
    session = onnxruntime.InferenceSession(folder / "v1.onnx", providers=["CPUExecutionProvider"])
    theirs_ND = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
    ours_ND = embeddings(generation, seen)
    assert float(F.cosine_similarity(theirs_ND, ours_ND).min()) > 0.99
    assert float((ours_ND[:-1] * theirs_ND[1:]).sum(1).max()) < 0.9, "else they would be all alike"


def test_every_file_says_what_made_it(exported: tuple[Generation, Path]) -> None:
    generation, folder = exported
    stamp = Stamp.of(generation)
    assert read_exported_stamp(folder / "v1.onnx") == stamp
    assert read_exported_stamp(folder / "v1.pt2") == stamp
    assert read_exported_stamp(folder / "v1.safetensors") == Stamp.of(generation, normalised=False)
    told = onnxruntime.InferenceSession(folder / "v1.onnx").get_modelmeta().custom_metadata_map
    assert Stamp.parse(told[STAMP], "a reader that has onnxruntime alone") == stamp
    assert PreprocessConfig.model_validate_json(told[PREPROCESS]) == generation.record.preprocess
    extra = {STAMP: "", PREPROCESS: ""}
    torch.export.load(folder / "v1.pt2", extra_files=extra)
    assert Stamp.parse(extra[STAMP], "torch's own reader") == stamp


def test_onnx_file_is_plain(exported: tuple[Generation, Path]) -> None:
    generation, folder = exported
    model: Any = onnx.load(folder / "v1.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {one.domain for one in model.opset_import} <= {"", "ai.onnx"}
    assert [one.name for one in model.graph.input] == ["pixels"]
    sides = [one.dim_param or one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
    preprocess = generation.record.preprocess
    assert preprocess is not None
    assert sides == ["batch", preprocess.channels, preprocess.resize, preprocess.resize]
    dims = [one.dim_param or one.dim_value for one in model.graph.output[0].type.tensor_type.shape.dim]
    assert dims == ["batch", generation.record.embedding_dim]


def test_no_image_of_the_selftest_and_no_path_of_ours_travels_along(exported: tuple[Generation, Path]) -> None:
    _, folder = exported
    for path in folder.iterdir():
        assert str(Path(__file__).parents[2]).encode() not in path.read_bytes(), path.name
        assert b"exporting.py" not in path.read_bytes(), path.name
    [[example], _] = torch.export.load(folder / "v1.pt2").example_inputs
    assert not example.any()


def test_weights_are_those_of_the_artefact(exported: tuple[Generation, Path]) -> None:
    generation, folder = exported
    ours = safetensors.torch.load_file(generation.path / BACKBONE)
    theirs = safetensors.torch.load_file(folder / "v1.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_export_that_disagrees_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    """A model of which float32 keeps nothing: ONNX's exporter joins the two terms that cancel, and is right."""
    generation = make(tmp_path, SMALL, shift=3e8)
    assert generation.reproduce_selftest() > 0.9999
    with pytest.raises(GenerationError, match=r"v1\.onnx was not written: in batches of 1 .* disagrees") as error:
        export(generation, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    [made] = export(generation, tmp_path / "out", ["torch"])  # it computes as the backbone does
    assert made.cosine > 0.9999
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v1.pt2"]


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    generation = make(tmp_path, SMALL)
    torch.manual_seed(9)
    safetensors.torch.save_file(build_backbone(SMALL).state_dict(), generation.path / BACKBONE)
    with pytest.raises(GenerationError, match=f"{BACKBONE} has changed"):
        export(generation, tmp_path / "out", ["safetensors"])
    assert not (tmp_path / "out").exists()


def test_generation_without_a_backbone_is_refused(tmp_path: Path) -> None:
    building = tmp_path / ".building"
    building.mkdir()
    write_classifier_part(building, torch.randn(ROWS, 6), 0, ROWS)
    with pytest.raises(GenerationError, match="has no backbone to embed with"):
        export(complete(building, tmp_path / "v0", record_of(None, "v0")), tmp_path / "out")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_name_the_extra(
    small: Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does to forbid an import
    with pytest.raises(ConfigError, match=rf"of which {package} does not import .*\[export\]"):
        export(small, tmp_path)
    assert not list(tmp_path.iterdir())
    formats: list[Format] = ["safetensors"]
    assert len(export(small, tmp_path, formats)) == 1, "which needs none of them"


def test_folder_that_takes_no_files_is_named(small: Generation, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"v1\.safetensors cannot be written .*--out"):
        export(small, tmp_path / "out", ["safetensors"])


def test_files_without_a_stamp_are_refused(small: Generation, tmp_path: Path) -> None:
    weights = tmp_path / "v1.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, weights)
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "v1.pt2")
    (tmp_path / "v1.onnx").write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    for suffix in (".safetensors", ".pt2", ".onnx"):
        with pytest.raises(DataError, match=rf"v1\{suffix} has no stamp .*jobs/export\.py"):
            read_exported_stamp(tmp_path / f"v1{suffix}")
        (tmp_path / f"v1{suffix}").write_bytes(b"\xff" * 100)
        with pytest.raises(DataError, match=rf"v1\{suffix} cannot be read"):
            read_exported_stamp(tmp_path / f"v1{suffix}")
        with pytest.raises(DataError, match=rf"v2\{suffix} is missing"):
            read_exported_stamp(tmp_path / f"v2{suffix}")
    with pytest.raises(DataError, match="is no exported model"):
        read_exported_stamp(small.path / "generation.json")


# --- the job ----------------------------------------------------------------------------------------------------------


def job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/export.py", *arguments])
    return main()


def test_job_exports_what_lies_anywhere_and_what_a_run_has_trained(
    small: Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    tail = ("--out", str(out), "--formats", "safetensors")
    assert job(monkeypatch, "--artefact", str(small.path), *tail) == 0
    assert capsys.readouterr().out.startswith(f"{out / 'v1.safetensors'}  cosine 1.000000 to the backbone's embeddings")
    (out / "v1.safetensors").write_bytes(b"older")
    config = tmp_path / "run.yaml"
    run = tmp_path / "home" / "runs" / "test" / "generations"
    run.mkdir(parents=True)
    (run / "v1").symlink_to(small.path)
    config.write_text(json.dumps({"name": "test", "home": str(tmp_path / "home"), "generations": {"v1": {}}}))
    assert job(monkeypatch, "--config", str(config), "--generation", "v1", *tail) == 0
    assert read_exported_stamp(out / "v1.safetensors") == Stamp.of(small, normalised=False)
    assert job(monkeypatch, "--config", str(config), "--generation", "v7", *tail) == 2
    assert "no generation at" in capsys.readouterr().err
    assert job(monkeypatch, "--artefact", str(small.path), "--out", str(out), "--formats", "onxx") == 2
    assert capsys.readouterr().err == "error: --formats names 'onxx': choose of onnx, torch, safetensors\n"


def test_formats() -> None:
    assert parse_formats("safetensors,onnx") == ("onnx", "safetensors")
    assert parse_formats("onnx,torch,safetensors") == FORMATS
