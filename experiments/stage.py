"""What the stage scripts share: reading a finished stage's model onto the mesh, and writing one for the next stage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrlhf.core import offload, processes, sharding
from jaxrlhf.core.types import Rollout, SamplingSpec, TrainState
from jaxrlhf.data import pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import heads, hf, int8, lora, peft, pretrained, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.models.lora import LoraConfig
from jaxrlhf.models.model import Model
from jaxrlhf.rewards import ensemble
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate, stop_strings
from jaxrlhf.training import metrics, plan, timing
from jaxrlhf.training.run import Run


def mesh(
    config: sharding.MeshConfig, minibatches: tuple[int, int] | None = None, devices: list[Any] | None = None, **rows: int
) -> jax.sharding.Mesh:
    """The mesh of a script over all devices, or these, if it can share these numbers of rows, each by the name of its setting.

    Raises:
        ValueError: the mesh does not fit the devices, or does not divide the rows.
    """
    made = sharding.make_mesh(config, devices)
    sharding.check_rows(made, rows, minibatches)
    return made


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are drawn; the tokenizer's own ids are added by `spec`."""

    temperature: float = 0.8  # in every log-prob too
    max_tokens: int = 28
    min_tokens: int = 8  # EOS is impossible before: else policies learn to stop at once, which saves KL
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # in every log-prob too
    replay: bool = False  # learn the filtered distribution itself, by recording what the filters kept


def spec(sampling: Sampling, tokenizer: Tokenizer) -> SamplingSpec:
    """The sampling distribution over this tokenizer's ids."""
    # A checkpoint's tokenizer may have one token for all three, and EOS must stay possible.
    forbidden = tuple(i for i in (tokenizer.pad, tokenizer.bos) if i != tokenizer.eos)
    return SamplingSpec(**dataclasses.asdict(sampling), stop=(tokenizer.eos,), forbidden=forbidden, pad=tokenizer.pad)


ONCE = generate.Options(halvings=1)  # of answers that are not drawn again and again: compiling takes longer than they do


def stop_table(spec: SamplingSpec, tokenizer: Tokenizer, vocab_size: int) -> jax.Array | None:
    """What `generate.generate` needs where the spec has stop strings."""
    return jnp.asarray(stop_strings.table(spec.stop_strings, tokenizer.pieces(), vocab_size)) if spec.stop_strings else None


Offload = Literal["none", "optimizer", "reference", "both"]  # what rests in the hosts' memory while it is not used
Weights = Literal["float32", "int8"]  # of a model that is read and not trained: as the folder has them, or in eight bits


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished stage's model."""

    config: TransformerConfig
    model: Model
    params: Any
    tokenizer: Tokenizer
    settings: dict[str, Any]  # config.json of the folder
    folder: Path | None = None  # it was read from


def specs(config: TransformerConfig, kind: str, several: ensemble.Config | None = None) -> Any:
    """Parameter specs of a `policy` (a language model) or a `reward_model` (trunk, head, scale), or of an ensemble of them."""
    trunk = transformer.param_specs(config)
    if kind == "policy":
        return trunk
    scalar = sharding.ParamSpec((), (), sharding.zeros)
    own = {"head": heads.score_specs(config.width), "gain": scalar, "bias": scalar}
    if several is None:
        return {"trunk": trunk} | own
    members = several.members
    if several.of == "models":
        own["trunk"] = trunk
    if several.of == "adapters":
        own["adapters"] = lora.specs(config, several.lora)
    stacked = jax.tree.map(
        lambda spec: sharding.ParamSpec((members, *spec.shape), (None, *spec.axes), spec.init),
        own,
        is_leaf=lambda x: isinstance(x, sharding.ParamSpec),
    )
    return {"trunk": trunk} | stacked


def kind(folder: Path) -> str:
    """`policy`, `reward_model`, or `reward_adapter`, which is a reward model without its base.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a model of another program.
    """
    if is_checkpoint(folder):
        return "reward_model" if hf.is_reward_model(hf.read_config(folder)) else "policy"
    found = pretrained.settings(folder).get("kind", "model of another program")
    if found not in ("policy", "reward_model", "reward_adapter"):
        raise ValueError(f"{folder}: holds a {found}, not a policy or reward_model")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a checkpoint of Hugging Face, not a model that a stage here wrote."""
    file = folder / pretrained.CONFIG
    return file.is_file() and not (folder / pretrained.PARAMS).is_file() and "model_type" in hf.read_config(folder)


def load(folder: Path, mesh: jax.sharding.Mesh, kind: str = "policy", weights: Weights = "float32") -> Trained:
    """The model in `folder`, on the mesh: what a stage wrote, or a checkpoint of Hugging Face, its weights in float32; or with
    weights="int8", to be read and not trained (`models/int8.py`).

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a model of this kind, or damaged, or a checkpoint that `models/hf.py` cannot read.
    """
    if is_checkpoint(folder):
        found = _load_checkpoint(folder, mesh, kind)
        return dataclasses.replace(found, params=int8.quantise(found.params)) if weights == "int8" else found
    params, settings = pretrained.load(folder)
    if settings.get("kind") != kind:
        raise ValueError(f"{folder}: holds a {settings.get('kind', 'model of another program')}, not a {kind}")
    config, tokenizer = TransformerConfig(**settings["transformer"]), tokenizers.load(folder)
    hf.check_vocabulary(tokenizer, config)
    declared = specs(config, kind, ensembled(settings))
    places = sharding.shardings(declared, mesh)
    for line in sharding.undivided(declared, mesh):
        print(f"{folder}: {line}", flush=True)
    params = int8.quantise(params, places) if weights == "int8" else processes.from_host(params, places)
    return Trained(config, transformer.build(config), params, tokenizer, settings, folder)


def _load_checkpoint(folder: Path, mesh: jax.sharding.Mesh, wanted: str) -> Trained:
    if (found := kind(folder)) != wanted:
        raise ValueError(f"{folder}: holds a checkpoint of a {found}, not of a {wanted}")
    tokenizer = tokenizers.load(folder)
    params, config = hf.load(folder, mesh)
    hf.check_vocabulary(tokenizer, config)
    settings = {"kind": found, "transformer": dataclasses.asdict(config), "source": str(folder)}
    settings |= {"pooling": "last"} if found == "reward_model" else {}
    return Trained(config, transformer.build(config), params, tokenizer, settings, folder)


def load_reward(folder: Path, mesh: jax.sharding.Mesh, start: Trained) -> Trained:
    """The reward model in `folder`: one with a trunk of its own, or what was trained over `start` (the `adapter/` that
    experiments/reward_model.py leaves under --lora.rank), which is laid over it again and shares its arrays.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a reward model, damaged, or trained over another model than `start`.
    """
    if kind(folder) != "reward_adapter":
        return load(folder, mesh, "reward_model")
    own, settings = pretrained.load(folder)
    # What a start in eight bits was rounded from is in its folder.
    exact = load(start.folder, mesh).params if start.folder is not None and int8.inside(start.params) else start.params
    if pretrained.fingerprint(exact) != settings["base"]["blake2b"]:
        raise ValueError(
            f"{folder}: was trained over {settings['base']['folder']}, whose parameters are not those that it would be laid "
            "over here: start from that model, or give the `model` folder beside this one, which has a trunk of its own"
        )
    config, several, over = TransformerConfig(**settings["transformer"]), ensembled(settings), adapted(settings)
    placed = {name: spec for name, spec in specs(config, "reward_model", several).items() if name != "trunk"}
    placed |= {"adapter": lora.specs(config, over)} if over.rank else {}
    own = processes.from_host(own, sharding.shardings(placed, mesh))
    trunk = lora.attach(start.params, own.pop("adapter"), over) if over.rank else start.params
    return Trained(config, transformer.build(config), {"trunk": trunk} | own, tokenizers.load(folder), settings)


def ensembled(settings: dict[str, Any]) -> ensemble.Config | None:
    """Of how many heads, adapters or models a reward model is, and how their scores are taken together; None: of one."""
    if "ensemble" not in settings:
        return None
    return ensemble.Config(**settings["ensemble"] | {"lora": adapted(settings["ensemble"])})


def adapted(settings: dict[str, Any]) -> LoraConfig:
    """The adapter that settings name; of rank 0 where they name none."""
    values = dict(settings.get("lora", {}))
    if values.get("targets") is not None:
        values["targets"] = tuple(values["targets"])
    return LoraConfig(**values)


def reward(judged: Trained) -> Callable[[Any, Rollout], jax.Array]:
    """A reward model, or an ensemble of them, as a reward: (params, rollout) -> score of each row [B], compiled."""
    several = ensembled(judged.settings)
    if several is None:
        return rewards.reward(judged.model, judged.settings["pooling"])
    return ensemble.reward(judged.model, judged.settings["pooling"], several)


def trainable(start: Trained, config: LoraConfig, mesh: jax.sharding.Mesh, seed: int, init: Path | None = None) -> Any:
    """What is trained of a language model: a new adapter over it, or with rank 0 all of it, or another model in the folder
    `init`, which then learns near `start`.

    Of one in eight bits that is the weights in its folder, read again.

    Raises:
        ValueError: `init` holds a model of another shape or with other tokens, or is given with an adapter.
    """
    if init is not None:
        if config.rank:
            raise ValueError(f"init={init} with lora.rank={config.rank}: an adapter lies over `policy` itself; leave one out")
        other = load(init, mesh)
        if other.config != start.config or other.tokenizer.pieces() != start.tokenizer.pieces():
            raise ValueError(
                f"init={init} is a model of another shape, or with other tokens, than the policy in {start.folder}"
            )
        return other.params
    if config.rank:
        return adapter(start.config, config, mesh, seed)
    if start.folder is not None and int8.inside(start.params):
        return load(start.folder, mesh).params
    return offload.to_device_memory(start.params)


def at_rest(state: TrainState, choice: Offload) -> TrainState:
    """The state with its optimizer's part in the hosts' memory, where that is chosen.

    Raises:
        ValueError: a device has no such memory.
    """
    if choice not in ("optimizer", "both"):
        return state
    return dataclasses.replace(state, opt_state=offload.to_host_memory(state.opt_state))


def adapter(shape: TransformerConfig, config: LoraConfig, mesh: jax.sharding.Mesh, seed: int) -> Any:
    """A new adapter, under which the model is as it was."""
    fresh = lora.specs(shape, config)
    return processes.from_host(sharding.init_params(fresh, jax.random.key(seed)), sharding.shardings(fresh, mesh))


def timed(clock: timing.Clock, data: Any) -> Any:
    """`data[step]`, whose making counts as data."""
    return pipeline.by_step(clock.timed("data", data.__getitem__))


def tell_memory(run: Run, rows: Sequence[plan.Row]) -> None:
    """Print what a run will hold, keep it as `memory.json` beside its settings, and refuse what no device can hold.

    Activations are told and not refused: they are estimates.

    Raises:
        ValueError: the arrays alone are more than a device has.
    """
    most = plan.limit(jax.local_devices())
    print(f"\n{plan.table(rows, most)}\n", flush=True)
    told = {"rows": [dataclasses.asdict(row) for row in rows], "device_bytes": most}
    processes.by_first(lambda: metrics.write_atomic(run.out / "memory.json", json.dumps(told, indent=1) + "\n"))
    plan.check([row for row in rows if row.role != "activations"], most)


def save_policy(out: Path, start: Trained, params: Any, config: LoraConfig, base: Path) -> None:
    """Write a trained policy as `out/model`. Where `params` are an adapter, it is merged there with `start`, which was read
    from `base`, and stands alone as `out/adapter` in the format of the peft package, where that can hold it.

    Of a start in eight bits the merged model has the weights that those stand for, wide: it is the policy that was trained.
    """
    save(out / "model", "policy", lora.merge(start.params, params, config), start.config, start.tokenizer)
    if config.rank and peft.holds(start.config):
        params = processes.to_host(params)
        processes.by_first(lambda: peft.save(out / "adapter", params, start.config, config, base))


def save(folder: Path, kind: str, params: Any, config: TransformerConfig, tokenizer: Tokenizer, **notes: Any) -> None:
    """Write a model for the next stage: weights, config.json and tokenizer, nothing else."""
    params = processes.to_host(params)

    def write() -> None:
        pretrained.save(folder, params, {"kind": kind, "transformer": dataclasses.asdict(config), **notes})
        tokenizer.save(folder)

    processes.by_first(write)


def texts(rollout: Rollout, tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Prompts and responses as text. A response keeps its leading space, so that prompt + response is the whole text."""
    tokens, start, length = processes.to_host((rollout.tokens, rollout.prompt_len, rollout.response_len))
    prompts = [tokenizer.decode(row[:p]) for row, p in zip(tokens, start, strict=True)]
    spans = zip(tokens, start, start + length, strict=True)
    return prompts, [tokenizer.decode(row[p:end], continuation=True) for row, p, end in spans]
