"""Strict numerics for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision, for comparisons with oracles."""
    with jax.enable_x64(True):
        yield
