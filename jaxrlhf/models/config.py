"""The shape of a transformer."""

from __future__ import annotations

import dataclasses
from typing import Literal

GATED = ("swiglu", "geglu")

Remat = Literal["none", "dots", "attention", "layers"]
"""What of each layer the backward pass finds stored, from most to least memory: `none` is computed again, all is stored; of
`dots` the results of weight products and of attention are stored, and what lies between them (norms, gates, rotations) is
computed again; of `attention` its result alone; of `layers` nothing but what went in."""


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
    mlp: Literal["swiglu", "gelu", "gelu_exact", "geglu"] = "swiglu"  # gelu and geglu in the tanh form of GPT-2
    tied_head: bool = True  # logits from the embedding table
    dtype: Literal["float32", "bfloat16"] = "float32"  # operands of weight products; sums and all else are float32
    scan: bool = True  # one compiled layer run in a loop, in place of L copies of it; a matter of speed only
    remat: Remat = "layers"  # what the backward pass computes again in place of storing it; a matter of speed and memory only
    dropout: float = 0.0  # on the residual branches, to the next 1/256; only where a dropout key is passed
    experts: int = 0  # of each layer's MLP, `mlp_width` wide each (`models/experts.py`); 0: one MLP that all tokens share
    experts_per_token: int = 0
    renormalise_experts: bool = True  # the weights of a token's experts sum to 1; else they are those of the softmax over all
    # What published architectures differ in; `models/hf.py` sets these.
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before it is turned
    norm_plus_one: bool = False  # the scales of norms are stored less 1
    post_norms: bool = False  # a norm after each branch as well, before it is added
    parallel: bool = False  # attention and MLP read the same state and are added at once
    embed_scale: float = 1.0  # times the embeddings
    attention_scale: float | None = None  # times the products of queries and keys; None: head_width ** -0.5
    attention_cap: float | None = None  # scores s become cap * tanh(s / cap)
    logit_cap: float | None = None  # logits likewise
    windows: tuple[int, ...] = ()  # of each layer: how many tokens a query sees, itself included; 0: all
    rotary_width: int | None = None  # leading part of each head that rope turns; None: all of it
    rope_local_theta: float | None = None  # of the layers with a window, without scaling; None: as the others
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0  # by which scaling stretches a wavelength
    rope_original_length: int = 8192  # llama3: the length before stretching
    rope_low: float = 1.0  # llama3: wavelengths above original length / low are stretched whole
    rope_high: float = 4.0  # llama3: those below original length / high are left alone

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(self.windows))  # JSON has lists only
        if isinstance(self.remat, bool):  # models that were saved before there were names
            object.__setattr__(self, "remat", "layers" if self.remat else "none")
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_width", "mlp_width", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}: each key/value head serves a whole group"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even with positions='rope', which rotates pairs")
        if self.rotary_width is not None and (self.rotary_width % 2 or not 0 < self.rotary_width <= self.head_width):
            raise ValueError(f"rotary_width={self.rotary_width} must be even and at most head_width={self.head_width}")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise ValueError(f"windows={self.windows} must be empty or hold layers={self.layers} numbers, 0 or more")
        for name in ("embed_scale", "attention_scale", "attention_cap", "logit_cap", "rope_local_theta", "rope_factor"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.rope_scaling == "llama3" and not 0 < self.rope_low < self.rope_high:
            raise ValueError(f"rope_low={self.rope_low} must be positive and below rope_high={self.rope_high}")
        if self.norm == "layer" and self.norm_plus_one:
            raise ValueError("norm_plus_one=True goes with norm='rms' only")
        if self.experts < 0 or not min(self.experts, 1) <= self.experts_per_token <= self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be in 1 .. experts={self.experts}, or both 0: no experts"
            )
        if self.experts and (self.mlp not in GATED or self.mlp_bias):
            raise ValueError(
                f"experts={self.experts} go with a gated MLP ({', '.join(GATED)}) without mlp_bias, not with mlp='{self.mlp}', "
                f"mlp_bias={self.mlp_bias}"
            )
        if not 0 <= self.dropout < 0.998:  # in steps of 1/256, 1 excluded
            raise ValueError(f"dropout={self.dropout} must be in [0, 0.998)")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}='{getattr(self, name)}' must be one of {', '.join(choices)}")


_CHOICES = {
    "norm": ("rms", "layer"),
    "positions": ("rope", "learned"),
    "mlp": ("swiglu", "gelu", "gelu_exact", "geglu"),
    "rope_scaling": ("none", "linear", "llama3"),
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "attention", "layers"),
}
