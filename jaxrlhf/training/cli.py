"""Settings from the command line and from YAML, and the way a script ends. Imports nothing heavy: `--help` is quick."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import signal
import sys
import threading
import traceback
import types
import typing
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxrlhf.training import session

C = TypeVar("C")

SESSION = """--max-minutes M saves and ends with exit code 75 before M minutes are over; the same command then goes on.
--from-step N goes on from checkpoint N and sets the newer ones aside. --save-seconds S saves every S seconds. --stop-on-alarm
ends a run whose loss jumps or whose KL runs away. None of these is a setting of the run."""


def parse(
    cls: type[C], argv: Sequence[str] | None = None, presets: Mapping[str, C] | None = None, about: str = "", model: str = ""
) -> C:
    """Settings of the dataclass `cls`: from `--preset NAME`, or all of them from `--config FILE`; flags override either.

    Without both, the preset called `default`, or else the defaults of `cls`. `model` is the setting that `--model PATH` is
    another name of: the model that a script starts from has one name in all of them.

    Raises:
        ValueError: unknown preset or setting (with a suggestion), a value of the wrong type, an unreadable file.
        SystemExit: 2 on a wrong flag, 0 after `--help`; tyro has printed why.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    preset, file = _take(argv, "--preset"), _take(argv, "--config")
    if model and (start := _take(argv, "--model")) is not None:
        if any(word.partition("=")[0] == f"--{model}" for word in argv):
            raise ValueError(f"--model and --{model} are one setting: give one of them")
        argv += [f"--{model}", start]
    for word in (w for w in argv if w[2:].partition("=")[0].replace("-", "_") not in _names(cls)):
        if close := difflib.get_close_matches(word.partition("=")[0], ("--preset", "--config"), 1, 0.75):
            raise ValueError(f"unknown flag {word} (did you mean '{close[0]}'?)")
    if preset is not None and file is not None:
        raise ValueError("--preset and --config both choose all settings: give one of them, and flags for what differs")
    notes = [about] if about else []
    if presets:
        notes.append(f"--preset NAME starts from one of: {', '.join(presets)}.")
    notes += [f"--model PATH is another name of --{model}."] if model else []
    notes.append(
        "--coordinator HOST:PORT --processes N --process I join a job of several processes, one started with each I; a "
        "launcher (srun, mpirun, an indexed job of Kubernetes, a slice of TPUs) needs no flag: docs/scaling.md."
    )
    notes.append("--config FILE starts from the settings of an earlier run (its config.yaml). Flags override either.")
    description = "\n\n".join(notes)
    default = _preset(presets or {}, preset) if file is None else load(cls, Path(file))
    if default is None:
        return tyro.cli(cls, args=argv, description=description, config=(tyro.conf.CascadeSubcommandArgs,))
    return tyro.cli(cls, args=argv, description=description, default=default, config=(tyro.conf.CascadeSubcommandArgs,))


def take_session(argv: list[str]) -> session.Session:
    """Take what is said of this process alone out of the command line.

    Raises:
        ValueError: not a number, or one below what makes sense.
    """

    def number(flag: str, kind: type, least: int | float) -> Any:
        text = _take(argv, flag)
        try:
            value = None if text is None else kind(text)
        except ValueError:
            value = math.nan
        if value is not None and not value >= least:
            raise ValueError(f"{flag} {text}: give a number from {least:g} on")
        return value

    minutes, step = number("--max-minutes", float, 0.01), number("--from-step", int, 0)
    given = session.Session(minutes, step, number("--save-seconds", float, 0), "--stop-on-alarm" in argv)
    argv[:] = [word for word in argv if word != "--stop-on-alarm"]
    return given


def _names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _take(argv: list[str], flag: str) -> str | None:
    """Remove `flag VALUE` or `flag=VALUE` from argv and give the value."""
    for i, word in enumerate(argv):
        if word.startswith(flag + "="):
            del argv[i]
            return word.partition("=")[2]
        if word == flag:
            if i + 1 == len(argv):
                raise ValueError(f"{flag} needs a value after it")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
    return None


def _preset(presets: Mapping[str, Any], name: str | None) -> Any:
    if name is None:
        name = "default" if "default" in presets else None
    elif name not in presets:
        raise ValueError(f"unknown preset '{name}'{_meant(name, presets)}; there are: {', '.join(presets) or 'none'}")
    return None if name is None else presets[name]


def _meant(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def load(cls: type[C], path: Path) -> C:
    """Settings from a YAML file that names fields of `cls`; fields that it leaves out have their defaults.

    Raises:
        ValueError: not YAML, an unknown setting, a value of the wrong type; the message names file and setting.
        FileNotFoundError: no such file.
    """
    import pydantic
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no settings file {path}: give --config the config.yaml of an earlier run")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no settings: expected lines 'name: value', found {type(data).__name__}")
    unknown = list(_unknown(cls, data, ""))
    if unknown:
        raise ValueError(f"{path}: {'; '.join(unknown)}")
    _resolve(cls)
    try:
        return pydantic.TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise ValueError(f"{path}: {where}: {first['msg']} (got {first['input']!r})") from error


def _resolve(cls: Any) -> None:
    """Write the types of settings over their names: pydantic looks a name up in the class first, where in
    `ppo: ppo.Config = ppo.Config()` it finds the default, not the module."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        field.type = hints[field.name]
        for arm in filter(dataclasses.is_dataclass, _arms(field.type)):
            _resolve(arm)


def _unknown(cls: Any, data: dict, prefix: str) -> Iterator[str]:
    """Names in `data`, and in what it nests, that no dataclass there has."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for name, value in data.items():
        if name not in known:
            yield f"unknown setting '{prefix}{name}'{_meant(str(name), known)}"
        elif isinstance(value, dict):
            arms = [arm for arm in _arms(known[name]) if dataclasses.is_dataclass(arm)]
            problems = [list(_unknown(arm, value, f"{prefix}{name}.")) for arm in arms]
            if problems:
                yield from min(problems, key=len)


def _arms(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def dump(config: Any) -> str:
    """A settings dataclass as the YAML that `load` reads."""
    import yaml

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Nested settings as what YAML and JSON can hold."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def main(
    run: Callable[[C], Any], cls: type[C], presets: Mapping[str, C] | None = None, about: str = "", model: str = ""
) -> None:
    """Parse the command line, `run(settings)`, and end the process as a shell expects.

    Bad input (a ValueError raised by this library or a script, or any operating-system error) is one line on stderr and
    exit code 2; Ctrl-C is 130, and 75 means that the time of `--max-minutes` was up. A ValueError out of another library is a
    bug and keeps its traceback, as everything does under JAXRLHF_TRACEBACK=1.
    """
    try:
        argv = sys.argv[1:]
        found, asked = job(argv), take_session(argv)
        about = (about or sys.modules["__main__"].__doc__ or "").strip()
        config = parse(cls, argv, presets, f"{about}\n\n{SESSION}", model)
        join(**found)
        keep_programs()
        keep_memory()
        with session.use(asked):
            run(config)
            if session.current().from_step is not None:
                raise ValueError(
                    f"--from-step {asked.from_step}: no stage went on from a checkpoint, so nothing was taken back"
                )
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        for number in session.SIGNALS:  # the process ends already: one more would only break that off with a traceback
            signal.signal(number, signal.SIG_IGN)
        if isinstance(ended.code, int) and any(thread.name == "checkpoint" for thread in threading.enumerate()):
            sys.stdout.flush()
            os._exit(ended.code)  # at once: the interpreter would wait for the threads of a save
        raise
    except (ValueError, OSError) as error:
        if os.environ.get("JAXRLHF_TRACEBACK") or not (isinstance(error, OSError) or _ours(error)):
            raise
        print(f"{Path(sys.argv[0]).name}: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def job(argv: list[str]) -> dict[str, Any]:
    """Remove from argv which job of several processes this one belongs to, and give it."""
    found: dict[str, Any] = {"coordinator": _take(argv, "--coordinator")}
    for name in ("processes", "process"):
        value = _take(argv, f"--{name}")
        if value is not None and not value.isdigit():
            raise ValueError(f"--{name} {value} must be a whole number")
        found[name] = None if value is None else int(value)
    return found


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join a job of several processes (`core/processes.start`); what all but the first would print goes nowhere.

    Raises:
        ValueError: the job is not wholly described, or cannot be joined.
    """
    from jaxrlhf.core import processes as those

    if those.start(coordinator, processes, process) and not those.is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  open as long as the process


def keep_programs() -> None:
    """Let jax keep compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR says where or it is empty.

    A later stage, a second round, a run that goes on: each finds what an earlier one compiled. The folder is one for each
    kind of CPU, because a program for one kind may not run on another that shares the home directory.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    cpu = Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.is_file() else ""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "jaxrlhf" / f"xla-{zlib.crc32(flags.encode()):08x}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written: compile each time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def keep_memory() -> None:
    """Let this process keep the memory that its programs have used, unless MALLOC_... variables say how.

    A program on a CPU asks for its temporaries anew at each call. By default glibc gives blocks this large back to the system
    when they are freed, and gets them as pages that the kernel must clear: up to a quarter of the processor time of a train
    step (docs/training.md). Elsewhere than on glibc this does nothing.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # malloc.h: M_MMAP_MAX -4, M_TRIM_THRESHOLD -1, M_TOP_PAD -2, M_ARENA_MAX -8 (the arenas of other threads are too small).
    for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
        mallopt(option, value)


def _ours(error: BaseException) -> bool:
    """Whether the innermost frame is in the library or in the script's own folder."""
    source = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    homes = [Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve().parent]
    return any(home in source.parents for home in homes)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
