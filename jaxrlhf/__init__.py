"""RLHF, whole and fast, in JAX: sampling, pairwise rewards and policy optimisation as pure functions."""

__version__ = "0.1.0"
