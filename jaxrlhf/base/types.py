"""Aliases that make signatures read like the mathematics."""

from typing import Any

import jax

Key = jax.Array
"""A JAX random key. A function that takes one consumes it."""

Params = Any
"""A pytree of arrays: reward parameters, policy parameters, optimiser states."""

Batch = Any
"""A pytree of arrays whose leaves lead with the prompts of a step, `[B, ...]`."""
