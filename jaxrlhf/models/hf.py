"""Checkpoints of Hugging Face transformers in and out, without torch.

A tensor is read from its safetensors file slice by slice, as each device holds it: beside the parameters, the host holds at
most one device's part of one of our leaves. What is written, `AutoModelForCausalLM` or, for a reward model,
`AutoModelForSequenceClassification` loads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxrlhf.core import sharding
from jaxrlhf.core.sharding import ParamSpec
from jaxrlhf.models import hf_files, int8, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.hf_config import CLASSES, config_from_hf
from jaxrlhf.models.hf_export import config_to_hf
from jaxrlhf.models.hf_files import Stored
from jaxrlhf.models.hf_layout import SCORE, Rule, expected, flat, join, rules, split, stacked_axes

CONFIG = "config.json"

# In the files of earlier releases: masks and tables, not weights.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


# -------------------------------------------------------------------------------------------------------------- reading


def read_config(folder: Path | str) -> dict[str, Any]:
    """`config.json` of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not readable.
    """
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; give the folder of a Hugging Face checkpoint")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds {type(values).__name__}, not the settings of a model; download it again")
    return values


def is_reward_model(values: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in values.get("architectures") or ())


def load(folder: Path | str, mesh: Mesh, dtype: str = "float32") -> tuple[dict[str, Any], TransformerConfig]:
    """Parameters of this type on the mesh, and their configuration. A sequence classifier with one label gives a reward
    model's parameters, as `rewards/model.py` has them, its score read at the last token.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the architecture is not supported, or a tensor is missing, not expected or of another shape.
    """
    folder, values = Path(folder), read_config(folder)
    config = config_from_hf(values)
    places, trunk = hf_files.tensors(folder), rules(config, values["model_type"])
    reward = is_reward_model(values)
    if not any(name.startswith(trunk[0].tensor.split(".")[0] + ".") for name in places):
        trunk = [dataclasses.replace(rule, tensor=_bare(rule.tensor)) for rule in trunk]  # saved without its head
    if reward:  # in place of the head
        trunk = [rule for rule in trunk if rule.leaves != ("head",)]
    check(folder, places, expected(trunk, config, reward), config.tied_head or reward)
    params = place(places, trunk, config, mesh, dtype)
    if not reward:
        return params, config
    if not config.tied_head:
        spec = transformer.param_specs(config)["head"]
        params["head"] = jax.device_put(np.zeros(spec.shape, dtype), sharding.shardings({"head": spec}, mesh)["head"])
    score = places[SCORE].read(())[0].astype(np.float32)
    offset = np.float32(values.get("score_offset", 0.0))
    own = {"head": {"weight": score, "bias": np.float32(0)}, "gain": np.float32(1), "bias": offset}
    return {"trunk": params} | jax.device_put(own, sharding.replicated(mesh)), config


def place(places: dict[str, Stored], trunk: list[Rule], config: TransformerConfig, mesh: Mesh, dtype: str) -> dict[str, Any]:
    """Parameters of a trunk, every part read when the device that holds it asks for it."""
    specs = flat(transformer.param_specs(config))
    shardings, params = flat(sharding.shardings(transformer.param_specs(config), mesh)), {}
    for rule in trunk:
        for leaf in rule.leaves:
            read = _reader(rule, leaf, places, config.head_width, specs[leaf], np.dtype(jax.numpy.dtype(dtype)))
            params[leaf] = _placed(specs[leaf].shape, shardings[leaf], read)
    return traverse_util.unflatten_dict(params, sep="/")


def _bare(tensor: str) -> str:
    """The name without the prefix of the whole model."""
    return tensor.partition(".")[2] if not tensor.startswith(("lm_head", "embed_out")) else tensor


def check(
    folder: Path, places: dict[str, Stored], expected: dict[str, tuple[int, ...]], headless: bool, asking: str = CONFIG
) -> None:
    """Refuse a checkpoint that does not hold exactly the tensors that its settings (`asking` says which) ask for.

    Raises:
        ValueError: a tensor is missing, not expected or of another shape.
    """
    for name, shape in expected.items():
        if name not in places:
            raise ValueError(f"{folder}: tensor {name} of shape {shape} is missing: {asking} asks for it")
    for name, (file, found, _) in places.items():
        if name not in expected:
            head = headless and name in ("lm_head.weight", "embed_out.weight")  # a copy of the embedding
            if head or name.endswith(_BUFFERS):
                continue
            raise ValueError(
                f"{file}: tensor {name} of shape {found} is not one that {asking} asks for: they do not belong together"
            )
        if found != expected[name]:
            raise ValueError(f"{file}: tensor {name} has shape {found}, but {asking} asks for {expected[name]}")


def _placed(shape: tuple[int, ...], place: Any, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array of which every device gets its part as it is read, so that the host holds one part at a time."""
    parts = [jax.device_put(read(index), device) for device, index in place.addressable_devices_indices_map(shape).items()]
    return jax.make_array_from_single_device_arrays(shape, place, parts)


def _reader(
    rule: Rule, leaf: str, places: dict[str, Stored], head_width: int, spec: ParamSpec, dtype: np.dtype
) -> Callable[[Any], np.ndarray]:
    """index -> that part of a leaf, for a device that holds it."""
    part, lead = rule.leaves.index(leaf), stacked_axes(rule)

    def one(which: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        name = rule.tensor.format(*which)
        if len(rule.leaves) > 1:
            return split(rule, places[name].read(()), head_width)[part][index]
        tensor = places[name].read(index[::-1] if rule.transposed else index)
        return tensor.T if rule.transposed else tensor

    def read(index: Any) -> np.ndarray:
        if not lead:
            return np.ascontiguousarray(one((), index), dtype)
        ranges = [range(*s.indices(size)) for s, size in zip(index, spec.shape, strict=True)]
        stacked = np.empty([len(own) for own in ranges], dtype)
        for place in np.ndindex(stacked.shape[:lead]):
            stacked[place] = one(tuple(own[i] for own, i in zip(ranges, place, strict=False)), index[lead:])
        return stacked

    return read


# -------------------------------------------------------------------------------------------------------------- writing


def save(
    folder: Path | str, params: dict[str, Any], config: TransformerConfig, tokenizer: Any, shard_bytes: int = 5 * 10**9
) -> dict[str, Any]:
    """Write a checkpoint for transformers, in files of at most `shard_bytes`, and return its `config.json`.

    `tokenizer` is a `data/tokenizer.Tokenizer`. `params` of a reward model (trunk, head, gain, bias, its score read at the last
    token) give a sequence classifier with one label. That has no bias: gain times the head's weight is its `score.weight`, and
    what is left is kept as `score_offset` in `config.json`, to be added to its scores.

    Raises:
        ValueError: the folder holds something, no architecture of transformers fits, the tokenizer does not fit the model, or a
            weight is in eight bits.
    """
    int8.refuse(params, "exported")
    folder = Path(folder)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another folder")
    check_vocabulary(tokenizer, config)
    reward = "trunk" in params
    values = config_to_hf(config)
    trunk = rules(config, values["model_type"])
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    values |= ids | {"dtype": str(jax.tree.leaves(params)[0].dtype)}
    leaves, extra = flat(params["trunk"] if reward else params), {}
    if reward:
        if tokenizer.pad == tokenizer.eos:  # it takes the last token that is not pad for the last of the text
            raise ValueError(
                f"pad and EOS are both id {tokenizer.eos}: a classifier would not read the EOS; choose another pad"
            )
        trunk = [rule for rule in trunk if rule.leaves != ("head",)]
        head, gain = params["head"], params["gain"]
        extra = {SCORE: np.asarray(gain * head["weight"])[None]}
        values |= {
            "architectures": [CLASSES[values["model_type"]][1]],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
        values["score_offset"] = float(np.reshape(gain * head["bias"] + params["bias"], ()))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    hf_files.write(temporary, _named(trunk, leaves, config, extra), shard_bytes)
    texts = {CONFIG: values} if reward else {CONFIG: values, "generation_config.json": ids}
    for name, value in texts.items():
        (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(temporary)
    if folder.exists():
        folder.rmdir()
    os.replace(temporary, folder)
    return values


def check_vocabulary(tokenizer: Any, config: TransformerConfig) -> None:
    """Refuse a tokenizer whose ids the embedding table does not hold: on the device they would be read as another one.

    Raises:
        ValueError: it has more ids than the table has rows, or a special id is outside.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the embedding has vocab_size={config.vocab_size} rows: they do "
            "not belong together"
        )
    ids = {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos}
    if outside := {name: i for name, i in ids.items() if not 0 <= i < config.vocab_size}:
        raise ValueError(f"special ids {outside} are outside the vocabulary 0 .. {config.vocab_size - 1}")


def _named(
    trunk: list[Rule], leaves: dict[str, Any], config: TransformerConfig, extra: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, one after another."""
    for rule in trunk:
        for which in np.ndindex(np.shape(leaves[rule.leaves[0]])[: stacked_axes(rule)]):
            own = [np.asarray(leaves[leaf][which]) for leaf in rule.leaves]
            yield rule.tensor.format(*which), join(rule, own, config.head_width)
    yield from extra.items()
