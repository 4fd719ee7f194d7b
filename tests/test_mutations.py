"""Each mistake of tests/mutations.py is caught by the test that it names, in a copy of the package with it planted."""

from __future__ import annotations

import ast
import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKERS = 2  # processes at a time
SECONDS = 300  # for one of them


def mutated(mutation: Mutation) -> str:
    """The source of the mutated file.

    Raises:
        ValueError: the place does not stand exactly once in the file.
    """
    source = (ROOT / "jaxrlhf" / mutation.file).read_text()
    if (count := source.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} stands {count} times in jaxrlhf/{mutation.file}, not once")
    return source.replace(mutation.old, mutation.new)


def run_tests(folder: pathlib.Path, mutation: Mutation | None) -> tuple[int, str]:
    """Exit code and output of pytest in a copy of the repository: with a mistake, its test; without, those of all mistakes."""
    nodes = dict.fromkeys(each.test for each in (MUTATIONS if mutation is None else [mutation]))
    folder = folder / ("unchanged" if mutation is None else mutation.name)
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("jaxrlhf", "tests", "experiments", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if mutation is not None:
        (folder / "jaxrlhf" / mutation.file).write_text(mutated(mutation))
    # The working directory stands first in the path, before the installed package.
    arguments = ["-m", "pytest", "-q", "-x", "-rf", "--tb=line", "-p", "no:cacheprovider", "-o", "addopts="]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    # Nearly all of a run is compiling what the other runs compile too.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, *arguments, *(f"tests/{node}" for node in nodes)],
        cwd=folder,
        env=environment | cache | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS if mutation is not None else 5 * SECONDS,  # unchanged, every test that is named runs in one process
        check=False,
    )
    shutil.rmtree(folder)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """The runs that this session's tests ask for, started ahead of the tests that wait for them."""
    folder = tmp_path_factory.mktemp("mutations")
    asked = [item.callspec.params["mutation"] for item in request.session.items if "outcomes" in item.fixturenames]
    # A worker of pytest-xdist sees every test but runs its share only: there, nothing is started ahead.
    ahead = [] if "PYTEST_XDIST_WORKER" in os.environ else asked
    pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
    started = {mutation: pool.submit(run_tests, folder, mutation) for mutation in ahead}
    yield lambda mutation: started[mutation].result() if mutation in started else run_tests(folder, mutation)
    pool.shutdown(cancel_futures=True)


def test_the_list_is_long_distinct_and_names_tests_that_exist():
    assert len(MUTATIONS) >= 20
    assert {mutation.name for mutation in MUTATIONS} >= FIRST
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        file, name = mutation.test.split("[")[0].split("::")
        functions = [x.name for x in ast.parse((ROOT / "tests" / file).read_text()).body if isinstance(x, ast.FunctionDef)]
        assert name in functions, f"{mutation.name}: there is no {mutation.test}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_fits_the_source(mutation):
    ast.parse(mutated(mutation))


# Each takes a process of its own, so plain pytest plants one mistake for each part of the mathematics, where the test that
# must see it is quick.
FIRST = {
    "advantages-decay-across-holes",
    "mask-by-product-lets-nan-through",
    "the-rejected-is-preferred",
    "reference-point-of-prompts-with-their-own-responses",
    "best-of-n-draws-with-replacement",
    "learning-rate-rises-after-the-warm-up",
    "int8-scale-of-the-other-axis",
    "logits-read-one-token-late",
    "rows-of-steps-that-come-again-kept",
    "a-skip-taken-back-takes-a-label-away",
}
CASES = [pytest.param(None, marks=pytest.mark.full)]  # plain pytest runs these tests unchanged as it is
CASES += [pytest.param(mutation, marks=() if mutation.name in FIRST else pytest.mark.full) for mutation in MUTATIONS]


@pytest.mark.parametrize("mutation", CASES, ids=lambda mutation: mutation.name if mutation else "unchanged")
def test_is_caught(mutation, outcomes):
    code, output = outcomes(mutation)
    if mutation is None:
        assert code == 0, f"without a mistake the tests do not pass:\n{output}"
        return
    # 1: tests ran and some failed. Anything else (no such test, a crash on import) is not a mistake caught.
    assert code == 1, f"{mutation.name} is not caught:\n{output}"
    assert f"FAILED tests/{mutation.test}" in output, f"{mutation.name} is not caught by {mutation.test}:\n{output}"
