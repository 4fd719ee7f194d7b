"""The layers of the house: what each folder may import, and what numeric modules may not do; read from the source by `ast`."""

from __future__ import annotations

import ast
import graphlib
import pathlib
import shutil
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Each folder, and the folders it may import from besides itself.
LAYERS = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "sampling": {"core", "models"},
    "rewards": {"core", "data", "models"},
    "algorithms": {"core"},
    "training": {"core", "models"},
    "evaluation": {"core", "data", "models", "sampling", "rewards"},
    "serving": {"core", "data", "models", "sampling", "feedback"},
    "feedback": {"core", "data", "evaluation", "training"},
}

# The folders that people copy the mathematics from stand on these alone. The rest may import whatever pyproject names.
FLOOR = {
    "core": {"jax", "flax", "jaxtyping", "numpy"},
    "algorithms": {"jax", "flax", "jaxtyping", "numpy"},
    "sampling": {"jax", "flax", "jaxtyping", "numpy"},
}

# Imported inside the function that uses them, so that `--help` and an argument error answer at once.
LATE = {
    "orbax",
    "grain",
    "transformers",
    "tensorflow_datasets",
    "matplotlib",
    "tensorboardX",
    "wandb",
    "sklearn",
    "textblob",
    "vaderSentiment",
    "nltk",
    "chitchat_dataset",
    "tyro",
    "pydantic",
    "math_verify",
    "lm_eval",
    "gguf",
    "pyarrow",
    "starlette",
    "uvicorn",
    "krippendorff",
}

# Mathematics: no print, no log, no files, no mesh, no arrays and no jit at import. Host code inside these folders is named.
NUMERIC = {"core", "models", "sampling", "rewards", "algorithms"}
NUMERIC_FILES = {
    "training/optimizer.py",
    "training/objective.py",
    "training/step.py",
    "training/plan.py",
    "training/flops.py",
    "training/chips.py",
}
NUMERIC_FILES |= {"training/gradient.py", "training/by_length.py"}
HOST_FILES = {
    "core/processes.py",
    *("models/pretrained.py", "models/hf.py", "models/hf_files.py", "models/gguf.py", "models/peft.py"),
    *("rewards/functions.py", "rewards/pool.py", "rewards/child.py"),
}
PRINTS = {  # they talk to the person at the terminal
    *("training/run.py", "training/cli.py", "training/ending.py", "training/progress.py", "training/events.py"),
    *("training/programs.py", "training/guards.py", "training/saves.py"),
    "feedback/labelers.py",
}

# Where programs are compiled. A jit anywhere else hides a second compilation inside a first.
JITS = {
    "training/step.py",
    "training/by_length.py",
    "sampling/decode.py",
    "sampling/rollout.py",
    "sampling/stragglers.py",
    "models/roles.py",
    "rewards/model.py",
    "rewards/ensemble.py",
}


def package_files(root: pathlib.Path) -> dict[str, ast.Module]:
    """Each module of the package, by its path inside it."""
    package = root / "jaxrlhf"
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(), path.name) for path in sorted(package.rglob("*.py"))
    }


def imports(tree: ast.AST, file: str) -> list[tuple[int, str, bool]]:
    """(line, absolute dotted module, whether it runs when the module is imported) of every import, nested ones included."""
    found = []
    folders = {"jaxrlhf", *(f"jaxrlhf.{folder}" for folder in LAYERS)}

    def visit(node, at_import):
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the folder of this file
                here = ["jaxrlhf", *pathlib.PurePosixPath(file).parts[:-1]]
                base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [base])])
            for alias in node.names:  # what is imported from a folder is a module
                name = f"{base}.{alias.name}" if base in folders else base
                found.append((node.lineno, name, at_import))
        elif isinstance(node, ast.Attribute) and dotted(node.value) == "jaxrlhf" and node.attr in LAYERS:
            found.append((node.lineno, dotted(node), at_import))  # `import jaxrlhf` alone is for `__version__`
        elif isinstance(node, ast.Call) and called(node) in ("__import__", "importlib.import_module", "import_module"):
            first = node.args[0] if node.args else None
            name = first.value if isinstance(first, ast.Constant) else "?"
            found.append((node.lineno, str(name), at_import))
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")
        )
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not later)

    visit(tree, True)
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or a chain of attributes, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def called(node: ast.Call) -> str:
    """What a call calls."""
    return dotted(node.func)


def is_numeric(file: str) -> bool:
    """Whether a module is mathematics."""
    return (file.split("/")[0] in NUMERIC or file in NUMERIC_FILES) and file not in HOST_FILES


def import_faults(files: dict[str, ast.Module]) -> list[str]:
    """Every import that the layers forbid, and every circle."""
    faults, graph = [], {}
    for file, tree in files.items():
        folder = file.split("/")[0] if "/" in file else ""
        if folder not in LAYERS and file != "__init__.py":
            faults.append(f"{file}: not in a folder of the layer table")
            continue
        module = "jaxrlhf." + file.removesuffix(".py").replace("/", ".")
        module = module.removesuffix(".__init__")
        for line, name, at_import in imports(tree, file):
            where, top = f"{file}:{line}", name.split(".")[0]
            if top == "experiments" or top == "tests":
                faults.append(f"{where}: the library imports {name}")
            elif top == "jaxrlhf":
                other = name.split(".")[1] if "." in name else ""
                if not folder:
                    faults.append(f"{where}: jaxrlhf/__init__.py imports {name}; it imports nothing")
                elif other not in ("", "__version__", folder) and other not in LAYERS[folder]:
                    faults.append(f"{where}: {folder} imports {other}; it may import {sorted(LAYERS[folder]) or 'nothing'}")
                if other == folder and name != module:
                    graph.setdefault(module, set()).add(name)
            elif top == "?":
                faults.append(f"{where}: an import whose name is computed")
            elif top not in sys.stdlib_module_names:
                if at_import and top in LATE:
                    faults.append(f"{where}: {top} imported at the top of a module; import it in the function that uses it")
                if top not in FLOOR.get(folder, {top}):
                    faults.append(f"{where}: {folder} imports {top}; it may import {sorted(FLOOR[folder])}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        faults.append(f"imports in a circle: {' -> '.join(error.args[1])}")
    return faults


def conduct_faults(files: dict[str, ast.Module]) -> list[str]:
    """Every print, file, global and jit where none should be, and every array made by importing a module."""
    faults = []
    for file, tree in files.items():
        inside = {
            id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for b in _body(f) for n in ast.walk(b)
        }
        for node in ast.walk(tree):
            line = f"{file}:{getattr(node, 'lineno', 0)}"
            name = called(node) if isinstance(node, ast.Call) else ""
            if name in ("print", "jax.debug.print") and file not in PRINTS:
                faults.append(f"{line}: {name}")
            if isinstance(node, ast.Attribute) and dotted(node) in ("jax.jit", "jax.pmap") and file not in JITS:
                faults.append(f"{line}: {dotted(node)} outside the modules that compile")
            if not is_numeric(file):
                continue
            if isinstance(node, ast.Import | ast.ImportFrom) and "logging" in ast.unparse(node):
                faults.append(f"{line}: a numeric module logs")
            if name == "open" or name.endswith((".read_text", ".write_text", ".read_bytes", ".write_bytes", ".mkdir")):
                faults.append(f"{line}: a numeric module touches files")
            if isinstance(node, ast.Global):
                faults.append(f"{line}: module state that changes")
            makes = name.startswith(("jnp.", "jax.numpy.", "jax.random.", "jax.devices", "jax.make_mesh", "np.random."))
            if makes and id(node) not in inside:
                faults.append(f"{line}: {name} runs when the module is imported")
    return faults


def _body(function: ast.FunctionDef | ast.Lambda) -> list[ast.AST]:
    return function.body if isinstance(function, ast.FunctionDef) else [function.body]


def experiment_faults(root: pathlib.Path) -> list[str]:
    """Nothing but another experiment or a test imports experiments/ (the package is read by `import_faults`)."""
    faults = []
    for path in sorted((root / "benchmarks").rglob("*.py")):
        for line, name, _ in imports(ast.parse(path.read_text()), path.name):
            if name.split(".")[0] == "experiments":
                faults.append(f"benchmarks/{path.name}:{line}: imports {name}")
    return faults


def faults(root: pathlib.Path) -> list[str]:
    """All that is wrong with the layers of a checkout."""
    files = package_files(root)
    return import_faults(files) + conduct_faults(files) + experiment_faults(root)


def test_layers_hold():
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("core/planted.py", "from jaxrlhf.models import model", "core imports models"),
        ("algorithms/planted.py", "def f():\n    import jaxrlhf.models.model", "algorithms imports models"),
        ("algorithms/planted.py", "from ..training import step", "algorithms imports training"),
        ("models/planted.py", "if 1:\n    from jaxrlhf import sampling", "models imports sampling"),
        ("data/planted.py", "import importlib\nimportlib.import_module('jaxrlhf.models')", "data imports models"),
        ("core/planted.py", "import importlib\nimportlib.import_module('jax' + 'rlhf')", "computed"),
        ("training/planted.py", "def f():\n    from experiments import ppo", "the library imports experiments"),
        ("training/planted.py", "import jaxrlhf\ndef f():\n    return jaxrlhf.sampling.generate", "training imports sampling"),
        ("training/planted.py", "import orbax.checkpoint", "orbax imported at the top"),
        ("data/planted.py", "try:\n    import grain\nexcept ImportError:\n    pass", "grain imported at the top"),
        ("evaluation/planted.py", "class A:\n    import matplotlib.pyplot as plt", "matplotlib imported at the top"),
        ("sampling/planted.py", "def f():\n    import optax", "sampling imports optax"),
        ("engine/planted.py", "", "not in a folder of the layer table"),
        ("planted.py", "", "not in a folder of the layer table"),
        ("algorithms/planted.py", "def f(x):\n    print(x)", "print"),
        ("core/planted.py", "def f(x):\n    jax.debug.print(x)", "jax.debug.print"),
        ("algorithms/planted.py", "import logging", "logs"),
        ("core/planted.py", "def f():\n    return open('x')", "touches files"),
        ("algorithms/planted.py", "f = jax.jit(lambda x: x)", "jax.jit outside"),
        ("algorithms/planted.py", "import jax.numpy as jnp\nONE = jnp.ones(3)", "jnp.ones runs when the module is imported"),
        ("algorithms/planted.py", "import jax.numpy as jnp\ndef f(x=jnp.ones(3)): return x", "jnp.ones runs when"),
        ("sampling/planted.py", "def f():\n    global x", "module state"),
        ("core/planted.py", "from jaxrlhf.core import planted2", "circle"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_caught(file, source, said):
    files = {file: ast.parse(source), "core/planted2.py": ast.parse("from jaxrlhf.core import planted")}
    found = import_faults(files) + conduct_faults(files)
    assert len(found) == 1, found
    assert said in found[0]


def test_a_fault_planted_in_a_copy_is_caught(tmp_path):
    shutil.copytree(ROOT / "jaxrlhf", tmp_path / "jaxrlhf", ignore=shutil.ignore_patterns("__pycache__", "*.gz"))
    (tmp_path / "jaxrlhf/core/planted.py").write_text("def f():\n    from jaxrlhf.models import model\n    return model\n")
    found = set(faults(tmp_path)) - set(faults(ROOT))
    assert found == {"core/planted.py:2: core imports models; it may import nothing"}


def test_a_numeric_module_may_make_arrays_inside_functions():
    source = "import jax.numpy as jnp\ndef f():\n    return jnp.ones(3)\ng = lambda: jnp.ones(3)\n"
    assert conduct_faults({"core/planted.py": ast.parse(source)}) == []
