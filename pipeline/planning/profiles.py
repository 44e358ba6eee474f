"""What GPUs are taken to be able to do: data sheets, assumed shares of them, and constants fitted to published runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuProfile:
    """Speeds of one kind of GPU.

    Attributes:
        source: where they come from, for people.
        matmul_flops: FLOP/s of a large matrix product by precision ("bf16" is half precision, whichever the GPU has).
        copy_bytes: bytes/s of its memory.
        bandwidth: bytes/s each way between GPUs of a node that a collective reaches.
        backbone_fraction: share of the product's FLOP/s that a backbone reaches, data movement and launches included.
        tiles_fraction: share that the classifier's tiles reach.
        eager_fraction: share that public code reaches, which writes out all logits.
        eager_row_bytes: what public code's sampling costs of a row of the rank, sampled or not, as memory traffic.
    """

    source: str
    matmul_flops: dict[str, float]
    copy_bytes: float
    bandwidth: float
    backbone_fraction: float
    tiles_fraction: float
    eager_fraction: float
    eager_row_bytes: float


# A collective by NCCL reaches about four fifths of what NVLink's data sheet has each way (150, 300, 450 GB/s): assumed.
# Of the V100, `fit` in pipeline/planning/published.py made the last three numbers; the others borrow the public code's.
_V100_EAGER = {"eager_fraction": 0.0437, "eager_row_bytes": 17_060.0}
PROFILES = {
    "v100-32g": GpuProfile(
        source="an NVIDIA V100 SXM2's data sheet; backbone and public code fitted to arcface_torch's published speeds",
        matmul_flops={"bf16": 125e12, "fp32": 15.7e12},
        copy_bytes=0.9e12,
        bandwidth=120e9,
        backbone_fraction=0.1939,
        tiles_fraction=0.5,
        **_V100_EAGER,
    ),
    "a100-80g": GpuProfile(
        source="an NVIDIA A100 80 GB's data sheet (dense, without TF32), and assumed shares of it",
        matmul_flops={"bf16": 312e12, "fp32": 19.5e12},
        copy_bytes=2.0e12,
        bandwidth=240e9,
        backbone_fraction=0.4,
        tiles_fraction=0.5,
        **_V100_EAGER,
    ),
    "h100-80g": GpuProfile(
        source="an NVIDIA H100 SXM's data sheet (dense, without TF32), and assumed shares of it",
        matmul_flops={"bf16": 989e12, "fp32": 67e12},
        copy_bytes=3.35e12,
        bandwidth=360e9,
        backbone_fraction=0.3,
        tiles_fraction=0.4,
        **_V100_EAGER,
    ),
}
