"""The pages under docs/: their code runs, and every file, test and switch that they name exists."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re

import pytest

from jaxrlhf.algorithms import ppo, shaping
from jaxrlhf.core.types import SamplingSpec
from jaxrlhf.feedback import assignments, limits
from jaxrlhf.models import hf_config
from jaxrlhf.sampling import generate

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_the_code_of_change_the_algorithm_runs():
    page = (ROOT / "docs" / "change_the_algorithm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(compile("\n".join(blocks), "docs/change_the_algorithm.md", "exec"), found)
    assert float(found["metrics"]["optimizer/grad_norm"]) > 0
    assert float(found["stats"]["reward/score"]) > 0
    assert int(found["state"].step) == 1


def test_the_code_of_hugging_face_runs():
    page = (ROOT / "docs" / "hugging_face.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(compile("\n".join(blocks), "docs/hugging_face.md", "exec"), found)
    assert found["again"] == found["config"]


def test_the_code_of_sampling_runs():
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(compile("\n".join(blocks), "docs/sampling.md", "exec"), found)
    assert 0 < len(found["written"]) <= 20


def test_the_code_of_reliability_runs():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(compile("\n".join(blocks), "docs/reliability.md", "exec"), found)
    assert found["causes"]


def test_the_code_of_feedback_runs():
    page = (ROOT / "docs" / "feedback.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict = {}
    exec(compile(block, "docs/feedback.md", "exec"), found)
    found["db"].close()
    found["again"].close()


def test_the_limits_of_feedback_are_those_of_the_server():
    page = (ROOT / "docs" / "feedback.md").read_text(encoding="utf-8")
    limit = limits.Limits()
    said = f"body {limit.body // 1024} kB (413), {limit.rate:.0f} requests a second and {limit.burst} at once a person (429), "
    said += f"{limit.wrong_tokens} wrong tokens a minute and address (429), "
    assert said + f"{limit.at_once} requests at once and {limit.waiting} waiting" in page
    for field in dataclasses.fields(assignments.Rules):
        assert f"| `--rules.{field.name.replace('_', '-')}` | {field.default:g} |" in page


def test_the_fields_of_sampling_are_those_that_there_are():
    page = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    for field in (*dataclasses.fields(SamplingSpec), *dataclasses.fields(generate.Options)):
        assert re.search(rf"^\|.*`{field.name}[`.]", page, re.MULTILINE) or field.name in ("pad", "min_tokens"), field.name


def test_the_architectures_of_hugging_face_are_those_that_are_read():
    page = (ROOT / "docs" / "hugging_face.md").read_text(encoding="utf-8")
    table = page[page.index("## Architectures") : page.index("## What was checked")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == ["model_type", *hf_config.CLASSES]


def test_the_tree_names_every_file_of_each_room_and_no_other():
    page = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    here: list[str] = []  # above the first room there is none
    for line in page.split("```")[1].splitlines():
        if room := re.match(r"(experiments)/|  (\w+)/ ", line):
            here = found.setdefault(room[1] or f"jaxrlhf/{room[2]}", [])
        here += re.findall(r"[\w/]+\.(?:py|js|css|html)\b", line)
    rooms = [path for path in (ROOT / "jaxrlhf").iterdir() if (path / "__init__.py").is_file()]
    for room in (*rooms, ROOT / "experiments"):
        files = (x for x in room.rglob("*") if x.suffix in (".py", ".js", ".css", ".html") and x.name != "__init__.py")
        own = sorted(file.relative_to(room).as_posix() for file in files)
        assert sorted(found.pop(str(room.relative_to(ROOT)))) == own, f"docs/tree.md: {room.name}"
    assert found == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for file in re.findall(r"`((?:jaxrlhf/|experiments/|tests/|benchmarks/)[\w/]+\.py)", text):
        assert (ROOT / file).is_file(), file
    for file in re.findall(r"`((?:algorithms|models|rewards|evaluation|training|data)/[\w/]+\.py)`", text):
        assert (ROOT / "jaxrlhf" / file).is_file(), file
    for file, name in re.findall(r"((?:faults/)?test_\w+\.py)::(\w+)", text):
        functions = [x.name for x in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(x, ast.FunctionDef)]
        assert name in functions, f"{file}::{name}"
    for name in re.findall(r"`((?:faults/)?test_\w+\.py)`", text):
        assert (ROOT / "tests" / name).is_file(), name


def test_every_switch_of_ppo_is_documented_with_its_default():
    page = (ROOT / "docs" / "details.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(ppo.Config):
        if field.name in ("score", "importance"):
            assert f"`{field.name}" in page
            continue
        shown = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        given = re.findall(rf"`{field.name}=([^`]+)`", page)
        assert given, f"docs/details.md does not name {field.name}"
        assert shown in given, f"docs/details.md: {field.name}={given}, the default is {shown}"
    for field in dataclasses.fields(shaping.Config):
        assert f"`score.{field.name}=" in page
