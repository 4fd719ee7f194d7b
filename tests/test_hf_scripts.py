"""A checkpoint with a tokenizer of its own kind through the scripts, and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import gguf_files
import hf_weights
import jax
import numpy as np
import pytest
import tokenizers as library
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from experiments import export_hf, import_hf, sft, stage
from jaxrlhf.core import sharding
from jaxrlhf.data import comparisons, gguf_tokenizer, pipeline
from jaxrlhf.data import tokenizer as tokenizers
from jaxrlhf.models import gguf, hf, transformer
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.rewards import model as rewards

ONE = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
TEXTS = ["the film is good", "a bad film, but a good end", "what a film that was", "he said it was the end"] * 5
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def bpe(size: int, special: list[str], alphabet: list[str] | None = None) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet or [], show_progress=False, max_token_length=8
    )


def gpt2() -> library.Tokenizer:
    """Bytes, no space before the first word, one token for everything special."""
    made = library.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(TEXTS, bpe(300, ["<|endoftext|>"], pre_tokenizers.ByteLevel.alphabet()))
    return made


def llama3() -> library.Tokenizer:
    """As GPT-2's, but BOS is put before every text unless told not to."""
    made = gpt2()
    made.add_special_tokens(["<|begin|>", "<|end|>"])
    template = {"single": "<|begin|> $A", "special_tokens": [("<|begin|>", made.token_to_id("<|begin|>"))]}
    made.post_processor = processors.TemplateProcessing(**template)
    return made


def llama2() -> library.Tokenizer:
    """SentencePiece as Llama 2 has it: a space is put before the text by the normaliser and taken away by the decoder."""
    made = library.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge across words
    made.train_from_iterator(TEXTS, bpe(90, ["<unk>", "<s>", "</s>"]))
    made.pre_tokenizer = None
    return made


def mistral() -> library.Tokenizer:
    """SentencePiece as later files have it: the same by the pre-tokeniser."""
    made = library.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="first"),
    )
    made.train_from_iterator(TEXTS, bpe(90, ["<unk>", "<s>", "</s>"]))
    return made


SPECIAL = {
    gpt2: {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    llama3: {"bos_token": {"content": "<|begin|>"}, "eos_token": {"content": "<|end|>"}, "pad_token": None},
    llama2: {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"},
    mistral: {"bos_token": "<s>", "eos_token": "</s>"},
}
KINDS = pytest.mark.parametrize("kind", SPECIAL, ids=lambda kind: kind.__name__)


def write(folder: pathlib.Path, kind) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    kind().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL[kind] | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@KINDS
def test_a_checkpoints_tokenizer_reads_and_writes_as_its_library_does(kind, tmp_path):
    tokenizer, theirs = tokenizers.load(write(tmp_path, kind)), kind()
    for text in TEXTS[:4]:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids  # no BOS of its own: rows get exactly one
        assert tokenizer.decode(ids) == text == theirs.decode(ids)
        start, rest = text[: text.index(" ")], text[text.index(" ") :]
        parts = tokenizer.encode(start), tokenizer.encode(rest, continuation=True)
        assert parts[0] + parts[1] == ids
        assert tokenizer.decode(parts[1], continuation=True) == rest
    words = [i for i in tokenizer.encode("the film is good") if tokenizer.starts_word[i]]
    assert 3 <= len(words) <= 4


@KINDS
def test_special_tokens_are_found_and_cannot_be_forged(kind, tmp_path):
    tokenizer, made = tokenizers.load(write(tmp_path, kind)), kind()
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in SPECIAL[kind].items()}
    assert tokenizer.eos == made.token_to_id(named["eos_token"])
    assert tokenizer.bos == made.token_to_id(named["bos_token"])
    assert tokenizer.pad == (made.token_to_id(named["pad_token"]) if named.get("pad_token") else tokenizer.eos)
    assert {tokenizer.bos, tokenizer.eos}.isdisjoint(tokenizer.encode(f"the {named['eos_token']} {named['bos_token']}"))
    spec = stage.spec(stage.Sampling(), tokenizer)
    assert spec.stop == (tokenizer.eos,)
    assert tokenizer.eos not in spec.forbidden  # else nothing would ever end
    assert (tokenizer.bos in spec.forbidden) == (tokenizer.bos != tokenizer.eos)


@KINDS
def test_a_tokenizer_is_written_as_it_was_read(kind, tmp_path):
    tokenizer = tokenizers.load(write(tmp_path / "a", kind))
    tokenizer.save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == TEMPLATE


def test_special_tokens_that_config_json_alone_names(tmp_path):
    """As in GPT-2's own files. What is saved names them, since a model folder of ours has another config.json."""
    write(tmp_path / "in", llama3)
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    made = llama3()
    ids = {
        "bos_token_id": made.token_to_id("<|begin|>"),
        "eos_token_id": [made.token_to_id("<|end|>"), 5],
        "pad_token_id": None,
    }
    (tmp_path / "in" / "config.json").write_text(json.dumps(ids))
    tokenizer = tokenizers.load(tmp_path / "in")
    tokenizer.save(tmp_path / "out")
    for each in (tokenizer, tokenizers.load(tmp_path / "out")):
        assert (each.bos, each.eos, each.pad) == (ids["bos_token_id"], ids["eos_token_id"][0], ids["eos_token_id"][0])
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"model_max_length": 1024, "bos_token": "<|begin|>", "eos_token": "<|end|>"}


def test_special_tokens_that_do_not_fit_are_refused(tmp_path):
    file = write(tmp_path, gpt2) / "tokenizer_config.json"
    file.write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    with pytest.raises(ValueError, match="eos_token is missing: without it no text ends"):
        tokenizers.load(tmp_path)
    file.write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(ValueError, match=r"eos_token='</s>' is not in the vocabulary of tokenizer.json"):
        tokenizers.load(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: not readable JSON"):
        tokenizers.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config.json: no such file"):
        tokenizers.load(tmp_path)


# --------------------------------------------------------------------------------------------------- the scripts


def checkpoint(folder: pathlib.Path, name: str, reward: str = "") -> pathlib.Path:
    """A golden checkpoint with a tokenizer, and the golden itself."""
    case = json.loads((GOLDEN / "hf.json").read_text())[name]
    write(folder, llama2)
    (folder / "config.json").write_text(json.dumps(case[f"{reward}config"]))
    save_file(hf_weights.weights(case[f"{reward}shapes"]), folder / "model.safetensors")
    what = "scores" if reward else "logits"
    np.savez(folder / "golden.npz", **{"tokens": hf_weights.tokens(96), what: np.load(GOLDEN / "hf.npz")[f"{name}/{what}"]})
    return folder


@pytest.mark.parametrize(("name", "reward"), [("mistral", ""), ("gpt2", "reward_")])
def test_import_and_export(name, reward, tmp_path, capsys):
    source = checkpoint(tmp_path / "in", name, reward)
    config = import_hf.Config(source, tmp_path / "model", golden=source / "golden.npz", max_length=20)
    result = import_hf.run(config)
    assert result["difference"] < 1e-5
    assert f"parity: greatest difference {result['difference']:.2e}" in capsys.readouterr().out
    kind = "reward_model" if reward else "policy"
    loaded = stage.load(tmp_path / "model", ONE, kind)
    assert loaded.config.max_length == 20
    assert loaded.tokenizer.encode("a film") == tokenizers.load(source).encode("a film")
    if reward:
        tokens, length = hf_weights.tokens(96).astype(np.int32), np.array([14, 14])
        score = rewards.score(
            loaded.model, loaded.params, *map(jax.numpy.asarray, (tokens, length)), loaded.settings["pooling"]
        )
        np.testing.assert_allclose(score, np.load(source / "golden.npz")["scores"], atol=5e-5)  # at default precision
    exported = export_hf.run(export_hf.Config(tmp_path / "model", tmp_path / "out", compare=True))
    assert exported["difference"] == 0
    assert "parity: greatest difference 0.00e+00 after reading it back" in capsys.readouterr().out
    assert np.load(tmp_path / "out" / "ours.npz")["outputs"].shape == ((2,) if reward else (2, 20, 96))
    theirs, ours = (load_file(tmp_path / way / "model.safetensors") for way in ("in", "out"))
    assert theirs.keys() == ours.keys()
    for tensor in theirs.keys() - {"transformer.wpe.weight"}:
        np.testing.assert_array_equal(ours[tensor], theirs[tensor])
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    with pytest.raises(ValueError, match="out exists and is not empty"):
        export_hf.run(export_hf.Config(tmp_path / "model", tmp_path / "out"))


def test_a_gguf_file_becomes_a_model_folder(tmp_path):
    file, size = gguf_files.tiny(tmp_path / "tiny.gguf")
    params, config = gguf.load(gguf.open_file(file), ONE)
    model, rows = transformer.build(config), jax.numpy.asarray(hf_weights.tokens(96), np.int32)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p: model.logits(p, model.hidden(p, rows)))(params)
    np.savez(tmp_path / "golden.npz", tokens=rows, logits=logits)
    settings = import_hf.Config(file, tmp_path / "model", golden=tmp_path / "golden.npz", max_length=20)
    result = import_hf.run(settings)
    assert (result["kind"], result["model_type"], result["parameters"]) == ("policy", "llama", size)
    assert result["difference"] < 1e-6
    loaded = stage.load(tmp_path / "model", ONE)
    assert loaded.config == dataclasses.replace(config, max_length=20)
    tokenizer = gguf_tokenizer.from_metadata(gguf_files.tokenizer_metadata("smollm"), "tiny.gguf")
    assert loaded.tokenizer.files == tokenizer.files
    assert loaded.tokenizer.encode("a  12") == tokenizer.encode("a  12")
    exported = export_hf.run(export_hf.Config(tmp_path / "model", tmp_path / "out"))
    assert exported["architecture"] == "LlamaForCausalLM"


def test_a_checkpoint_that_is_not_the_goldens_is_refused(tmp_path):
    source = checkpoint(tmp_path / "in", "mistral")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"sliding_window": None}))
    with pytest.raises(ValueError, match=r"our logits differ from .*golden.npz by .*more than tolerance=0.0002"):
        import_hf.run(import_hf.Config(source, tmp_path / "model", golden=source / "golden.npz"))
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    source = write(checkpoint(tmp_path / "in", "mistral"), gpt2)
    with pytest.raises(ValueError, match="the tokenizer has 292 ids, but the embedding has vocab_size=96 rows"):
        import_hf.run(import_hf.Config(source, tmp_path / "model"))
    import_hf.run(import_hf.Config(checkpoint(tmp_path / "good", "mistral"), tmp_path / "model"))
    write(tmp_path / "model", gpt2)  # nor where a stage begins: the device would read another row in silence
    with pytest.raises(ValueError, match="the tokenizer has 292 ids, but the embedding has vocab_size=96 rows"):
        stage.load(tmp_path / "model", ONE)


def test_what_transformers_cannot_hold_is_not_exported(tmp_path):
    import_hf.run(import_hf.Config(checkpoint(tmp_path / "in", "gpt2", "reward_"), tmp_path / "model"))
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"pooling": "mean"}))
    with pytest.raises(ValueError, match="read from the mean of all states"):
        export_hf.run(export_hf.Config(tmp_path / "model", tmp_path / "out"))
    file.write_text(json.dumps(settings | {"kind": "thesis"}))
    with pytest.raises(ValueError, match="holds a thesis, not a policy or reward_model"):
        export_hf.run(export_hf.Config(tmp_path / "model", tmp_path / "out"))


def imported(folder: pathlib.Path) -> pathlib.Path:
    """A model folder made of a checkpoint in the style of Qwen3, its tokenizer GPT-2's."""
    config = TransformerConfig(300, 16, 1, 2, 1, 8, 24, 64, qk_norm=True, tied_head=False)
    params = jax.jit(transformer.build(config).init)(jax.random.key(0))
    hf.save(folder / "in", params, config, tokenizers.load(write(folder / "tokenizer", gpt2)))
    import_hf.run(import_hf.Config(folder / "in", folder / "model", dtype="bfloat16"))
    return folder / "model"


def test_rows_begin_and_end_with_the_checkpoints_own_ids(tmp_path):
    tokenizer = tokenizers.load(imported(tmp_path))
    assert tokenizer.eos == 0  # not ours, which is 2
    for rows in sft.rows(tokenizer):
        ends = (rows["prompt_len"] + rows["response_len"] - 1)[:, None]
        assert (rows["tokens"][:, 0] == tokenizer.bos).all()
        assert (np.take_along_axis(rows["tokens"], ends, 1) == tokenizer.eos).all()
    texts = ["a film that", "the end"]
    for prompts in (
        pipeline.text_prompts(texts, tokenizer, 16),
        pipeline.cut_prompts(tokenizer.encode_batch(TEXTS), tokenizer, 0),
        pipeline.turn_prompts(tokenizer.encode_batch(texts), bos=tokenizer.bos, eos=tokenizer.eos),
    ):
        assert (np.asarray(prompts.tokens)[:, 0] == tokenizer.bos).all()
    pair = {"prompt": "the film", "chosen": " is good", "rejected": " is bad", "label": 1.0}
    [(width, chosen, rejected)] = comparisons._encode_pairs([pair], tokenizer)
    assert chosen[0] == rejected[0] == tokenizer.bos
    assert chosen[-1] == rejected[-1] == tokenizer.eos
    assert tokenizer.decode(chosen[width:], continuation=True) == " is good"


@pytest.mark.full
def test_fine_tuning_starts_from_an_imported_checkpoint(tmp_path):
    start = dataclasses.replace(sft.PRESETS["smoke"], init=imported(tmp_path), out=tmp_path / "sft", steps=3)
    result = sft.run(start)
    assert result["nll_per_token"] < result["nll_per_token_before"]
    export_hf.run(export_hf.Config(tmp_path / "sft" / "model", tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
