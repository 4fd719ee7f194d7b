"""A policy as a model of EleutherAI's lm-eval harness: log-likelihoods, rolling log-likelihoods and answers, without torch.

Every row begins with BOS, as in training, and rows of like length share a few shapes, so that few programs are compiled.
`language_model` gives what `lm_eval.simple_evaluate` takes; the functions before it are what it is made of.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.core import masking, sharding
from jaxrlhf.core.types import Prompts, SamplingSpec
from jaxrlhf.data import conversations, pipeline
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models.model import Model
from jaxrlhf.sampling import generate, rollout, stop_strings

Ids = list[int]
NARROWEST = 16  # tokens of a row, and of a long answer


@dataclasses.dataclass(frozen=True)
class Judged:
    """What is evaluated, and how."""

    model: Model
    params: Any
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    rows: int = 32  # read at a time
    chat: bool = False  # contexts are conversations that the tokenizer's template wrote, special tokens and all
    seed: int = 0  # of answers that are drawn
    cut: Counter[str] = dataclasses.field(default_factory=Counter)  # requests whose context lost its beginning, by kind


class _Batch(NamedTuple):
    tokens: Any  # [B, T]
    prompt_len: Any  # [B]
    response_len: Any  # [B]


def loglikelihoods(judged: Judged, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
    """Of each pair (context, continuation): the continuation's log-probability in nats, and whether every token of it is the
    most probable one. A context too long for the model loses its beginning, which is counted.

    Raises:
        ValueError: a context or a continuation is empty, or a continuation does not fit the model after one token.
    """
    most = judged.model.max_length
    for i, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) < most:
            raise ValueError(
                f"request {i} has a context of {len(context)} and a continuation of {len(continuation)} tokens: each needs one "
                f"at least, and the continuation must fit into the model's {most} with one token of context before it"
            )
        judged.cut["loglikelihood"] += len(context) + len(continuation) > most
    # One token's room apart: most continuations are of one or a few.
    shapes = [(_room(len(a) + len(b), most, NARROWEST), _room(len(b), most - 1, 1)) for a, b in pairs]
    found: list[Any] = [None] * len(pairs)
    for (width, answer), part in _parts(shapes, judged.rows):
        rows = [(pairs[i][0] + pairs[i][1])[-width:] for i in part]
        tokens, length = pipeline.pad_rows(rows, width, judged.tokenizer.pad)
        response = np.array([len(pairs[i][1]) for i in part], np.int32)
        batch = sharding.shard_batch(_Batch(tokens, length - response, response), judged.mesh)
        logprobs, best = rollout.batch_choices(judged.model, judged.params, batch, answer, judged.rows)
        total = np.asarray(logprobs, np.float64).sum(1)
        greedy = np.asarray(best).sum(1) == response
        for i, value, always in zip(part, total, greedy, strict=True):
            found[i] = (float(value), bool(always))
    return found


def rolling(judged: Judged, texts: Sequence[Ids]) -> list[float]:
    """The log-probability in nats of each whole text, without its BOS: in windows as wide as the model, each token predicted
    once, with as much before it as fits (lm-eval's own windows)."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    widest, bos = judged.model.max_length - 1, judged.tokenizer.bos
    windows = [list(map(make_disjoint_window, get_rolling_token_windows(text, bos, widest, 1))) for text in texts]
    told = iter(loglikelihoods(judged, [window for each in windows for window in each]))
    return [sum((next(told)[0] for _ in each), 0.0) for each in windows]


def answers(judged: Judged, requests: Sequence[tuple[Ids, Mapping[str, Any]]]) -> list[str]:
    """The answer to each (context, settings of its generation): up to its first stop string, which is left out.

    The settings are lm-eval's: `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_p`, `top_k`, `min_p`. A context too
    long for the model loses its beginning, which is counted.

    Raises:
        ValueError: a setting that is not known, or an answer that leaves no room for a context.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    most, tokenizer = judged.model.max_length, judged.tokenizer
    specs = [_spec(tokenizer, dict(normalize_gen_kwargs(dict(settings)))) for _, settings in requests]
    shapes = []
    for i, ((context, _), spec) in enumerate(zip(requests, specs, strict=True)):
        if not context or spec.max_tokens >= most:
            raise ValueError(
                f"request {i} has a context of {len(context)} tokens and max_gen_toks={spec.max_tokens}: there must be a "
                f"context, and room for some of it in the model's {most}; lower max_gen_toks"
            )
        judged.cut["generate_until"] += len(context) + spec.max_tokens > most
        shapes.append((_room(len(context), most - spec.max_tokens, NARROWEST), spec))
    pieces = tokenizer.pieces() if any(spec.stop_strings for spec in specs) else []
    found: list[Any] = [None] * len(requests)
    for (width, spec), part in _parts(shapes, judged.rows):
        tokens, length = pipeline.pad_rows([requests[i][0][-width:] for i in part], width, tokenizer.pad)
        number = np.array(part, np.int32)
        prompts = sharding.shard_batch(Prompts(tokens, length, number, number), judged.mesh)
        stops = spec.stop_strings
        table = jnp.asarray(stop_strings.table(stops, pieces, judged.model.vocab_size)) if stops else None
        key = jax.random.key(judged.seed)
        drawn = generate.generate(judged.model, judged.params, prompts, spec, key, stop_table=table)
        written = np.asarray(masking.length_mask(drawn.response_len, spec.max_tokens))
        for i, row, start, mask in zip(part, np.asarray(drawn.tokens), np.asarray(drawn.prompt_len), written, strict=True):
            text = tokenizer.decode(row[start : start + mask.sum()], continuation=True)
            found[i] = _before(text, spec.stop_strings)
    return found


def _spec(tokenizer: Tokenizer, settings: dict[str, Any]) -> SamplingSpec:
    greedy, until, most = not settings.pop("do_sample"), settings.pop("until"), settings.pop("max_gen_toks")
    temperature = settings.pop("temperature", 1.0)
    known = {name: settings.pop(name) for name in ("top_p", "top_k", "min_p") if name in settings}
    if settings:
        raise ValueError(
            f"generation settings {settings} are not known here: leave them out of the task's generation_kwargs (known: until, "
            "max_gen_toks, do_sample, temperature, top_p, top_k, min_p)"
        )
    return SamplingSpec(
        temperature=1.0 if greedy else temperature,
        max_tokens=most,
        stop=(tokenizer.eos,),
        forbidden=tuple(i for i in (tokenizer.pad, tokenizer.bos) if i != tokenizer.eos),
        greedy=greedy,
        stop_strings=tuple(string for string in until if string),
        pad=tokenizer.pad,
        **({} if greedy else known),
    )


def _before(text: str, strings: Sequence[str]) -> str:
    """The text up to the first of these strings in it."""
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))]


def _room(length: int, most: int, least: int) -> int:
    """The width for so many tokens: a power of 2 times `least`, at most `most`."""
    width = least
    while width < min(length, most):
        width *= 2
    return min(width, most)


def _parts(shapes: Sequence[Hashable], rows: int) -> Iterator[tuple[Any, list[int]]]:
    """Each shape with the numbers of the requests that have it, `rows` at a time, filled up with the last of them."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        groups[shape].append(i)
    for shape, members in groups.items():
        filled = members + members[-1:] * (-len(members) % rows)
        for start in range(0, len(filled), rows):
            yield shape, filled[start : start + rows]


def language_model(judged: Judged, name: str) -> Any:
    """What `lm_eval.simple_evaluate(model=...)` takes. `name` tells tokenizers apart where requests are cached.

    Raises:
        ImportError: the extra `eval` is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError("the lm-eval harness is not installed: pip install 'jaxrlhf[eval]'") from error
    tokenizer = judged.tokenizer

    class LanguageModel(TemplateLM):
        """Text to ids and back; lm-eval's class finds where a continuation begins, and calls the rest."""

        @property
        def tokenizer_name(self):
            return name

        @property
        def eot_token_id(self):
            return tokenizer.eos

        @property
        def prefix_token_id(self):
            return tokenizer.bos

        def tok_encode(self, string, add_special_tokens=None, **_):
            if judged.chat:  # the template has put what it wants before the text
                return conversations.reader(tokenizer).encode(string, add_special_tokens=False).ids
            begin = [] if add_special_tokens is False else [tokenizer.bos]
            return begin + tokenizer.encode(string)  # first of a row in either case: lm-eval puts BOS before the others

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return conversations.render(tokenizer, chat_history, add_generation_prompt)

        def chat_template(self, chat_template=False):
            return conversations.template(tokenizer) if chat_template else None

        def _loglikelihood_tokens(self, requests, **_):
            return loglikelihoods(judged, [(context, continuation) for _, context, continuation in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            del disable_tqdm
            return rolling(judged, [tokenizer.encode(request.args[0]) for request in requests])

        def generate_until(self, requests, disable_tqdm=False):
            del disable_tqdm
            return answers(judged, [(self.tok_encode(context), settings) for context, settings in (r.args for r in requests)])

    return LanguageModel()
