"""Scores of a reward model, or of an ensemble's members: their scale, and how often they say what people said."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import best, reward_params, stage
from jaxrlhf.core import processes, sharding
from jaxrlhf.core.types import Prompts
from jaxrlhf.data import comparisons, human_sentiment, pipeline
from jaxrlhf.data.human_sentiment import DOMAINS
from jaxrlhf.evaluation import judges, reward_model
from jaxrlhf.rewards import ensemble as ensembles
from jaxrlhf.rewards import model as rewards
from jaxrlhf.sampling import generate

if TYPE_CHECKING:
    from experiments.reward_model import Config

JUDGED_WIDTH = 64  # tokens of a held-out text
ACCURACY = "held_out/accuracy"  # on pairs of people's ratings, the mean of the domains; the best step has the most


def scores_of(config: Config, model: Any) -> Callable[[Any, Any, Any], jax.Array]:
    """(params, tokens, length) -> [B], of an ensemble every member's [M, B]; compiled."""
    several = config.several
    if several is None:
        return jax.jit(lambda params, tokens, length: rewards.score(model, params, tokens, length, config.pooling))
    return jax.jit(lambda params, tokens, length: ensembles.scores(model, params, tokens, length, config.pooling, several))


def score_texts(config: Config, model: Any, params: Any, rows: dict[str, np.ndarray], size: int = 256) -> np.ndarray:
    """Score of each row; of an ensemble, every member's [M, n]."""
    return score_rows(scores_of(config, model), params, rows, size)


def score_rows(
    fn: Callable[[Any, Any, Any], jax.Array], params: Any, rows: dict[str, np.ndarray], size: int = 256
) -> np.ndarray:
    """The same by a compiled `scores_of`."""
    height = len(rows["length"])
    whole = -(-height // size) * size
    tokens, length = (np.resize(rows[name], (whole, *rows[name].shape[1:])) for name in ("tokens", "length"))
    found = [fn(params, tokens[i : i + size], length[i : i + size]) for i in range(0, whole, size)]
    return np.concatenate(processes.to_host(found), axis=-1)[..., :height]


def together(config: Config, scores: np.ndarray) -> np.ndarray:
    """One score a row, whether one model gave it or several."""
    return scores if config.several is None else np.asarray(ensembles.aggregate(jnp.asarray(scores), config.several))


def normalised(config: Config, trunk: stage.Trained, params: Any, mesh: jax.sharding.Mesh) -> Any:
    """Scores of the reference policy's own samples get mean 0 and deviation 1, or those of demonstrations mean 0."""
    policy = stage.load(config.reference, mesh)
    rows = policy.tokenizer.encode_batch([pipeline.clean(r.text) for r in human_sentiment.reviews("train")])
    if config.normalise == "demonstrations":
        shown = pipeline.continuation_rows(rows, bos=policy.tokenizer.bos, eos=policy.tokenizer.eos)
        few = np.random.default_rng(config.seed).permutation(len(shown["tokens"]))[: config.reference_samples]
        return centred(config, trunk.model, params, {name: array[few] for name, array in shown.items()})
    prompts = pipeline.cut_prompts(rows, policy.tokenizer, config.seed)
    prompts = next(iter(pipeline.prompt_batches(prompts, config.reference_samples, config.seed)))
    return scaled(config, trunk.model, params, policy, prompts, mesh)


def centred(config: Config, model: Any, params: Any, shown: dict[str, np.ndarray]) -> Any:
    """Scores of demonstrations (tokens, prompt_len, response_len) get mean 0."""
    length = shown["prompt_len"] + shown["response_len"]
    return rewards.centre(params, scores_of(config, model)(params, shown["tokens"], length))


def scaled(config: Config, model: Any, params: Any, policy: stage.Trained, prompts: Prompts, mesh: jax.sharding.Mesh) -> Any:
    """Scores of a policy's answers get mean 0 and deviation 1."""
    spec, key = stage.spec(config.sampling, policy.tokenizer), jax.random.key(config.seed)
    prompts = sharding.shard_batch(prompts, mesh)
    drawn = generate.generate(policy.model, policy.params, prompts, spec, key, options=stage.ONCE)
    scores = scores_of(config, model)(params, drawn.tokens, drawn.prompt_len + drawn.response_len)
    return rewards.normalise(params, jnp.asarray(processes.to_host(scores)))


def held_out(config: Config) -> list[human_sentiment.Rating]:
    """The rated texts that accuracy is measured on."""
    test = human_sentiment.load("test")
    if config.held_out_texts is None:
        return list(test)
    return [test[i] for i in np.random.default_rng(0).permutation(len(test))[: config.held_out_texts]]


def judge(config: Config, trunk: stage.Trained, base: Any) -> Callable[[Any], best.Judgement]:
    """(what is trained) -> accuracy on held-out pairs of people's ratings in each domain that is learned, and their mean; and
    nothing else."""
    test, program = held_out(config), scores_of(config, trunk.model)
    means, domains = np.array([r.mean for r in test]), [r.domain for r in test]
    rows = comparisons.rated_rows(test, trunk.tokenizer, JUDGED_WIDTH)

    def measure(params: Any) -> best.Judgement:
        scores = together(config, score_rows(program, reward_params.whole(config, base, params), rows))
        told = reward_model.pair_accuracy(scores, means, domains)
        found = {d: a.accuracy for d, a in told.items() if d in config.domains and a.pairs}
        mean = float(np.mean(list(found.values()) or [np.nan]))
        return {ACCURACY: mean} | {f"{ACCURACY}_{domain}": x for domain, x in found.items()}, None

    return measure


def evaluate(config: Config, trunk: stage.Trained, params: Any) -> dict[str, Any]:
    """Accuracy on held-out pairs of people's ratings, beside VADER's and a bag-of-words ridge's fitted on the same texts."""
    train, test = human_sentiment.load("train"), held_out(config)
    texts, means, domains = [pipeline.clean(r.text) for r in test], np.array([r.mean for r in test]), [r.domain for r in test]
    ridge = judges.fit_ridge([pipeline.clean(r.text) for r in train], [r.mean for r in train])
    rows = comparisons.rated_rows(test, trunk.tokenizer, JUDGED_WIDTH)
    every = score_texts(config, trunk.model, params, rows)
    scores = together(config, every)

    def accuracy(scores: np.ndarray) -> dict[str, float]:
        return {d: a.accuracy for d, a in reward_model.pair_accuracy(scores, means, domains).items()}

    both = scores / scores.std() + (ridge.predict(texts) - means.mean()) / ridge.predict(texts).std()
    error, table = reward_model.calibration(scores, means, domains)
    result = {
        "accuracy": {
            "model": accuracy(scores),
            "ridge": accuracy(ridge.predict(texts)),
            "vader": accuracy(judges.vader(texts)),
            "model_and_ridge": accuracy(both),
        },
        "accuracy_by_margin": reward_model.accuracy_by_margin(scores, means, domains),
        "calibration": {"ece": error, "table": table},
        "length_correlation": {
            "score": reward_model.correlation(scores, rows["length"]),
            "rating": reward_model.correlation(means, rows["length"]),
        },
        "domains": list(DOMAINS),
    }
    if config.several is not None:
        result["members"] = [accuracy(own) for own in every]
    return result


def choice_accuracy(config: Config, trunk: stage.Trained, params: Any, rows: list[dict[str, Any]]) -> float:
    """Share of held-out choices in which the chosen answer scores higher."""
    pairs = comparisons.preference_rows(rows, trunk.tokenizer, JUDGED_WIDTH)
    tokens = np.asarray(pairs.tokens).reshape(-1, JUDGED_WIDTH)
    length = np.asarray(pairs.prompt_len + pairs.response_len).reshape(-1)
    scores = together(config, score_texts(config, trunk.model, params, {"tokens": tokens, "length": length})).reshape(-1, 2)
    return float((scores[:, 0] > scores[:, 1]).mean())
