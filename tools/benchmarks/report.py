"""Rows of figures as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows: times, the ratio and whether it exceeds the noise, memory, share of the machine's peak."""
    lines = []
    for row in rows:
        ours, peer = row["ours"], row.get("peer")
        title = f"{row['case']}, {row['row']}"
        if "size" in row:
            height, width = row["size"]
            title += f", {row['batch']} x {height}x{width}, {row['boxes']} boxes, {row['classes']} classes"
        parts = [f"ours {_time(ours)}"]
        if peer is not None:
            parts += [f"peer {_time(peer)}", verdict(row["ratio"], row["noise"])]
        if "peak_mb" in ours and peer is not None and "peak_mb" in peer:
            parts.append(f"memory {ours['peak_mb']:.0f} and {peer['peak_mb']:.0f} MB")
        if "cached" in row:
            parts.append(f"ours with cached images {_time(row['cached'])}")
        if "share_of_peak" in ours:
            share = f"{ours['share_of_peak']:.0%}"
            share += f" (peer {peer['share_of_peak']:.0%})" if peer is not None else ""
            parts.append(f"{share} of {row['peak_tflops']:.3g} TFLOP/s")
        lines.append(f"{title}\n    " + ", ".join(parts))
        lines += [f"    {milliseconds:9.3f} ms  {name[:100]}" for name, milliseconds in row.get("slowest", [])[:25]]
    return "\n".join(lines)


def verdict(ratio: float, noise: float) -> str:
    """Describe a ratio of times; within the noise it is no difference."""
    if max(ratio, 1 / ratio) - 1 <= noise:
        return f"no difference (ratio {ratio:.2f}, noise {noise:.1%})"
    return f"ratio {ratio:.2f} (noise {noise:.1%})"


def _time(one: dict[str, Any]) -> str:
    speed = f", {one['images_per_second']:.1f} images/s" if "images_per_second" in one else ""
    return f"{one['median_ms']:.2f} ms +-{one['spread']:.0%}{speed}"
