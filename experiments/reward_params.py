"""Parameters of a reward model: where they come from before training, and how they are written after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from experiments import stage
from jaxrlhf.core import members, sharding
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import heads, lora, pretrained
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards

if TYPE_CHECKING:
    from experiments.reward_model import Config


def initial(config: Config, mesh: jax.sharding.Mesh) -> tuple[stage.Trained, Any, dict[str, Any]]:
    """The model, its trunk, and {trunk, head} to train: the language model with a new head, or an earlier reward model."""
    if config.refresh is not None:
        return refreshed(config, config.refresh, mesh)
    start = stage.load(config.init, mesh)
    return start, start.params, fresh(config, start.config, start.params, mesh)


def refreshed(config: Config, folder: Path, mesh: jax.sharding.Mesh) -> tuple[stage.Trained, Any, dict[str, Any]]:
    """The same of an earlier reward model; of one that was saved as an adapter, over `init` again."""
    if stage.kind(folder) == "reward_adapter":
        start = stage.load_reward(folder, mesh, stage.load(config.init, mesh))
    else:
        start = stage.load(folder, mesh, "reward_model")
    several, earlier, over = config.several, stage.ensembled(start.settings), stage.adapted(start.settings)
    kinds = [None if x is None else (x.members, x.of, x.lora) for x in (earlier, several)]
    if kinds[0] != kinds[1] or (over.rank and over != config.lora):
        held = "one reward model" if earlier is None else f"{earlier.members} {earlier.of}"
        own = over if earlier is None or over.rank else earlier.lora
        held += f" of {own}" if own.rank else ""
        raise ValueError(
            f"{folder} holds {held}, but ensemble={config.ensemble} of {config.ensemble_of} with {config.lora} is "
            "asked for: refresh it as what it is"
        )
    base, adapters = start.params["trunk"], start.params.get("adapters")
    if over.rank:
        base, adapters = lora.detach(base, over)
    trunk = own_trunk(config, start.config, base, mesh) if adapters is None else adapters
    return start, base, {"trunk": trunk, "head": start.params["head"]}


def fresh(config: Config, shape: TransformerConfig, trunk: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """{trunk, head} to train: the language model or an adapter with a new head; of an ensemble as many of either as it has."""
    several = config.several
    # A head of zeros, as a new direction of the trained features would only add noise to them at first.
    specs = heads.value_specs(shape.width) if config.head_init == "zeros" else heads.score_specs(shape.width)
    key = jax.random.key(config.seed)
    if several is None:
        head = jax.device_put(sharding.init_params(specs, key), sharding.replicated(mesh))
        return {"trunk": own_trunk(config, shape, trunk, mesh), "head": head}
    own = members.stack([sharding.init_params(specs, jax.random.fold_in(key, m)) for m in range(several.members)])
    if several.of == "adapters":
        apart = [stage.adapter(shape, config.lora, mesh, config.seed + 1000 * m) for m in range(several.members)]
        params = {"adapters": members.stack(apart), "head": own}
    else:
        copies = several.of == "models"
        params = {"trunk": members.stack([trunk] * several.members) if copies else trunk, "head": own}
    placed = stage.specs(shape, "reward_model", several)
    params = jax.device_put(params, sharding.shardings({name: placed[name] for name in params}, mesh))
    found = params["adapters"] if several.of == "adapters" else own_trunk(config, shape, params["trunk"], mesh)
    return {"trunk": found, "head": params["head"]}


def own_trunk(config: Config, shape: TransformerConfig, trunk: Any, mesh: jax.sharding.Mesh) -> Any:
    """What is trained of one trunk: all of it, or an adapter over it."""
    return stage.adapter(shape, config.lora, mesh, config.seed) if config.lora.rank else trunk


def whole(config: Config, base: Any, params: dict[str, Any]) -> dict[str, Any]:
    """Reward parameters as they are scored with and saved: an adapter merged with the base; several beside it."""
    if config.several is not None and config.several.of == "adapters":
        return rewards.with_scale({"trunk": base, "adapters": params["trunk"], "head": params["head"]})
    return rewards.with_scale(params | {"trunk": lora.merge(base, params["trunk"], config.lora)})


def save(folder: Path, config: Config, params: Any, shape: TransformerConfig, tokenizer: Tokenizer) -> None:
    """Write the reward model, or the ensemble of them, for the stages that read it."""
    stage.save(folder, "reward_model", params, shape, tokenizer, **notes(config))


def save_adapter(folder: Path, config: Config, params: Any, base: Any, start: stage.Trained) -> None:
    """Write what was trained without the base under it: for stages that hold that base already (`stage.load_reward`)."""
    of_members = config.several is not None and config.several.of == "adapters"
    own = {"adapters" if of_members else "adapter": params["trunk"]} | {x: params[x] for x in ("head", "gain", "bias")}
    told = notes(config) | ({} if of_members else {"lora": dataclasses.asdict(config.lora)})
    over_init = config.refresh is None or stage.kind(config.refresh) == "reward_adapter"
    folder_of_base = config.init if over_init else config.refresh
    told["base"] = {"folder": str(folder_of_base), "blake2b": pretrained.fingerprint(base)}
    stage.save(folder, "reward_adapter", own, start.config, start.tokenizer, **told)


def notes(config: Config) -> dict[str, Any]:
    """What a reader of the reward model must know beside its shape."""
    told: dict[str, Any] = {"pooling": config.pooling}
    return told if config.several is None else told | {"ensemble": dataclasses.asdict(config.several)}
