"""Metrics as a run goes: one JSON object a line, the source of truth; TensorBoard files and Weights & Biases get them too."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file as a whole: after a crash it holds the old text or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file or of the one in a run directory; a last line cut short by a crash is left out.

    Raises:
        ValueError: a line other than the last is not a JSON object.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break was never finished
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object: {error.msg}") from error
        rows.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
    return rows


def cut_back(path: Path, size: int, step: int) -> None:
    """Leave the first `size` bytes of a file that a run appends to, those that it had when step `step` was saved: what came
    after them will be written again.

    Raises:
        ValueError: the file is shorter.
    """
    there = path.stat().st_size if path.is_file() else 0
    if there < size:
        raise ValueError(f"{path} has {there} bytes, but {size} when step {step} was saved: rows are missing in it")
    if there > size:
        os.truncate(path, size)


class Metrics:
    """Appends a row a step. A row is fetched from the device when the next one comes, so that no step waits for its own."""

    def __init__(
        self,
        directory: Path,
        start: int = 0,
        size: int = 0,
        tensorboard: bool = True,
        writes: bool = True,
        wandb: str = "",
    ):
        """Open the files of a run that begins, or goes on, at step `start`, where the file had `size` bytes: what came after
        them is dropped, because it will be written again. Without `writes` there are no files: a process beside the first only
        knows the last row. `wandb`: a project of Weights & Biases, '' for none.

        Raises:
            ValueError: the file is shorter than that, or tensorboardX or wandb is absent.
        """
        self.path = Path(directory) / FILE
        if writes:
            cut_back(self.path, size, start)
        path = self.path if writes else os.devnull
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  open as long as the run
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._board = _board(Path(directory) / "tensorboard", start) if tensorboard and writes else None
        self._wandb = _wandb(Path(directory), wandb) if wandb and writes else None
        self._writes = writes
        self.last: dict[str, Any] = {}  # the latest row written

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the row of the step before, and keep this one until the next."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Write what is pending."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        row = {"step": step, **_numbers(metrics)}
        self._file.write(_line(row))
        self.last = row
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def sync(self) -> None:
        """Write what is pending and have it on the disk when this returns."""
        self.flush()
        self._file.flush()
        if self._writes:
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def size(self) -> int:
        """Bytes of the file so far."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Write what is pending and close the files."""
        self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb(project: str) -> None:
    """Refuse a project of Weights & Biases before the run begins where its package is absent.

    Raises:
        ValueError: it is.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"watch.wandb={project}: wandb is not installed: pip install 'jaxrlhf[wandb]', or leave the flag out")


def _wandb(directory: Path, project: str) -> Any:
    """The run at Weights & Biases. A run that goes on is the same one there: its id lies in the directory. Steps that were sent
    before and come again after a resume have the values that they had, and are not taken twice."""
    check_wandb(project)
    import wandb  # pyright: ignore[reportMissingImports]: an extra
    import yaml

    name, settings = directory / "wandb_id", directory / "config.yaml"
    if not name.is_file():
        write_atomic(name, secrets.token_hex(8))
    config = yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else None
    own = {"id": name.read_text(encoding="utf-8").strip(), "resume": "allow", "name": directory.name}
    return wandb.init(project=project, dir=str(directory), config=config, **own)


def _board(directory: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboardX is not installed: pip install 'jaxrlhf[loop]', or set tensorboard=False") from error
    return SummaryWriter(str(directory), purge_step=start)


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Device scalars as Python numbers, all fetched at once; text stays."""
    import jax

    fetched = jax.device_get(metrics)
    return {name: value if isinstance(value, str) else value.item() if hasattr(value, "item") else value
            for name, value in fetched.items()}  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    """JSON has no NaN or infinity: they are written as the text that `float` reads."""
    safe = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe) + "\n"
