"""The shape of a transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer. JSON: `dataclasses.asdict(config)` and `TransformerConfig(**values)`."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # fewer than `heads`: grouped-query attention
    head_width: int
    mlp_width: int
    max_length: int  # longest row, prompt and response together
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    positions: Literal["rope", "learned"] = "rope"
    rope_theta: float = 1e4
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    tied_head: bool = True  # logits from the embedding table
    dtype: Literal["float32", "bfloat16"] = "float32"  # operands of weight products; sums and all else are float32
    scan: bool = True  # one compiled layer run in a loop, in place of L copies of it; a matter of speed only
    remat: bool = True  # recompute activations in the backward pass instead of storing them; a matter of speed only
    dropout: float = 0.0  # on the residual branches, to the next 1/256; only where a dropout key is passed

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}: each key/value head serves a whole group"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even with positions='rope', which rotates pairs")
        if not 0 <= self.dropout < 0.998:  # in steps of 1/256, 1 excluded
            raise ValueError(f"dropout={self.dropout} must be in [0, 0.998)")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}='{getattr(self, name)}' must be one of {', '.join(choices)}")


_CHOICES = {
    "norm": ("rms", "layer"),
    "positions": ("rope", "learned"),
    "mlp": ("swiglu", "gelu"),
    "dtype": ("float32", "bfloat16"),
}
