"""Figures as lines to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row: times, ratio and whether it means anything, memory, share of what the machine can do."""
    lines = []
    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        what = f"{row['case']}, {row['row']}"
        if "size" in row:
            height, width = row["size"]
            what += f", {row['batch']} x {height}x{width}, {row['boxes']} boxes, {row['classes']} classes"
        parts = [f"ours {_time(ours)}"]
        if peer is not None:
            parts += [f"peer {_time(peer)}", verdict(row["ratio"], row["noise"])]
        if peer is not None and "peak_mb" in ours:
            parts.append(f"memory {ours['peak_mb']:.0f} against {peer['peak_mb']:.0f} MB")
        if "kept" in row:
            parts.append(f"ours from kept pictures {_time(row['kept'])}")
        if "share_of_peak" in ours:
            share = f"{ours['share_of_peak']:.0%}"
            share += f" (peer {peer['share_of_peak']:.0%})" if peer is not None else ""
            parts.append(f"{share} of {row['peak_tflops']:.3g} TFLOP/s")
        lines.append(f"{what}\n    " + ", ".join(parts))
        lines += [f"    {milliseconds:9.3f} ms  {name[:100]}" for name, milliseconds in row.get("slowest", [])[:25]]
    return "\n".join(lines)


def verdict(ratio: float, noise: float) -> str:
    """A ratio of times in words; one within the noise is none."""
    if max(ratio, 1 / ratio) - 1 <= noise:
        return f"no difference (ratio {ratio:.2f}, noise {noise:.1%})"
    return f"ratio {ratio:.2f} (noise {noise:.1%})"


def _time(one: dict[str, Any]) -> str:
    speed = f", {one['images_per_second']:.1f} images/s" if "images_per_second" in one else ""
    return f"{one['median_ms']:.2f} ms +-{one['spread']:.0%}{speed}"
