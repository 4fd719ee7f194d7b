"""The optimizers against their papers, and who updates which parameter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training import optimizer
from jaxrlhf.training import step as train
from jaxrlhf.training.optimizer import OptimizerConfig


def tree(seed: int) -> dict:
    """A small parameter tree with every kind of leaf."""
    rng = np.random.default_rng(seed)
    shapes = {
        "policy": {
            "embed": (7, 4),
            "layers": {"up": (2, 4, 6), "down": (2, 6, 4), "norm": (2, 4)},
            "head": (4, 7),
            "norm": (4,),
        },
        "value": {"weight": (4,), "bias": ()},
    }
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def constant(name: str, **changes) -> OptimizerConfig:
    return OptimizerConfig(name=name, schedule="constant", warmup_fraction=0.0, clip_norm=None, **changes)


def updates(config: OptimizerConfig, steps: int = 3) -> list:
    params = tree(0)
    made = optimizer.make(config, 10, params)
    state, found = made.init(params), []
    advance = jax.jit(made.update)
    for i in range(steps):
        update, state = advance(tree(i + 1), state, params)
        found.append(update)
    return found


@pytest.mark.parametrize("style", ["corrected", "tensorflow"])
def test_adamw_is_the_papers(style):
    config = constant("adamw", learning_rate=0.01, weight_decay=0.1, b1=0.8, b2=0.9, epsilon=1e-3, epsilon_style=style)
    found = updates(config)
    for path in (("policy", "layers", "up"), ("policy", "norm"), ("value", "weight")):

        def at(t, path=path):
            for key in path:
                t = t[key]
            return np.asarray(t, np.float64)

        m = v = 0.0
        for i in range(3):
            g = at(tree(i + 1))
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            step = (m / (1 - 0.8 ** (i + 1))) / (np.sqrt(v / (1 - 0.9 ** (i + 1))) + 1e-3)
            if style == "tensorflow":  # Kingma and Ba 2015, end of section 2: alpha_t m / (sqrt(v) + epsilon-hat)
                step = np.sqrt(1 - 0.9 ** (i + 1)) / (1 - 0.8 ** (i + 1)) * m / (np.sqrt(v) + 1e-3)
            decay = 0.1 * at(tree(0)) if path[-1] == "up" else 0.0  # weight matrices alone
            np.testing.assert_allclose(at(found[i]), -0.01 * (step + decay), rtol=2e-5, atol=1e-8)  # float32 rounding


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five quintic steps. Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon."""
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if flip else x


def test_muon_orthogonalises_each_layer_by_itself():
    found = updates(constant("muon", learning_rate=0.02, weight_decay=0.01))
    for name, scale in (("up", np.sqrt(6 / 4)), ("down", 1.0)):
        param = np.asarray(tree(0)["policy"]["layers"][name], np.float64)
        momentum = 0.0
        for i in range(3):
            g = np.asarray(tree(i + 1)["policy"]["layers"][name], np.float64)
            momentum = 0.95 * momentum + 0.05 * g
            # optax corrects both parts for their bias before it mixes them (Nesterov)
            mixed = 0.95 * momentum / (1 - 0.95 ** (i + 2)) + 0.05 * g / (1 - 0.95 ** (i + 1))
            want = np.stack([newton_schulz(layer) for layer in mixed])
            want = -0.02 * (scale * want + 0.01 * param)
            np.testing.assert_allclose(found[i]["policy"]["layers"][name], want, rtol=1e-3, atol=2e-6)
            singular = np.linalg.svd(np.asarray(found[i]["policy"]["layers"][name]) + 0.02 * 0.01 * param, compute_uv=False)
            assert (singular / (0.02 * scale) > 0.3).all()
            assert (singular / (0.02 * scale) < 1.3).all()


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6), (1, 8, 8)])
def test_narrow_products_orthogonalise_as_wide_ones(shape):
    stack = np.random.default_rng(0).normal(size=shape)
    found = np.asarray(optimizer.orthogonalise(jnp.asarray(stack, jnp.float32)))
    want = np.stack([newton_schulz(matrix) for matrix in stack])
    assert np.linalg.norm(found - want) < 0.1 * np.linalg.norm(want)  # bfloat16 has 8 bits, through 15 products
    singular = np.linalg.svd(found, compute_uv=False)
    assert (singular > 0.3).all()
    assert (singular < 1.3).all()


def test_muon_with_narrow_products_goes_where_the_wide_one_goes():
    wide, narrow = (updates(constant("muon", learning_rate=0.02, muon_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for step in range(3):
        for name in ("up", "down"):
            a, b = (np.asarray(found[step]["policy"]["layers"][name], np.float64).ravel() for found in (wide, narrow))
            # optax corrects the momentum for its bias, a plain trace does not: a little another mix at the first steps
            assert a @ b > 0.97 * np.linalg.norm(a) * np.linalg.norm(b)


def test_who_updates_what():
    labels = optimizer.label(tree(0), "muon")
    assert labels["policy"]["layers"] == {"up": "muon", "down": "muon", "norm": "plain"}
    assert labels["policy"]["embed"] == labels["policy"]["head"] == labels["policy"]["norm"] == "plain"
    assert labels["value"] == {"weight": "head", "bias": "head"}
    labels = optimizer.label(tree(0), "adamw")
    assert labels["policy"]["layers"] == {"up": "matrix", "down": "matrix", "norm": "plain"}
    assert labels["policy"]["embed"] == "matrix"
    # a language model's own output head is a matrix, not a scalar head
    assert optimizer.label({"head": jnp.zeros((4, 7))}, "adamw") == {"head": "matrix"}


def test_head_scale_and_adam_rate_under_muon():
    config = constant("muon", learning_rate=0.02, adam_learning_rate=0.004, head_scale=2.5, epsilon=1e-12)
    first = updates(config, 1)[0]
    # Adam's first step is the learning rate times the sign of the gradient.
    np.testing.assert_allclose(np.abs(first["policy"]["embed"]), 0.004, rtol=1e-5)
    np.testing.assert_allclose(np.abs(first["value"]["weight"]), 0.01, rtol=1e-5)
    frozen = updates(constant("adamw", head_scale=0.0), 1)[0]
    assert not np.any(frozen["value"]["weight"])


def test_clipping_bounds_the_whole_gradient():
    params, gradient = tree(0), tree(1)
    config = constant("adamw", epsilon=1.0)  # a large epsilon, so that the size of the gradient matters
    norm = float(np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient))))
    clipped = optimizer.make(OptimizerConfig(**{**vars(config), "clip_norm": norm / 4}), 10, params)
    plain = optimizer.make(config, 10, params)
    a, _ = jax.jit(clipped.update)(gradient, clipped.init(params), params)
    b, _ = jax.jit(plain.update)(jax.tree.map(lambda g: g / 4, gradient), plain.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-10), a, b)


@pytest.mark.parametrize(("name", "middle", "last"), [("constant", 2.0, 2.0), ("linear", 1.1, 0.2), ("cosine", 1.1, 0.2)])
def test_schedule(name, middle, last):
    config = OptimizerConfig(schedule=name, warmup_fraction=0.1, final_fraction=0.1)
    rate = jax.jit(optimizer.schedule(config, 100, 2.0))
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.2, 1.0, 2.0], rtol=1e-6)  # 10 steps of warm-up
    np.testing.assert_allclose(rate(54), middle, rtol=1e-6)
    np.testing.assert_allclose([rate(99), rate(500)], [last, last], rtol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="learning_rate=-1 must be > 0"):
        OptimizerConfig(learning_rate=-1)
    with pytest.raises(ValueError, match=r"warmup_fraction=2 must be in \[0, 1\]"):
        OptimizerConfig(warmup_fraction=2)
    with pytest.raises(ValueError, match="b2=1"):
        OptimizerConfig(b2=1)
    with pytest.raises(ValueError, match="clip_norm=0 must be > 0; None"):
        OptimizerConfig(clip_norm=0)
    with pytest.raises(ValueError, match="head_scale=-1"):
        OptimizerConfig(head_scale=-1)
    with pytest.raises(ValueError, match="total_steps=0"):
        optimizer.make(OptimizerConfig(), 0, tree(0))
    with pytest.raises(ValueError, match="no weight matrix"):
        optimizer.make(OptimizerConfig(name="muon"), 5, {"kernel": jnp.zeros((3, 3))})


def test_settings_import_nothing_heavy():
    code = "import sys, jaxrlhf.training.optimizer, jaxrlhf.training.cli; print({'jax', 'optax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def at(t, path):
    for key in path:
        t = t[key]
    return np.asarray(t, np.float64)


PATHS = (("policy", "layers", "up"), ("policy", "embed"), ("policy", "norm"), ("value", "weight"))


def test_lion_is_the_papers():
    """Chen et al. 2023, program 1: the sign of an interpolation, and a momentum with another share."""
    found = updates(constant("lion", learning_rate=0.01, weight_decay=0.1, b1=0.8, b2=0.9, head_scale=2.0))
    for path in PATHS:
        momentum, rate = 0.0, 0.02 if path[0] == "value" else 0.01
        for i in range(3):
            g = at(tree(i + 1), path)
            step = np.sign(0.8 * momentum + 0.2 * g)
            momentum = 0.9 * momentum + 0.1 * g
            decay = 0.1 * at(tree(0), path) if path[-1] in ("up", "embed") else 0.0
            np.testing.assert_allclose(at(found[i], path), -rate * (step + decay), rtol=1e-5, atol=1e-9)


def adafactor(gradients: list[np.ndarray], param: np.ndarray, rate: float, factored: bool) -> list[np.ndarray]:
    """Of one matrix or vector. Source: Shazeer and Stern 2018, algorithms 4 and 5, beta2_t = 1 - t^-0.8, d = 1."""
    rows = columns = moment = 0.0
    found = []
    for t, g in enumerate(gradients, 1):
        beta, square = 1 - t**-0.8, g * g + 1e-30
        if factored:
            rows = beta * rows + (1 - beta) * square.mean(1)
            columns = beta * columns + (1 - beta) * square.mean(0)
            u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            moment = beta * moment + (1 - beta) * square
            u = g / np.sqrt(moment)
        u = u / max(1.0, np.sqrt((u * u).mean()))
        found.append(-rate * max(1e-3, np.sqrt((param * param).mean())) * u)
    return found


def test_adafactor_is_the_papers_for_each_matrix_of_a_stack_by_itself():
    """Matrices of 128 a side are factored, smaller ones and vectors are not. The second layer is a hundred times as large."""
    rng = np.random.default_rng(0)
    size = np.array([1.0, 100.0])
    shapes = {"embed": (130, 128), "layers": {"up": (2, 128, 160), "thin": (2, 3, 160), "norm": (2, 5)}, "norm": (5,)}

    def draw() -> dict:
        drawn = jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda x: isinstance(x, tuple))
        layers = {name: x * size.reshape(2, *[1] * (x.ndim - 1)) for name, x in drawn["layers"].items()}
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn | {"layers": layers})

    params, gradients = draw(), [draw() for _ in range(3)]
    made = optimizer.make(constant("adafactor", learning_rate=0.01), 10, params)
    state, found = made.init(params), []
    for gradient in gradients:
        update, state = jax.jit(made.update)(gradient, state, params)
        found.append(update)
    for path, factored in ((("embed",), True), (("norm",), False)):
        want = adafactor([at(g, path) for g in gradients], at(params, path), 0.01, factored)
        for i in range(3):
            np.testing.assert_allclose(at(found[i], path), want[i], rtol=1e-4, atol=1e-8)
    for name, factored in (("up", True), ("thin", False), ("norm", False)):
        for layer in range(2):
            path = ("layers", name)
            want = adafactor([at(g, path)[layer] for g in gradients], at(params, path)[layer], 0.01, factored)
            for i in range(3):
                np.testing.assert_allclose(at(found[i], path)[layer], want[i], rtol=1e-4, atol=1e-8)
    sizes = sum(x.size for x in jax.tree.leaves(state))
    assert sizes < 130 + 128 + 2 * (128 + 160) + 2 * 3 * 160 + 2 * 5 + 5 + 60  # rows and columns of what is factored


def test_schedule_free_is_the_papers_and_promises_the_average():
    """Defazio et al. 2024, algorithm 1, in terms of x, y and z; y is what trains, x what is judged and saved."""
    config = OptimizerConfig(
        name="schedule_free", learning_rate=0.02, schedule="constant", warmup_fraction=0.3, clip_norm=None, b1=0.8, b2=0.9,
        weight_decay=0.1, epsilon=1e-3,
    )  # fmt: skip
    params = tree(0)
    made = optimizer.make(config, 10, params)
    state = train.init_state(params, made, jax.random.key(0))
    advance = jax.jit(made.update)
    trained = params
    for t in range(5):
        update, inner = advance(tree(t + 1), state.opt_state.inner, trained)
        trained = jax.tree.map(jnp.add, trained, update)
        state = state.replace(params=trained, opt_state=state.opt_state.replace(inner=inner))
    averaged = train.served(state)
    for path in PATHS[:3]:
        z = x = at(params, path)
        moment = weights = 0.0
        for t in range(1, 6):
            y = 0.2 * z + 0.8 * x
            g = at(tree(t), path)
            moment = 0.9 * moment + 0.1 * g * g
            rate = 0.02 * min(1.0, t / 3) * np.sqrt(1 - 0.9**t)
            # Algorithm 1 divides by sqrt(v) + epsilon, its rate holding the bias correction; Adam's epsilon stands beside the
            # corrected sqrt(v / (1 - b2^t)), as in optax and in PyTorch's AdamW.
            step_ = np.sqrt(1 - 0.9**t) ** -1 * rate * g / (np.sqrt(moment / (1 - 0.9**t)) + 1e-3)
            decay = 0.1 * 0.02 * min(1.0, t / 3) * y if path[-1] in ("up", "embed") else 0.0
            z = z - step_ - decay
            weights += rate**2
            x = (1 - rate**2 / weights) * x + rate**2 / weights * z
        np.testing.assert_allclose(at(trained, path), 0.2 * z + 0.8 * x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(at(averaged, path), x, rtol=1e-5, atol=1e-6)
        assert np.abs(at(averaged, path) - at(trained, path)).max() > 1e-3


def test_what_is_served_without_an_average_is_what_trains():
    params = tree(0)
    state = train.init_state(params, optimizer.make(constant("adamw"), 10, params), jax.random.key(0))
    assert train.served(state) is state.params
    state = train.update_ema(state, 0.5)
    assert train.served(state) is state.ema


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "schedule_free"])
def test_narrow_moments_go_where_wide_ones_go(name):
    config = constant(name, learning_rate=0.01, epsilon=1e-3, b2=0.95)
    narrow = dataclasses.replace(config, moment_dtype="bfloat16")
    params = tree(0)
    states = [jax.eval_shape(optimizer.make(each, 10, params).init, params) for each in (config, narrow)]
    wide_bytes, narrow_bytes = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) for state in states)
    labels = jax.tree.map(lambda x, label: (x.size if x.ndim > 1 else 0, label), params, optimizer.label(params, name))
    moments = {"adamw": 2, "lion": 1, "muon": 2, "schedule_free": 1}[name]
    found = jax.tree.leaves(labels, is_leaf=lambda x: isinstance(x, tuple))
    assert wide_bytes - narrow_bytes == 2 * sum(size * (1 if label == "muon" else moments) for size, label in found)
    found, want = updates(narrow, 4), updates(config, 4)
    for a, b in zip(found, want, strict=True):
        a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (a, b))
        assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
        assert np.isfinite(a).all()


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match=r"schedule='cosine', b1=0\.9: schedule_free averages"):
        OptimizerConfig(name="schedule_free")
    with pytest.raises(ValueError, match=r"name='adamw', b2=0\.999: bfloat16 has 8 bits"):
        OptimizerConfig(moment_dtype="bfloat16", b2=0.999)
    with pytest.raises(ValueError, match="name='adafactor'"):
        OptimizerConfig(name="adafactor", moment_dtype="bfloat16")


def test_a_rate_may_be_traced_and_differ_among_runs():
    params, update = tree(0), optimizer.make(constant("adamw", learning_rate=0.01, weight_decay=0.1), 10, tree(0))

    def first(factor):
        made = optimizer.times(update, factor)
        return made.update(tree(1), made.init(params), params)[0]

    both = jax.jit(jax.vmap(first))(jnp.array([1.0, 0.25]))
    want = updates(constant("adamw", learning_rate=0.01, weight_decay=0.1), 1)[0]
    for name, factor in ((0, 1.0), (1, 0.25)):
        jax.tree.map(lambda x, y, n=name, f=factor: np.testing.assert_allclose(x[n], f * y, rtol=1e-5, atol=1e-9), both, want)
