"""Rotary positions: the angles by which query and key are turned."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrlhf.models.config import TransformerConfig

Rotation = tuple[jax.Array, jax.Array]  # cos and sin [..., 1, W/2]


def rotations(config: TransformerConfig, position: Int[Array, "*s"]) -> tuple[Rotation, ...] | None:
    """cos and sin [..., 1, W/2] of rotary positions: of all layers, or of those without a window and those with one.

    None with learned positions. Source: Su et al. 2021, arXiv 2104.09864; two bases: Gemma Team 2025, arXiv 2503.19786.
    """
    if config.positions == "learned":
        return None
    half = (config.rotary_width or config.head_width) // 2
    turns = -jnp.arange(half, dtype=jnp.float32) / half
    frequencies = [stretched(config, config.rope_theta**turns)]
    if config.rope_local_theta is not None:
        frequencies.append(config.rope_local_theta**turns)
    angles = [position[..., None, None].astype(jnp.float32) * frequency for frequency in frequencies]
    return tuple((jnp.cos(angle), jnp.sin(angle)) for angle in angles)


def stretched(config: TransformerConfig, frequency: Any) -> Any:
    """Frequencies for rows longer than the model was first trained on: linear interpolation (Chen et al. 2023, arXiv
    2306.15595), or that of Llama 3.1 (meta-llama/llama-models `apply_scaling`), which spares short wavelengths."""
    if config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    waves = config.rope_original_length * frequency / (2 * math.pi)  # that fit into the original length
    spared = jnp.clip((waves - config.rope_low) / (config.rope_high - config.rope_low), 0, 1)
    return spared * frequency + (1 - spared) * frequency / config.rope_factor


def of_layer(rotations: tuple[Rotation, ...] | None, window: Any) -> Rotation | None:
    """The rotation of a layer with this window."""
    if rotations is None:
        return None
    if len(rotations) == 1 or window is None:
        return rotations[0]
    return jax.tree.map(lambda whole, local: jnp.where(window > 0, local, whole), *rotations)


def rotate(x: Float[Array, "*s h e"], rotation: Rotation | None) -> Float[Array, "*s h e"]:
    """Turn the pairs (x_i, x_{i+W/2}) of the first W entries, which is the order of Llama's published weights."""
    if rotation is None:
        return x
    cos, sin = rotation
    width = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :width], 2, axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate(turned if width == x.shape[-1] else [*turned, x[..., width:]], axis=-1)
