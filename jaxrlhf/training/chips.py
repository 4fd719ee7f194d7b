"""What one chip can do, by name: the ceilings that rates are measured against.

Dense figures of the makers' data sheets, typed from memory: check the one that you rely on.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    product: float  # FLOP/s of weight products with bfloat16 operands, without sparsity
    product_float32: float  # the same of float32 operands at jax's default precision: TF32 on a GPU, bfloat16 passes on a TPU
    bandwidth: float  # bytes/s between memory and cores
    memory: int  # bytes

    def rate(self, dtype: str) -> float:
        """FLOP/s of products with operands of this type."""
        return self.product if dtype == "bfloat16" else self.product_float32


# Sources: NVIDIA H100, H200 and A100 data sheets (SXM, 80 GB A100), the figures with sparsity halved; Google Cloud TPU
# documentation, pages "TPU v5e", "TPU v5p", "TPU v6e".
CHIPS = {
    "A100": Chip("A100", 312e12, 156e12, 2.039e12, 80 * 10**9),
    "H100": Chip("H100", 989.4e12, 494.7e12, 3.35e12, 80 * 10**9),
    "H200": Chip("H200", 989.4e12, 494.7e12, 4.8e12, 141 * 10**9),
    "v5e": Chip("v5e", 197e12, 197e12, 0.819e12, 16 * 2**30),
    "v5p": Chip("v5p", 459e12, 459e12, 2.765e12, 95 * 2**30),
    "v6e": Chip("v6e", 918e12, 918e12, 1.64e12, 32 * 2**30),
}

# What jax calls them (`device_kind`), the longer name first where one begins another.
KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H200": "H200",
    "NVIDIA H100": "H100",
    "NVIDIA A100": "A100",
}


def named(name: str) -> Chip:
    """The chip of this name.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    found = {known.lower(): chip for known, chip in CHIPS.items()}
    if name.lower() not in found:
        raise ValueError(f"chip '{name}' is not known: choose from {', '.join(CHIPS)}, or cpu, which is measured")
    return found[name.lower()]


def of(device: Any) -> Chip | None:
    """The chip that a device of jax is; None where its kind is not in the table (a CPU, whose rate no name tells)."""
    kind = str(getattr(device, "device_kind", ""))
    return next((CHIPS[name] for start, name in KINDS.items() if kind.startswith(start)), None)
