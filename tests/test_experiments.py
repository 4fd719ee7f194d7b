"""The scripts as a person runs them: the whole loop in small, killed and started again, and what bad input is told."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import time

import pytest
from scripts import ROOT, command, environment, script

from experiments import chat
from experiments import stage as stages
from jaxrlhf.core import sharding

STAGES = (
    "pretrain",
    "sft",
    "reward_model",
    "ppo",
    "evaluate",
    "sample_pairs",
    "label",
    "reward_model_2",
    "ppo_2",
    "evaluate_2",
)


def figures(run: pathlib.Path) -> dict[str, dict]:
    """Every stage's result without its times."""
    results = {stage: json.loads((run / stage / "result.json").read_text()) for stage in STAGES}
    for result in results.values():
        del result["seconds"], result["cpu_seconds"]
    return results


@pytest.fixture(scope="session")
def loop(tmp_path_factory) -> pathlib.Path:
    """A finished run of the whole loop, `--preset smoke`."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    done = script("rlhf", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(STAGES) + 1, f"a line a stage, and where to look: {done.stdout}"
    return out


def test_the_loop_leaves_a_report_and_the_policy_alone(loop):
    assert all((loop / stage / "result.json").is_file() for stage in STAGES)
    assert {path.name for path in (loop / "policy").iterdir()} == {
        "params.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    summary = json.loads((loop / "summary.json").read_text())
    assert summary
    page = (loop / "report.html").read_text()
    assert "simulated" in page, "the page must say who chose"
    assert (loop / "report.md").is_file()


def test_metrics_hold_each_step_once_and_tensorboard_files_exist(loop):
    for stage in ("pretrain", "sft", "reward_model", "ppo"):
        steps = [json.loads(line)["step"] for line in (loop / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)), stage
        assert list((loop / stage / "tensorboard").iterdir()), stage


def test_reference_before_training_is_itself(loop):
    """KL 0 at iteration 0, and the fine-tuned model against itself wins about half."""
    first = json.loads((loop / "ppo" / "result.json").read_text())["curve"][0]
    assert first["step"] == 0
    assert abs(first["held_out/kl"]) < 1e-5
    again = json.loads((loop / "evaluate" / "result.json").read_text())["baseline_again"]
    assert again["kl"] == 0
    for rate, low, high in again["win_rate"].values():
        assert low < 0.5 < high, rate


def test_a_finished_loop_is_not_done_again(loop):
    before = {path: path.stat().st_mtime_ns for path in loop.glob("*/result.json")}
    done = script("rlhf", "--preset", "smoke", "--out", loop)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in loop.glob("*/result.json")}


def kill_at_random(out: pathlib.Path, kills: int, horizon: float, seed: int) -> None:
    """Start the loop, kill it (SIGKILL) `kills` times at random moments, then let it finish."""
    moments = random.Random(seed)
    for _ in range(kills):
        process = subprocess.Popen(
            command("rlhf", "--preset", "smoke", "--out", out),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=moments.uniform(2, horizon))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = script("rlhf", "--preset", "smoke", "--out", out)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.parametrize("kills", [2, 5])
def test_a_killed_loop_ends_with_the_same_figures(loop, tmp_path, kills):
    kill_at_random(tmp_path / "killed", kills, horizon=25, seed=kills)
    assert figures(tmp_path / "killed") == figures(loop)


@pytest.mark.full
def test_four_roles_on_one_trunk(loop, tmp_path):
    """Reward and critic as adapters over the policy's start: the reward is that of its merged model, and no trunk is added."""
    start, reward = loop / "sft" / "model", tmp_path / "reward_model"
    flags = ("--model", start, "--reference", start, "--lora.rank", 4, "--lora.targets", "query", "down", "--out", reward)
    done = script("reward_model", "--preset", "smoke", *flags)
    assert done.returncode == 0, done.stderr
    first = []
    for name in ("adapter", "model"):
        out = tmp_path / f"ppo_{name}"
        flags = ("--model", start, "--reward", reward / name, "--critic", "reward", "--lora.rank", 2, "--out", out)
        done = script("ppo", "--preset", "smoke", *flags)
        assert done.returncode == 0, done.stderr
        rows = json.loads((out / "memory.json").read_text())["rows"]
        held = {(row["role"], row["kind"]): row["size"]["total"] for row in rows}
        assert (held["reward", "frozen"] < held["base and reference", "frozen"] / 5) == (name == "adapter")
        assert (held["critic", "parameters"] < held["base and reference", "frozen"] / 5) == (name == "adapter")
        first.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    # 0.03: scores of deviation 1 through products of bfloat16 operands, which round W + s A B once and its parts apart.
    assert first[0]["reward/score"] == pytest.approx(first[1]["reward/score"], abs=0.03)


@pytest.mark.full
def test_the_control_and_the_over_optimised_run(tmp_path):
    done = script("rlhf", "--preset", "smoke", "--control", "--overoptimize", "--out", tmp_path / "more")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "more" / "summary.json").read_text())["results"]
    narrow = json.loads((tmp_path / "more" / "reward_model_narrow" / "result.json").read_text())
    assert narrow["accuracy"]["model"] != results["reward_model"]["accuracy"]["model"]  # it read the ratings of movies alone
    for stage in ("overoptimize", "overoptimize_narrow"):
        assert results[stage]["curve"][-1]["held_out/kl"] > 0
    assert results["evaluate_control"]["candidate"]["kl"] != results["evaluate_2"]["candidate"]["kl"]


def test_chat_answers_from_the_policy_alone(loop, tmp_path):
    (loop / "policy").rename(tmp_path / "policy")  # away from everything else
    try:
        one = script("chat", "--policy", tmp_path / "policy", "--prompt", "this film is")
        assert one.returncode == 0, one.stderr
        assert one.stdout.startswith("this film is")
        assert len(one.stdout.strip()) > len("this film is")
        many = script("chat", "--policy", tmp_path / "policy", "--task", "reply", stdin="hello\nhow are you\n")
        assert many.returncode == 0, many.stderr
        assert len(many.stdout.strip().splitlines()) == 2
    finally:
        (tmp_path / "policy").rename(loop / "policy")


def test_a_prompt_that_is_too_long_is_cut_by_option_only(loop, capsys):
    policy = stages.load(loop / "policy", sharding.make_mesh(sharding.MeshConfig()))
    config = chat.Config()
    spec, text = stages.spec(config.sampling, policy.tokenizer), "a good film " * 60
    room = policy.model.max_length - spec.max_tokens
    with pytest.raises(ValueError, match=rf"the prompt has \d+ tokens.*shorten it to {room} tokens.*--truncate"):
        chat.prompt_of(config, policy, spec, text, 0)
    cut = chat.prompt_of(dataclasses.replace(config, truncate=True), policy, spec, text, 0)
    ids = [policy.tokenizer.bos, *policy.tokenizer.encode(text.strip())]
    assert cut.tokens[0].tolist() == [policy.tokenizer.bos, *ids[len(ids) - room + 1 :]]
    assert f"first {len(ids) - room} tokens are left out" in capsys.readouterr().err


def test_chat_keeps_the_choice_for_the_next_round(loop, tmp_path):
    from jaxrlhf.feedback import store

    db = tmp_path / "feedback.sqlite"
    asked = script("chat", "--policy", loop / "policy", "--prompt", "a good film", "--ask", "--store", db, stdin="2\n")
    assert asked.returncode == 0, asked.stderr
    opened = store.open_store(db)
    (row,) = store.preferences(opened)
    opened.close()
    assert row["prompt"] == "a good film"
    assert row["labeler"] == "user"
    assert row["chosen"] != row["rejected"]
    assert f"2)  ... {row['chosen'].strip()}" in asked.stdout


def test_a_person_labels_at_the_terminal(loop, tmp_path):
    shutil.copy(loop / "feedback.sqlite", tmp_path / "feedback.sqlite")
    flags = ("--store", tmp_path / "feedback.sqlite", "--labeler", "human", "--name", "ann", "--out", tmp_path / "label")
    done = script("label", *flags, stdin="1\n2\nt\nu\nb\ns\nq\n")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "label" / "result.json").read_text())
    assert sum(result["choices"].values()) == 4, result  # the tie was taken back
    ((names, with_other),) = result["agreement"].items()  # with the loop's simulated person
    assert names == "ann and simulated-vader"
    assert with_other["pairs"] == 3  # the skipped pair is nobody's
    low, high = result["left"][1:]
    assert low < 0.5 < high


def test_a_sitting_that_ends_early_goes_on_with_the_same_command(loop, tmp_path):
    shutil.copy(loop / "feedback.sqlite", tmp_path / "feedback.sqlite")
    flags = ("--store", tmp_path / "feedback.sqlite", "--labeler", "human", "--name", "bob")
    flags += ("--least", 4, "--out", tmp_path / "label")
    first = script("label", *flags, stdin="1\n2\nq\n")
    assert first.returncode == 2, "too few choices: not done"
    assert "2 choices so far, 4 are needed" in first.stderr
    second = script("label", *flags, stdin="1\n2\nq\n")
    assert second.returncode == 0, second.stderr
    assert sum(json.loads((tmp_path / "label" / "result.json").read_text())["choices"].values()) == 4


@pytest.mark.full
def test_eight_devices_learn_what_one_learns(loop, tmp_path):
    """The same script on 8 host devices: data 2 x fsdp 2 x tensor 2."""
    mesh = ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    flags = ("--preset", "smoke", "--init", loop / "pretrain" / "model", "--out", tmp_path / "sft")
    done = script("sft", *flags, *mesh, devices=8)
    assert done.returncode == 0, done.stderr
    one, eight = (json.loads((path / "sft" / "result.json").read_text())["nll_per_token"] for path in (loop, tmp_path))
    assert one == pytest.approx(eight, abs=2e-3)  # float32 sums in another order, through 20 updates


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("sft", "--init", "no/such/folder", "--out", "{tmp}/a"), "no/such/folder"),
        (("sft", "--init", "{tmp}", "--out", "{tmp}/a"), "no trained model"),
        (("sft", "--frozen", "int8", "--out", "{tmp}/a"), "lora.rank=0"),
        (("pretrain", "--preset", "smoke", "--out", "{tmp}"), "not empty"),
        (("pretrain", "--preset", "smoke", "--out", "/proc/nowhere"), "/proc/nowhere"),
        (("pretrain", "--preset", "smok", "--out", "{tmp}/a"), "smoke"),
        (("pretrain", "--config", "{tmp}/none.yaml"), "none.yaml"),
        (("pretrain", "--preset", "smoke", "--mesh.tensor", "3", "--out", "{tmp}/a"), "does not fit"),
        (("reward_model", "--preset", "smoke", "--choices", "{tmp}/none.sqlite", "--init", "{loop}/pretrain/model",
          "--reference", "{loop}/sft/model", "--out", "{tmp}/a"), "none.sqlite"),
        (("dpo", "--preset", "smoke", "--choices", "{tmp}/none.jsonl", "--policy", "{loop}/sft/model",
          "--reward", "{loop}/reward_model/model", "--out", "{tmp}/a"), "none.jsonl"),
        (("online_dpo", "--n", "1", "--out", "{tmp}/a"), "n=1"),
        (("label", "--store", "{tmp}/none.sqlite", "--out", "{tmp}/a"), "none.sqlite"),
        (("chat", "--policy", "{loop}/policy", "--prompt", "word " * 300), "context"),
        (("chat", "--policy", "{loop}/reward_model/model", "--prompt", "word"), "reward_model"),
        (("ppo", "--preset", "arithmetic", "--policy", "{loop}/policy", "--held-out-prompts", 513, "--out", "{tmp}/a"), "512"),
        (("sample_pairs", "--policies", "{loop}/policy", "--store", "{tmp}/mine.txt", "--out", "{tmp}/a"), "mine.txt"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_exit_code_2(loop, tmp_path, flags, told):
    (tmp_path / "mine.txt").write_text("do not touch")
    done = script(*(str(flag).format(tmp=tmp_path, loop=loop) for flag in flags))
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert told in lines[0]
    assert (tmp_path / "mine.txt").read_text() == "do not touch"
    assert not list((tmp_path / "a").glob("model")) if (tmp_path / "a").exists() else True


def test_a_misspelt_flag_gets_a_suggestion():
    done = script("ppo", "--algorithm.kl-coeff", "0.1")
    assert done.returncode == 2
    assert "--algorithm.kl-coef" in done.stdout + done.stderr


def test_help_is_quick():
    started = time.monotonic()
    done = script("rlhf", "--help")
    assert done.returncode == 0
    assert "--ppo.algorithm.kl-coef" in done.stdout
    assert time.monotonic() - started < 30  # a machine under load; the figure is in the README


@pytest.mark.full
@pytest.mark.parametrize("kind", ["heads", "adapters", "models"])
def test_an_ensemble_is_trained_and_ppo_reads_it(loop, tmp_path, kind):
    start = ("--reference", loop / "sft/model", "--init", loop / "pretrain/model")
    flags = ("--ensemble", 3, "--ensemble-of", kind, "--aggregation", "worst", "--normalise", "demonstrations")
    flags += ("--lora.rank", 4) if kind == "adapters" else ()
    small = ("--preset", "smoke", "--steps", 4, "--debias-length", "--head-init", "normal")
    done = script("reward_model", *small, *start, *flags, "--out", tmp_path / "reward")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "reward/result.json").read_text())
    assert len(result["members"]) == 3
    assert len({row["movie"] for row in result["members"]}) == 3  # each learned from data of its own
    assert abs(result["length_coef"]) < 1
    done = script("ppo", "--preset", "smoke", "--iterations", 1, "--policy", loop / "sft/model",
                  "--reward", tmp_path / "reward/model", "--out", tmp_path / "ppo")  # fmt: skip
    assert done.returncode == 0, done.stderr
    refreshed = script("reward_model", *small, *start, "--refresh", tmp_path / "reward/model", "--out", tmp_path / "again")
    assert refreshed.returncode == 2
    assert f"holds 3 {kind}" in refreshed.stderr


@pytest.mark.full
def test_over_optimisation_goes_on_where_it_stopped(loop, tmp_path):
    flags = (
        "--preset",
        "smoke",
        "--init",
        loop / "pretrain/model",
        "--policy",
        loop / "sft/model",
        "--gold",
        loop / "reward_model/model",
        "--out",
        tmp_path / "study",
    )
    done = script("overoptimization", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "study/result.json").read_text())
    assert {(row["size"], row["proxy"]) for row in result["best_of_n"]} == {
        (n, p) for n in ("1 layers, 16 choices", "2 layers, 32 choices") for p in ("0", "1", "worst")
    }
    for row in result["ppo"]:
        assert row["rows"][0]["kl"] == 0  # the fine-tuned model itself
    for row in result["best_of_n"]:
        proxy = [point["proxy"] for point in row["rows"]]
        assert proxy == sorted(proxy)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("**/model/config.json")}
    (tmp_path / "study/result.json").unlink()
    assert script("overoptimization", *flags).returncode == 0
    assert json.loads((tmp_path / "study/result.json").read_text())["ppo"] == result["ppo"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.full
def test_dpo_samples_its_own_pairs_where_there_are_none(loop, tmp_path):
    """A simulated person chooses between the policy's own reviews."""
    flags = ("--policy", loop / "sft" / "model", "--reward", loop / "reward_model" / "model", "--choices", "None")
    done = script("dpo", "--preset", "smoke", *flags, "--out", tmp_path / "dpo")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "dpo" / "result.json").read_text())
    assert [row["step"] for row in result["curve"]] == [0, 2, 4]
    assert abs(result["curve"][0]["held_out/kl"]) < 1e-5
    assert 0 <= result["curve"][-1]["held_out/pair_accuracy"] <= 1
    drawn = json.loads((tmp_path / "dpo" / "sample_pairs" / "result.json").read_text())
    assert result["pairs"]["train"] + result["pairs"]["held_out"]["preferences/pairs"] <= drawn["distinct"]
    first = json.loads((tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss/dpo"] == pytest.approx(0.6931, abs=1e-3)  # before the first update every implicit reward is 0


@pytest.mark.full
def test_choices_train_a_reward_model_from_a_file(loop, tmp_path):
    from jaxrlhf.data import sources
    from jaxrlhf.feedback import store

    opened = store.open_store(loop / "feedback.sqlite")
    sources.write_jsonl(tmp_path / "choices.jsonl", store.preferences(opened))
    opened.close()
    flags = ("--init", loop / "pretrain" / "model", "--reference", loop / "sft" / "model", "--steps", 4, "--pairs", 8)
    done = script("reward_model", "--preset", "smoke", *flags, "--choices", tmp_path / "choices.jsonl", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a" / "result.json").read_text())["choices"]["held_out"] > 0
