"""The library's own programs of a PPO iteration and of fine-tuning, from shapes alone: to be compiled for any mesh, not run.

Nothing here makes an array: parameters, optimizer state, rollout and cache are `jax.ShapeDtypeStruct`s with the shardings that
a run gives them, so a model of any size is compiled on any machine, for devices that need not be there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf.algorithms import lm, ppo
from jaxrlhf.core import offload, sharding
from jaxrlhf.core.types import Outputs, Prompts, Rollout, SamplingSpec, TrainState
from jaxrlhf.models import heads, int8, lora, products, roles, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.model import EXACT
from jaxrlhf.sampling import decode, rollout
from jaxrlhf.training import objective, optimizer, step
from jaxrlhf.training.optimizer import OptimizerConfig

NAMES = ("sft", "ppo", "score", "decode_params", "prefill", "decode")
_WIDE = TransformerConfig(151936, 896, 24, 14, 2, 64, 4864, 1024, dtype="bfloat16", qkv_bias=True, rope_theta=1e6)
MODELS = {  # the shapes of Qwen2.5, Llama 3.1 and OLMoE (`mixture`: 6.9 billion parameters, 1.3 of them for a token)
    "tiny": TransformerConfig(512, 64, 3, 8, 8, 8, 192, 64),
    "tiny_experts": TransformerConfig(512, 64, 3, 8, 8, 8, 64, 64, experts=8, experts_per_token=2),
    "0.5B": _WIDE,
    "1.5B": dataclasses.replace(_WIDE, width=1536, layers=28, heads=12, head_width=128, mlp_width=8960),
    "mixture": TransformerConfig(
        *(50304, 2048, 16, 16, 16, 128, 1024, 1024),
        dtype="bfloat16",
        tied_head=False,
        qk_norm=True,
        experts=64,
        experts_per_token=8,
    ),
    "8B": TransformerConfig(128256, 4096, 32, 32, 8, 128, 14336, 1024, dtype="bfloat16", tied_head=False, rope_theta=5e5),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, what of it is trained, and how many tokens there are."""

    model: str = "tiny"
    rank: int = 0  # of adapters over a frozen base, which is the reference too; 0: the whole model is trained
    frozen: str = "float32"  # weights of base and reference: or int8
    rows: int = 8  # of a batch
    prompt: int = 16
    response: int = 16
    microbatches: int = 2
    scored: int = 4  # rows at a time
    chunk: int = 4  # decode steps of a program
    offload: str = "none"  # what rests in the host's memory: optimizer, reference or both

    @property
    def config(self) -> TransformerConfig:
        """The model's shape."""
        return MODELS[self.model]


def lowered(case: Case, mesh: jax.sharding.Mesh, names: tuple[str, ...] = NAMES) -> Iterator[tuple[str, Any]]:
    """(name, lowered program) of each program asked for, on the mesh."""
    with under(mesh):
        for name in names:
            yield name, _PROGRAMS[name](case, mesh)


def under(mesh: Any) -> Any:
    """The context of a mesh, of devices or an abstract one."""
    return jax.set_mesh(mesh) if isinstance(mesh, jax.sharding.Mesh) else jax.sharding.use_abstract_mesh(mesh)


def large(case: Case, mesh: jax.sharding.Mesh) -> int:
    """Bytes of the least of what must not be copied, as a device has it: a weight matrix of an MLP in the type of the
    products, [tokens of a microbatch, F], [tokens of a microbatch, V]."""
    config, ways = case.config, sharding.parts("batch", mesh)
    wide, tensor = jnp.dtype(config.dtype).itemsize, mesh.shape["tensor"]
    tokens = case.rows // case.microbatches // ways * (case.prompt + case.response)
    weight = config.width * config.mlp_width * wide // (mesh.shape["fsdp"] * tensor)
    return min(weight, tokens * config.mlp_width * wide // tensor)


def trained(case: Case, mesh: jax.sharding.Mesh, value: bool) -> tuple[Any, Any]:
    """(parameters to be trained, frozen ones); with `value`, policy and value head."""
    whole = sharding.abstract(transformer.param_specs(case.config), mesh)
    base = quantised(whole, mesh) if case.frozen == "int8" else whole
    adapter = lora.LoraConfig(case.rank)
    own = sharding.abstract(lora.specs(case.config, adapter), mesh) if case.rank else whole
    params = {"policy": own} | ({"value": sharding.abstract(heads.value_specs(case.config.width), mesh)} if value else {})
    return params, {"reference": _at_rest(base) if case.offload in ("reference", "both") else base}


def _at_rest(tree: Any) -> Any:
    """Shapes of arrays in the host's memory."""

    def one(x: Any) -> Any:
        place = x.sharding.with_memory_kind(offload.KIND) if x.ndim else x.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, tree)


def quantised(params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of what `int8.quantise` makes of arrays on the mesh."""
    shapes = jax.eval_shape(int8.quantise, params)

    def one(wide: Any, narrow: Any) -> Any:
        if not isinstance(narrow, products.Quantised):
            return wide
        spec = (*wide.sharding.spec, *(None,) * wide.ndim)[: wide.ndim]
        kept = [None if size == 1 else name for size, name in zip(narrow.scale.shape, spec, strict=True)]
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*kept))
        values: Any = jax.ShapeDtypeStruct(narrow.values.shape, narrow.values.dtype, sharding=wide.sharding)
        scale: Any = jax.ShapeDtypeStruct(narrow.scale.shape, narrow.scale.dtype, sharding=place)
        return products.Quantised(values, scale)

    return jax.tree.map(one, params, shapes)


def _placed(tree: Any, place: Any) -> Any:
    """Shapes with a sharding, or with a tree of them."""
    places = jax.tree.map(lambda _: place, tree) if isinstance(place, jax.sharding.Sharding) else place
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)


def _rows(function: Callable[..., Any], mesh: jax.sharding.Mesh, *args: Any) -> Any:
    """Shapes of what a function gives, its rows split over the mesh."""
    return _placed(jax.eval_shape(function, *args), sharding.batch_sharding(mesh))


def state_of(case: Case, params: Any, mesh: jax.sharding.Mesh) -> tuple[TrainState, Any]:
    """The state that a train step is given, and its optimizer."""
    update = optimizer.make(OptimizerConfig(name="adamw", clip_norm=1.0), 10, params)
    shapes = jax.eval_shape(update.init, params)
    everywhere = sharding.replicated(mesh)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    inner = _placed(shapes, step.state_shardings(shapes, params))
    inner = _at_rest(inner) if case.offload in ("optimizer", "both") else inner
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    return TrainState(count, params, step.GuardedState(inner, count, count), (), key), update


def _over(case: Case, outputs: Any) -> Any:
    """The objective over the frozen base, where adapters are trained."""
    adapter = lora.LoraConfig(case.rank)

    def over_base(params: Any, frozen: Any, batch: Any, key: Any) -> Outputs:
        return outputs(roles.attach(frozen["reference"], params, adapter), None, batch, key)

    return over_base if case.rank else outputs


def _sft(case: Case, mesh: jax.sharding.Mesh) -> Any:
    params, frozen = trained(case, mesh, value=False)
    params, width = params["policy"], case.prompt + case.response
    model = transformer.build(case.config)
    state, update = state_of(case, params, mesh)

    def responses() -> lm.Batch:
        length = jnp.zeros(case.rows, jnp.int32)
        return lm.responses(jnp.zeros((case.rows, width), jnp.int32), length, length, width - 1)

    batch = _rows(responses, mesh)
    train = step.make_train_step(_over(case, objective.make_outputs(model)), lm.loss, lm.Config(), update, case.microbatches)
    return train.lower(state, frozen if case.rank else None, batch)


def _ppo(case: Case, mesh: jax.sharding.Mesh) -> Any:
    params, frozen = trained(case, mesh, value=True)
    model, config = transformer.build(case.config), ppo.Config()
    state, update = state_of(case, params, mesh)
    experience = jax.eval_shape(functools.partial(_experience, case, mesh))
    batch = _rows(lambda x: ppo.prepare(x, ppo.init(config), config)[0], mesh, experience)
    outputs = objective.make_outputs(model, _spec(case), entropy=True, values=True, trunk="policy")
    train = step.make_train_step(_over(case, outputs), ppo.loss, config, update, case.microbatches)
    return train.lower(state, frozen if case.rank else None, batch)


def _spec(case: Case) -> SamplingSpec:
    return SamplingSpec(temperature=1.0, max_tokens=case.response, stop=(2,))


def _drawn(case: Case) -> Rollout:
    rows, logprobs = jnp.zeros(case.rows, jnp.int32), jnp.zeros((case.rows, case.response))
    tokens = jnp.zeros((case.rows, case.prompt + case.response), jnp.int32)
    return Rollout(tokens, rows, rows, rows > 0, rows, rows, rows, logprobs, logprobs)


def _experience(case: Case, mesh: jax.sharding.Mesh) -> Any:
    params, frozen = trained(case, mesh, value=True)
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    params = roles.attach(zeros(frozen["reference"]), zeros(params), lora.LoraConfig(case.rank))
    return rollout.experience(
        transformer.build(case.config), params, zeros(frozen), _drawn(case), _spec(case), rollout.Options(rows=case.scored)
    )


def _score(case: Case, mesh: jax.sharding.Mesh) -> Any:
    params, frozen = trained(case, mesh, value=True)
    model, spec, options = transformer.build(case.config), _spec(case), rollout.Options(rows=case.scored)
    drawn = _rows(lambda: _drawn(case), mesh)
    params = roles.attach(frozen["reference"], params, lora.LoraConfig(case.rank))
    return rollout._experience.lower(model, spec, options, params, frozen["reference"], drawn)


def _policy(case: Case, mesh: jax.sharding.Mesh) -> Any:
    params, frozen = trained(case, mesh, value=False)
    return roles.attach(frozen["reference"], params, lora.LoraConfig(case.rank))["policy"]


def _decode_params(case: Case, mesh: jax.sharding.Mesh) -> Any:
    return decode._decode_changes.lower(transformer.build(case.config), _policy(case, mesh))


@functools.cache
def _weights(case: Case, mesh: jax.sharding.Mesh) -> Any:
    """What sampling reads, where the program that makes it leaves it."""
    model, policy = transformer.build(case.config), _policy(case, mesh)
    made = jax.eval_shape(functools.partial(decode._decode_changes, model), policy)
    return decode.over(policy, _placed(made, _decode_params(case, mesh).compile().output_shardings))


def _prefill(case: Case, mesh: jax.sharding.Mesh) -> Any:
    static, given = _start(case, mesh)
    return decode.start.lower(*static, *given)


def _start(case: Case, mesh: jax.sharding.Mesh) -> tuple[tuple, tuple]:
    """What `decode.start` is given: what is static, and arrays."""
    model, shape = transformer.build(case.config), decode.Shape(1, case.response, EXACT)

    def asked() -> Prompts:
        rows = jnp.zeros(case.rows, jnp.int32)
        return Prompts(jnp.zeros((case.rows, case.prompt), jnp.int32), rows, rows, rows)

    prompts = _rows(asked, mesh)
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh))
    return (model, _spec(case), shape, case.response), (_weights(case, mesh), prompts, key, None)


def _decode(case: Case, mesh: jax.sharding.Mesh) -> Any:
    static, given = _start(case, mesh)
    made = jax.eval_shape(functools.partial(decode.start, *static), *given)
    state = _placed(made, decode.start.lower(*static, *given).compile().output_shardings)
    return decode.advance.lower(transformer.build(case.config), _spec(case), case.chunk, _weights(case, mesh), state)


_PROGRAMS: dict[str, Callable[[Case, jax.sharding.Mesh], Any]] = {
    "sft": _sft,
    "ppo": _ppo,
    "score": _score,
    "decode_params": _decode_params,
    "prefill": _prefill,
    "decode": _decode,
}
