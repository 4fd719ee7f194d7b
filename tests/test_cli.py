"""Settings from flags, presets and files, and how a script ends."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Literal

import pytest

from jaxrlhf.training import cli
from jaxrlhf.training.optimizer import OptimizerConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Sampler:
    temperature: float = 0.8
    stop: tuple[int, ...] = (2,)


@dataclasses.dataclass(frozen=True)
class Settings:
    out: Path = Path("runs/x")
    steps: int = 10
    labeler: Literal["human", "simulated"] = "simulated"
    target: float | None = None
    sampler: Sampler = Sampler()
    optimizer: OptimizerConfig = OptimizerConfig(name="muon")
    judge: Sampler | OptimizerConfig = OptimizerConfig()  # one of two kinds, told apart by their fields


PRESETS = {"default": Settings(steps=20), "smoke": Settings(steps=3)}


def parse(*argv: str, presets=None) -> Settings:
    return cli.parse(Settings, argv, PRESETS if presets is None else presets)


def test_defaults_presets_and_flags():
    assert cli.parse(Settings, ()) == Settings()
    assert parse() == Settings(steps=20)
    assert parse("--preset", "smoke") == parse("--preset=smoke") == Settings(steps=3)
    changed = parse("--preset", "smoke", "--sampler.temperature", "1", "--optimizer.name", "adamw", "--target", "6")
    assert changed == Settings(steps=3, target=6.0, sampler=Sampler(temperature=1.0), optimizer=OptimizerConfig(name="adamw"))


def test_the_model_that_a_script_starts_from_has_one_more_name(capsys):
    for argv in (("--model", "runs/y"), ("--model=runs/y",), ("--steps", "20", "--model", "runs/y")):
        assert cli.parse(Settings, argv, PRESETS, model="out") == Settings(steps=20, out=Path("runs/y"))
    assert cli.parse(Settings, ("--out", "runs/y"), PRESETS, model="out").out == Path("runs/y")
    with pytest.raises(ValueError, match="--model and --out are one setting"):
        cli.parse(Settings, ("--model", "runs/y", "--out=runs/z"), PRESETS, model="out")
    with pytest.raises(SystemExit):
        cli.parse(Settings, ("--help",), PRESETS, model="out")
    assert "--model PATH is another name of --out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.parse(Settings, ("--model", "runs/y"), PRESETS)


def test_a_run_is_repeated_from_its_settings_with_flags_on_top(tmp_path):
    settings = Settings(
        out=Path("runs/y"), steps=7, target=0.00003, sampler=Sampler(0.5, (2, 5)), judge=Sampler(temperature=2.0)
    )
    path = tmp_path / "config.yaml"
    path.write_text(cli.dump(settings))
    assert cli.load(Settings, path) == settings
    assert parse("--config", str(path)) == settings
    again = parse(f"--config={path}", "--steps", "9", "--sampler.stop", "3", "4")
    assert again == dataclasses.replace(settings, steps=9, sampler=Sampler(0.5, (3, 4)))


SCRIPTS = sorted(
    p.stem
    for p in (ROOT / "experiments").glob("*.py")
    if "cli.main(" in p.read_text(encoding="utf-8") and p.stem != "inspect_run"
)  # which makes no run


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_settings_of_every_script_come_back_from_its_config_yaml(tmp_path, name):
    cls = importlib.import_module(f"experiments.{name}").Config
    (tmp_path / "config.yaml").write_text(cli.dump(cls()))
    assert cli.load(cls, tmp_path / "config.yaml") == cls()


def test_a_file_may_leave_settings_out_and_write_numbers_as_people_do(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("steps: 4\noptimizer:\n  learning_rate: 3e-5\n")  # YAML reads 3e-5 as text
    assert cli.load(Settings, path) == Settings(steps=4, optimizer=OptimizerConfig(learning_rate=3e-5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 3", r"unknown setting 'stepps' \(did you mean 'steps'\?\)"),
        ("sampler:\n  temprature: 1", r"unknown setting 'sampler\.temprature' \(did you mean 'temperature'\?\)"),
        ("judge:\n  temprature: 1", r"unknown setting 'judge\.temprature'"),
        ("zzz: 1", r"unknown setting 'zzz'$"),
        ("steps: many", r"steps: .*integer.*\(got 'many'\)"),
        ("labeler: robot", r"labeler: .*'human' or 'simulated'.*\(got 'robot'\)"),
        ("optimizer:\n  learning_rate: -1", r"optimizer: .*learning_rate=-1\.0 must be > 0"),
        ("sampler: [1]", r"sampler: .*\(got \[1\]\)"),
        ("- 1\n- 2", "holds no settings.*found list"),
        ("a: [1", "not readable YAML"),
    ],
)
def test_a_bad_file_is_named_with_the_setting(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        parse("--config", str(path))
    assert "bad.yaml" in str(caught.value)


def test_wrong_words_get_a_suggestion(capsys):
    with pytest.raises(ValueError, match=r"unknown preset 'smok' \(did you mean 'smoke'\?\); there are: default, smoke"):
        parse("--preset", "smok")
    with pytest.raises(ValueError, match="unknown preset 'big'; there are: none"):
        parse("--preset", "big", presets={})
    with pytest.raises(ValueError, match=r"unknown flag --presset \(did you mean '--preset'\?\)"):
        parse("--presset", "smoke")
    with pytest.raises(ValueError, match="--preset needs a value"):
        parse("--preset")
    with pytest.raises(ValueError, match="give one of them"):
        parse("--preset", "smoke", "--config", "x.yaml")
    with pytest.raises(FileNotFoundError, match="no settings file none"):
        parse("--config", "none.yaml")
    with pytest.raises(SystemExit) as ended:
        parse("--optimizer.learningrate", "1")
    assert ended.value.code == 2
    assert "--optimizer.learning-rate" in capsys.readouterr().err


SCRIPT = '''
"""A script for the test."""
from __future__ import annotations
import atexit, dataclasses, sys
from pathlib import Path
from jaxrlhf.models.config import TransformerConfig
from jaxrlhf.training import cli
from jaxrlhf.training.optimizer import OptimizerConfig

@dataclasses.dataclass(frozen=True)
class Config:
    out: Path = Path("x")
    fail: str = ""
    model: TransformerConfig = TransformerConfig(8, 8, 1, 1, 1, 8, 8, 8)
    optimizer: OptimizerConfig = OptimizerConfig()

def run(config):
    if config.fail == "ours":
        raise ValueError("the batch of 3 rows\\n does not fit; choose 4")
    if config.fail == "missing":
        open("/does/not/exist")
    if config.fail == "interrupt":
        raise KeyboardInterrupt
    if config.fail == "library":
        import json
        json.loads("{")
    print("ran")

if __name__ == "__main__":
    atexit.register(lambda: print("HEAVY", sorted({"jax", "flax", "optax", "transformers"} & set(sys.modules))))
    cli.main(run, Config, {"smoke": Config()})
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT).lstrip())
    return path


def call(script, *argv: str):
    return subprocess.run([sys.executable, str(script), *argv], capture_output=True, text=True, check=False)


def test_help_imports_neither_jax_nor_transformers(script):
    done = call(script, "--help")
    assert done.returncode == 0
    assert "HEAVY []" in done.stdout
    for word in (
        "A script for the test.",
        "--preset NAME",
        "smoke",
        "--config FILE",
        "--optimizer.learning-rate",
        "of all steps",
    ):
        assert word in " ".join(done.stdout.split()), word


@pytest.mark.parametrize(
    ("argv", "code", "error"),
    [
        (["--fail", "ours"], 2, "script.py: the batch of 3 rows does not fit; choose 4\n"),
        (["--fail", "missing"], 2, "script.py: [Errno 2] No such file or directory: '/does/not/exist'\n"),
        (["--config", "nowhere.yaml"], 2, "script.py: no settings file nowhere.yaml: give --config"),
        (["--fail", "interrupt"], 130, ""),
    ],
)
def test_bad_input_is_one_line_and_exit_2(script, argv, code, error):
    done = call(script, *argv)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == (1 if error else 0)


def test_flags_of_the_process_are_taken_out_of_the_settings():
    argv = ["--steps", "3", "--max-minutes", "1.5", "--stop-on-alarm", "--from-step=20", "--save-seconds", "0"]
    found = cli.take_session(argv)
    assert argv == ["--steps", "3"]
    assert (found.max_minutes, found.from_step, found.save_seconds, found.stop_on_alarm) == (1.5, 20, 0.0, True)
    assert found.left() < 90  # the process began before
    assert cli.take_session(argv).left() == float("inf")


NONSENSE = ("--max-minutes 0", "--max-minutes soon", "--from-step -1", "--from-step 1.5", "--save-seconds nan")


@pytest.mark.parametrize("argv", [text.split() for text in NONSENSE], ids=NONSENSE)
def test_flags_of_the_process_that_make_no_sense_are_refused(argv):
    with pytest.raises(ValueError, match=rf"{argv[0]} {argv[1]}: give a number from"):
        cli.take_session(argv)


def test_going_back_where_there_is_nothing_to_go_back_to_is_said(script):
    done = call(script, "--from-step", "3")
    assert done.returncode == 2
    assert "script.py: --from-step 3: no stage went on from a checkpoint" in done.stderr


def test_an_error_out_of_another_library_keeps_its_traceback(script):
    done = call(script, "--fail", "library")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "JSONDecodeError" in done.stderr
    assert "ran" in call(script).stdout


def test_compiled_programs_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch):
    import jax

    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    cli.keep_programs()  # the tests' own folder is named in the environment
    assert not changed
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    cli.keep_programs()  # cannot be written: do without
    assert not changed
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.keep_programs()
    folder = Path(changed["jax_compilation_cache_dir"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "jaxrlhf"


FAULTS = """
import resource
from jaxrlhf.training import cli
KEEP
import jax, jax.numpy as jnp

def temporaries(x):  # 64 MB of them
    _, ys = jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, length=16)
    return jnp.flip(ys, 0).sum() * ys[3]

program, x = jax.jit(temporaries), jnp.ones(2**20)
counts = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(counts[4:])[6])  # the middle one: heaps may still grow now and then
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is Linux's")
def test_memory_that_programs_used_is_kept():
    """Pages that the kernel clears for a call: thousands by default, none kept."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    found = []
    for keep, environment in (("", bare), ("cli.keep_memory()", bare), ("cli.keep_memory()", bare | {"MALLOC_PERTURB_": "0"})):
        code = FAULTS.replace("KEEP", keep)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        found.append(int(done.stdout))
    given, kept, own = found
    assert given > 5000
    assert kept < 100
    assert own > 5000  # who sets a variable of malloc decides
