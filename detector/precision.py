"""Numerical precision: autocast, and the meaning of `precision: auto` on this machine."""

from __future__ import annotations

from typing import Literal

import torch

from detector.config import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context for a precision."""
    dtype = torch.bfloat16 if precision == "fp32" else DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def resolve_precision(precision: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """Replace "auto" by bf16 if the hardware has instructions for it, else by fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bf16 products (emulation is several times slower)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:  # not Linux
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
