"""Results in a few lines."""

from __future__ import annotations

from typing import Any


def as_text(result: dict[str, Any]) -> str:
    """What a person wants to know of a result."""
    ways = {
        "classifier": _classifier,
        "loader": _loader,
        "evaluation": _evaluation,
        "embed": _embed,
        "backfill": _backfill,
        "checkpoint": _checkpoint,
        "scaling": _scaling,
        "step": _step,
    }
    return ways[result["benchmark"]](result)


def _classifier(result: dict[str, Any]) -> str:
    lines = [f"{'':<10}{'step':>10}{'forward':>10}{'backward':>10}{'update':>10}{'extra memory':>15}"]
    for name in result["step_ms"]:
        times = "".join(
            f"{result[key][name]:>7.0f} ms" for key in ("step_ms", "forward_ms", "backward_ms", "update_ms")
        )
        lines.append(f"{name:<10}{times}{result['extra_bytes'][name] / 1e6:>12,.0f} MB")
    lines.append(
        f"weights {result['weight_bytes'] / 1e6:,.0f} MB; a parent costs {result['parent_over_new']:.2f} of a step"
    )
    if result["ratio_step"] is not None:
        lines.append(f"of eager's time {result['ratio_step']:.3f}, of its extra memory {result['ratio_extra']:.4f}")
    lines.append(
        f"extra memory {result['extra_over_weights']:.1%} of the weights; "
        f"{result['flops_per_s'] / 1e9:,.0f} GFLOP/s, {result['fraction_of_matmul']:.0%} of a large matrix product; "
        f"{result['bytes_per_s'] / 1e9:,.1f} GB/s, {result['fraction_of_copy']:.0%} of a large copy"
    )
    return "\n".join(lines)


def _loader(result: dict[str, Any]) -> str:
    lines = [f"{'':<16}{'images/s':>10}{'CPU ms/image':>14}"]
    for way, speed in result["images_per_s"].items():
        lines.append(f"{way:<16}{speed:>10,.0f}{result['cpu_ms_per_image'][way]:>14.3f}")
    lines.append(
        f"of DALI's decoding alone {result['ratio_decode']:.2f}, of its reader {result['ratio_reader']:.2f}; "
        f"{result['ratio_pil']:.2f} times WebDataset with Pillow"
    )
    return "\n".join(lines)


def _embed(result: dict[str, Any]) -> str:
    lines = [f"{'':<16}{'images/s':>10}"]
    lines += [f"{way:<16}{speed:>10,.0f}" for way, speed in result["images_per_s"].items()]
    lines.append(f"embedding runs at {result['ratio_forward']:.3f} of the model's forward alone")
    return "\n".join(lines)


def _backfill(result: dict[str, Any]) -> str:
    lines = [f"{'rank-1, %':<24}{'start':>8}{'lowest':>8}{'half':>8}{'end':>8}{'area':>8}"]
    for order, curves in result["rank1"].items():
        for name, curve in curves.items():
            told = (curve[0], min(curve), curve[len(curve) // 2], curve[-1], result["area"][order][name])
            lines.append(f"{f'{order}, {name}':<24}" + "".join(f"{100 * value:>8.1f}" for value in told))
    return "\n".join(lines)


def _checkpoint(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"saving {result['stall_bytes'] / 1e9:,.1f} GB stalls training {result['stall_s']:.2f} s (the first time "
            f"{result['first_stall_s']:.2f} s), otherwise {result['sync_s']:.2f} s: ratio {result['stall_ratio']:.3f}",
            f"re-sharding {result['bytes'] / 1e9:,.1f} GB from {result['writers']} to {result['readers']} ranks takes "
            f"{result['resume_s']:.1f} s, a plain copy {result['copy_s']:.1f} s: at {result['reshard_over_copy']:.2f} "
            "of its speed",
            f"memory of a rank beyond its own part {result['reshard_extra_bytes'] / (1 << 20):,.0f} MiB",
        ]
    )


def _step(result: dict[str, Any]) -> str:
    times = result["step_ms"]
    rounds = ", ".join(f"{one['product'] / one['bare'] - 1:+.1%}" for one in result["rounds"])
    return (
        f"a step takes {times['product']:.1f} ms, bare {times['bare']:.1f} ms: overhead {result['overhead']:+.1%} "
        f"(rounds: {rounds}); of that the loader {result['overhead_of_loader']:+.1%}"
    )


def _scaling(result: dict[str, Any]) -> str:
    lines = [f"{'processes':<12}{'a step':>12}{'without':>12}{'efficiency':>12}{'in collectives':>16}"]
    for world, step in result["step_ms"].items():
        phases = ("forward", "losses", "backward", "update")
        collectives = sum(ms for part, ms in result["parts_ms"][world].items() if part not in phases)
        times = f"{step:>9,.0f} ms{result['alone_ms'][world]:>9,.0f} ms"
        lines.append(f"{world:<12}{times}{result['efficiency'][world]:>12.3f}{collectives:>13,.0f} ms")
    lines.append("efficiency: time of as many processes without communication over the time with it")
    return "\n".join(lines)


def _evaluation(result: dict[str, Any]) -> str:
    lines = [f"{'':<16}{'seconds':>10}{'extra memory':>15}"]
    for way, seconds in result["seconds"].items():
        lines.append(f"{way:<16}{seconds:>10,.1f}{result['extra_bytes'][way] / 1e6:>12,.0f} MB")
    if result["task"] == "verification":
        lines.append(
            f"of the ROC curve's time {result['ratio']:.3f}; TARs differ by at most "
            f"{result['largest_difference_in_pairs']} of {result['genuine']:,} genuine pairs"
        )
    else:
        lines.append(
            f"of FAISS's time {result['ratio']:.2f}, of its search alone {result['ratio_faiss_search']:.2f}; "
            f"its first item is not the best for {result['faiss_first_below_best']} of {result['queries']:,} queries"
        )
    return "\n".join(lines)
