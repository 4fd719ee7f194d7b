"""What the repository holds: metadata that is true, docstrings, nothing of one machine, and a wheel with all of its data."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "jaxrlhf").rglob("*.py"))

# Where an import's name is not that of its distribution, or several distributions share it.
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "array_record": "array-record",
    "chitchat_dataset": "chitchat-dataset",
    "lm_eval": "lm-eval",
    "math_verify": "math-verify",
}


def tracked(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """Every file under version control; without git (an unpacked archive), every file but build products."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if listing.returncode == 0:
        return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]
    skip = {"__pycache__", "build", "dist", "runs", ".git", "jaxrlhf.egg-info"}
    return [path for path in root.rglob("*") if path.is_file() and not skip & set(path.relative_to(root).parts)]


def private_words() -> re.Pattern:
    """Package indexes, the mirror that this machine may use, and folders of one machine; split so as not to find themselves."""
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs", "conda." + "anaconda.org", "--index" + "-url"]
    hosts += ["--extra-index" + "-url", "--find" + "-links", "artifact" + "ory", "dev" + "pi"]
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "UV_INDEX_URL", "NPM_CONFIG_REGISTRY", "npm_config_registry"):
        hosts += re.findall(r"//(?:[^/@\s]*@)?([^/:\s]+)", os.environ.get(name, ""))
    folders = [rf"(?<![\w.~}}/-])/{folder}/" for folder in ("work", "root", "home", "tmp", "Users", "opt", "mnt")]
    return re.compile("|".join([*map(re.escape, hosts), *folders]))


def test_no_tracked_file_names_an_index_or_a_folder_of_one_machine():
    pattern, found = private_words(), []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data or path.name == "LICENSE":
            continue
        for number, line in enumerate(data.decode().splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert found == []


@pytest.mark.parametrize(
    "text", ["see /ho" + "me/me/x", "pip --index" + "-url x", "https://py" + "pi.org/simple", "'/tm" + "p/x'"]
)
def test_private_words_are_recognised(text):
    assert private_words().search(text)


@pytest.mark.parametrize("text", ["https://example.org/work/x", "docs/home/x", "~/work/x", "$HOME/tmp/x", "a/b"])
def test_other_words_are_not(text):
    assert not private_words().search(text)


@pytest.mark.parametrize("python", ["311", "312"])
def test_constraints_hold_names_and_versions_alone(python):
    lines = (ROOT / f"constraints-py{python}.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)] == []
    names = [normalised(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names)) > 50
    assert "jaxrlhf" not in names


def normalised(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required(requirements: list[str]) -> set[str]:
    """Names of requirement lines, without versions and extras."""
    return {normalised(re.match(r"[A-Za-z0-9._-]+", line).group()) for line in requirements}


@pytest.mark.parametrize("python", ["311", "312"])
def test_constraints_hold_every_package_that_the_tests_install(python):
    names = {normalised(line.split("==")[0]) for line in (ROOT / f"constraints-py{python}.txt").read_text().split()}
    extras = PROJECT["optional-dependencies"]
    assert required(PROJECT["dependencies"] + extras["loop"] + extras["test"]) - names == set()


def third_party(tree: ast.AST, at_top: bool) -> set[str]:
    """Distributions that a module imports: those at its top level, or all."""
    nodes = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)] if at_top else ast.walk(tree)
    tops = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            tops.add(node.module.split(".")[0])
    return {normalised(DISTRIBUTIONS.get(top, top)) for top in tops - set(sys.stdlib_module_names) - {"jaxrlhf", "experiments"}}


def test_every_import_is_a_declared_dependency():
    """What a module needs to be imported at all is a dependency; what a function needs may be an extra."""
    core = required(PROJECT["dependencies"])
    extras = required([line for name, lines in PROJECT["optional-dependencies"].items() if name != "test" for line in lines])
    found = []
    for path in [*MODULES, *sorted((ROOT / "experiments").glob("*.py"))]:
        tree = ast.parse(path.read_text())
        found += [f"{path.relative_to(ROOT)}: {name} is not a dependency" for name in third_party(tree, True) - core]
        found += [f"{path.relative_to(ROOT)}: {name} is nowhere declared" for name in third_party(tree, False) - core - extras]
    assert found == []


def test_extras_are_those_that_the_documents_name():
    assert set(PROJECT["optional-dependencies"]) == {
        "loop",
        "math",
        "gguf",
        "serve",
        "eval",
        "wandb",
        "test",
        "cuda12",
        "cuda13",
        "tpu",
    }


def test_version_is_the_same_everywhere():
    import jaxrlhf

    assert jaxrlhf.__version__ == PROJECT["version"] == importlib.metadata.version("jaxrlhf")


def undocumented(path: pathlib.Path) -> list[str]:
    """The module, and its public functions and methods, that lack a docstring."""
    tree = ast.parse(path.read_text())
    missing = [] if ast.get_docstring(tree) else ["module"]

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node):
                    missing.append(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")

    visit(tree.body, "")
    return missing


def test_every_module_and_public_function_says_what_it_is():
    paths = [p for folder in ("jaxrlhf", "experiments", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
    missing = {str(path.relative_to(ROOT)): names for path in paths if (names := undocumented(path))}
    assert missing == {}


def test_every_folder_of_the_package_is_one():
    """A folder without `__init__.py` is left out of a wheel."""
    folders = {path.parent for path in MODULES}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tracked files without touching the network."""
    root = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ("jaxrlhf", "pyproject.toml", "README.md", "LICENSE", "tests", "experiments"):
            (root / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / relative)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(root / "dist")], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (root / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in tracked() if path.is_relative_to(ROOT / "jaxrlhf")}
    assert held == expected
    assert "jaxrlhf/py.typed" in held
    assert sum(name.endswith(".jsonl.gz") for name in held) >= 2  # the human ratings
    data = {name.rsplit("/", 1)[0] for name in held if name.endswith(".gz")}
    for folder in data:
        assert {f"{folder}/LICENSE.txt", f"{folder}/CITATION"} <= held


def test_the_wheel_says_what_it_is(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "License-File: LICENSE" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())
