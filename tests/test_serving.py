"""The service as OpenAI's own client sees it, and what it refuses."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
import urllib.parse

import pytest
import serving_cases
from labelling import Client, together

from jaxrlhf.feedback import accounts, limits, store, unpaired
from jaxrlhf.serving import watch

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'jaxrlhf[test]'")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

TURN = [{"role": "user", "content": "12+34="}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return serving_cases.policy(tmp_path_factory.mktemp("policy") / "first", 0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "feedback.sqlite"


@pytest.fixture(scope="module")
def running(folder, path):
    with serving_cases.service(folder, store=path) as given:
        yield given


@pytest.fixture(scope="module")
def address(running):
    return running[0]


def client_of(address: str, key: str = "none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def client(address):
    with client_of(address) as made:
        yield made


def test_the_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["policy"]
    assert client.models.retrieve("policy").object == "model"


def test_the_client_chats_with_seeds(client):
    drawn = [client.chat.completions.create(model="policy", messages=TURN, n=2, seed=seed) for seed in (1, 1, 2)]
    said = [[choice.message.content for choice in one.choices] for one in drawn]
    assert said[0] == said[1] != said[2]
    assert said[0][0] != said[0][1]
    first = drawn[0]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert {choice.finish_reason for choice in first.choices} <= {"stop", "length"}
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
    assert first.usage.completion_tokens <= 2 * 24
    (one,) = client.chat.completions.create(model="policy", messages=TURN, seed=1).choices
    assert one.message.content == said[0][0], "an answer does not depend on how many there are"


def test_a_stream_has_the_text_of_the_whole(client):
    given = {"model": "policy", "messages": TURN, "n": 2, "seed": 5, "logprobs": True}
    whole = client.chat.completions.create(**given)
    parts, logprobs, ends, usage, pieces = ["", ""], [[], []], ["", ""], None, 0
    for chunk in client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces += 1
            parts[choice.index] += choice.delta.content or ""
            logprobs[choice.index] += [each.logprob for each in (choice.logprobs.content if choice.logprobs else [])]
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert parts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert logprobs == [[each.logprob for each in choice.logprobs.content] for choice in whole.choices]
    assert usage == whole.usage
    assert pieces > 4, "not all at once"


def test_the_client_completes_texts_and_ids(client, folder):
    from jaxrlhf.data import tokenizer as tokenizers

    tokenizer = tokenizers.load(folder)
    ids = [tokenizer.bos, *tokenizer.encode("12+34=")]
    given = {"model": "policy", "seed": 3, "max_tokens": 9, "temperature": 1.5, "top_p": 1.0}
    (text,) = client.completions.create(prompt="12+34=", **given).choices
    several = client.completions.create(prompt=["12+34=", "1+1="], n=2, **given)
    (of_ids,) = client.completions.create(prompt=ids, logprobs=0, **given).choices
    assert text.text == several.choices[0].text == of_ids.text
    assert len(several.choices) == 4
    assert several.usage.prompt_tokens == len(ids) + len(tokenizer.encode("1+1=")) + 1
    assert len(of_ids.logprobs.tokens) == len(of_ids.logprobs.token_logprobs) <= 9
    assert all(value < 0 for value in of_ids.logprobs.token_logprobs)
    streamed = "".join(c.choices[0].text for c in client.completions.create(prompt="12+34=", stream=True, **given))
    assert streamed == text.text


def test_a_stop_string_ends_an_answer_wherever_chunks_end(client):
    given = {"model": "policy", "prompt": "12+34=", "seed": 3, "temperature": 1.5, "top_p": 1.0}
    whole = client.completions.create(**given)
    text = whole.choices[0].text
    stop = text[4:6]
    cut = client.completions.create(**given, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < whole.usage.completion_tokens
    streamed = client.completions.create(**given, stop=[stop, "zzz"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_temperature_0_is_greedy(client):
    given = {"model": "policy", "prompt": "12+34=", "temperature": 0}
    assert len({client.completions.create(**given).choices[0].text for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"model": "gpt-4"}, 404, "does not exist"),
        ({"max_tokens": 25}, 400, "max_tokens: 25 must be a whole number from 1 to 24"),
        ({"temperature": 2.5}, 400, "temperature: 2.5 must be a number from 0 to 2"),
        ({"top_p": 0}, 400, "top_p: 0 keeps no token"),
        ({"n": 9}, 400, "n: 9 must be a whole number from 1 to 8"),
        ({"seed": 1.5}, 400, "seed: 1.5 must be a whole number"),
        ({"stop": ["a", ""]}, 400, "stop: a text or a list of up to 4, none of them empty"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: 0.5 is not offered here"),
        ({"top_logprobs": 3, "logprobs": True}, 400, "top_logprobs: 3 is not offered here"),
        ({"extra_body": {"beams": 3}}, 400, "beams: unknown field"),
        ({"messages": []}, 400, "messages: the last one must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, r"messages\[0\].content: must be text"),
        ({"messages": [{"role": "user", "content": "1+" * 400}]}, 400, "tokens; 32 are read beside an answer"),
        ({"messages": [{"role": "user", "content": "x" * 1_100_000}]}, 413, "the body is longer than 1,048,576 bytes"),
    ],
)
def test_errors_are_those_of_openai(client, more, status, said):
    with pytest.raises(openai.APIStatusError, match=said) as caught:
        client.chat.completions.create(**({"model": "policy", "messages": TURN} | more))
    assert caught.value.status_code == status
    assert {"message", "type", "param", "code"} <= set(caught.value.body)
    kinds = {404: openai.NotFoundError, 400: openai.BadRequestError}
    assert isinstance(caught.value, kinds.get(status, openai.APIStatusError))


def test_a_completion_of_nothing_is_refused(client):
    for prompt in ([], [[]], [999_999], [{}]):  # "" is the BOS alone: that is a prompt
        with pytest.raises(openai.BadRequestError, match="prompt: a text, a list of texts, or token ids"):
            client.completions.create(model="policy", prompt=prompt)


def test_requests_from_other_pages_and_broken_ones_are_refused(address):
    asking = Client(address)
    sent = {"model": "policy", "messages": TURN}
    for headers, status in (({"Origin": "https://evil.example"}, 403), ({"Host": "evil.example"}, 403)):
        got, body, _ = asking.ask("POST", "/v1/chat/completions", sent, headers)
        assert (got, set(body["error"])) == (status, {"message", "type", "param", "code"})
    assert asking.ask("POST", "/v1/chat/completions", raw=b"{")[0] == 400
    assert asking.ask("POST", "/v1/chat/completions", raw=b'{"model": "policy", "model": "policy"}')[0] == 400
    assert asking.ask("GET", "/v1/chat/completions")[0] == 405
    assert asking.ask("GET", "/v1/nothing")[0] == 404
    status, _, headers = asking.ask("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_too_many_requests_are_told_to_wait(folder, path):
    few = limits.Limits(body=1_048_576, rate=0.01, burst=2, waiting=4)
    with serving_cases.service(folder, limits=few) as (address, _), client_of(address) as client:
        with pytest.raises(openai.InternalServerError, match="0 requests wait for a free slot") as caught:
            client.completions.create(model="policy", prompt=["1"] * 5)
        assert caught.value.status_code == 503
        client.models.list()
        with pytest.raises(openai.RateLimitError, match="too many requests") as caught:
            client.models.list()
        assert int(caught.value.response.headers["Retry-After"]) > 0


def test_tokens_are_those_of_the_accounts(folder, path):
    with contextlib.closing(store.open_store(path)) as db:
        token = accounts.create(db, "ann")
    with serving_cases.service(folder, store=path, people=("ann",)) as (address, _):
        with client_of(address, token) as client:
            assert client.completions.create(model="policy", prompt="1+1=").choices[0].finish_reason
        with client_of(address, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
    with pytest.raises(ValueError, match="ask for tokens"):
        serving_cases.serve.site_of(serving_cases.config(folder, host="0.0.0.0"))
    with pytest.raises(ValueError, match="there is no store"):
        serving_cases.serve.site_of(serving_cases.config(folder, ask_share=0.5))


def test_a_client_that_goes_away_leaves_its_slots(running):
    address, engine = running
    place = urllib.parse.urlsplit(address).netloc
    for stream in (True, False):
        sent = {"model": "policy", "messages": TURN, "n": 8, "temperature": 2.0, "top_p": 1.0, "stream": stream}
        given = []
        real = engine.submit

        def noting(*asked, real=real, given=given):
            given.extend(real(*asked))
            return given

        engine.submit = noting
        try:
            connection = http.client.HTTPConnection(place, timeout=60)
            connection.request("POST", "/v1/chat/completions", json.dumps(sent), {"Content-Type": "application/json"})
            for _ in range(2000):
                if given:
                    break
                time.sleep(0.005)
            connection.sock.close()
            connection.close()
            for _ in range(2000):
                if given and all(one.cancelled for one in given):
                    break
                time.sleep(0.005)
            assert len(given) == 8
            assert all(one.cancelled for one in given)
        finally:
            del engine.submit


# ------------------------------------------------------------------------------------------------ another policy


def test_a_promoted_policy_is_served_and_none_of_16_streams_is_dropped(folder, tmp_path):
    """Streams run all the time while the symlink is replaced; each is what its own policy writes, whole."""
    second, link = serving_cases.policy(tmp_path / "second", 1), tmp_path / "policy"
    serving_cases.promote(link, folder)
    with serving_cases.service(link, look=0.05) as (address, engine), client_of(address) as client:
        old, found, lock = engine.bench.policy.version, [], threading.Lock()
        promoted = threading.Event()

        def stream(seed: int) -> None:
            while True:
                done = promoted.is_set()  # before this one began
                text, versions, end = "", set(), None
                for chunk in client.completions.create(model="policy", prompt="12+34=", seed=seed, stream=True):
                    text += chunk.choices[0].text
                    end = chunk.choices[0].finish_reason or end
                    versions.add(chunk.system_fingerprint)
                with lock:
                    found.append((tuple(versions), seed, text, end))
                if done:
                    return

        def swap() -> None:
            serving_cases.promote(link, second)
            for _ in range(6000):
                if engine.bench.policy.version != old:
                    break
                time.sleep(0.01)
            promoted.set()

        together([*(lambda seed=seed: stream(seed) for seed in range(16)), swap])
        new = engine.bench.policy.version
        assert new != old
        assert {versions for versions, *_ in found} == {(old,), (new,)}
        assert all(end in ("stop", "length") for *_, end in found)
        assert len({(versions, seed): text for versions, seed, text, _ in found}) == len(
            {(versions, seed, text) for versions, seed, text, _ in found}
        ), "one policy and seed, one text"
        assert len(found) >= 32


def test_a_folder_that_cannot_be_served_leaves_the_policy(folder, tmp_path):
    link, broken = tmp_path / "policy", tmp_path / "broken"
    serving_cases.promote(link, folder)
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with serving_cases.service(link, look=3600) as (address, engine), client_of(address) as client:
        old = engine.bench.policy.version
        with contextlib.closing(
            watch.Watch(link, lambda _: pytest.fail("not to be loaded"), engine, watch.place(link), 3600)
        ) as look:
            assert not look.look()

            def load(place):
                raise ValueError(f"{place}: damaged")

            look._load = load
            serving_cases.promote(link, broken)
            assert not look.look()
            link.unlink()
            assert not look.look()
        assert engine.bench.policy.version == old
        assert client.completions.create(model="policy", prompt="1+1=").system_fingerprint == old


# ------------------------------------------------------------------------------------------------ what people say


def test_choices_and_thumbs_are_kept_with_consent_and_never_without(address, path):
    asking = Client(address)
    sent = {"model": "policy", "messages": TURN, "n": 2, "seed": 1, "store": True, "user": "u1"}
    status, body, _ = asking.ask("POST", "/v1/chat/completions", sent)
    assert status == 200
    judged = {"completion": body["id"], "user": "u1"}
    chosen, rated = judged | {"choice": "right"}, judged | {"index": 0, "good": False}
    for route, what in (("choices", chosen), ("ratings", rated)):
        status, refused, _ = asking.ask("POST", f"/api/{route}", what)
        assert (status, refused["error"]["code"]) == (403, "consent")
    with contextlib.closing(store.open_store(path)) as db:
        assert store.pairs(db) == []
        assert unpaired.ratings(db) == []
    assert asking.ask("POST", "/api/consent", {"given": True, "user": "u1"})[0] == 200
    for _ in range(2):  # sent twice is said once
        assert asking.ask("POST", "/api/choices", chosen)[0] == 200
        assert asking.ask("POST", "/api/ratings", rated)[0] == 200
    assert asking.ask("POST", "/api/ratings", judged | {"index": 2, "good": True})[0] == 400
    assert asking.ask("POST", "/api/choices", chosen | {"user": "u2"})[0] == 404
    assert asking.ask("POST", "/api/choices", chosen | {"completion": "chatcmpl-0"})[0] == 404
    status, unstored, _ = asking.ask("POST", "/v1/chat/completions", sent | {"store": False})
    assert asking.ask("POST", "/api/choices", chosen | {"completion": unstored["id"]})[0] == 404
    texts = [choice["message"]["content"] for choice in body["choices"]]
    with contextlib.closing(store.open_store(path)) as db:
        (pair,), (choice,) = store.pairs(db), store.choices(db)
        assert (pair.prompt, pair.response_a, pair.response_b) == ("12+34=", *texts)
        assert (choice.labeler, choice.preferred) == ("visitor u1", "b")
        assert unpaired.rows(db) == [{"prompt": "12+34=", "completion": texts[0], "label": False}]
        assert unpaired.ratings(db)[0].checkpoint == body["system_fingerprint"] == pair.checkpoint_a
    assert asking.ask("POST", "/api/consent", {"given": False, "user": "u1"})[0] == 200
    assert asking.ask("POST", "/api/ratings", rated | {"good": True})[0] == 403
