"""Who draws the pairs of an outer step: tilt 0 for all iterates, or every iterate for itself."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrlhf.base.algorithm import Annotator, label_by
from jaxrlhf.base.problem import BilevelProblem, Labelled, Sample
from jaxrlhf.base.types import Batch, Key, Params
from jaxrlhf.bilevel.iterates import map_iterates

Sampling = Literal["shared", "common", "independent"]
"""`shared`: one sample from tilt 0 serves every iterate through importance weights. `independent`: every iterate draws a
sample of its own, as in the paper. `common`: every iterate draws its own from the same random numbers."""


def check_sampling(sampling: str) -> None:
    """Raises ValueError for an unknown way of sampling."""
    if sampling not in ("shared", "common", "independent"):
        raise ValueError(f"sampling is shared, common or independent, got {sampling!r}.")


def proposer(problem: BilevelProblem, sampling: Sampling, count: int):
    """Returns the `propose` of an algorithm with `count` iterates; where each draws its own, leaves are `[S, ...]`."""

    def propose(key: Key, state, data: Batch, frozen: Params) -> Sample:
        if sampling == "shared":
            return problem.sample(key, state.policy, data, frozen)
        draw = map_iterates(lambda key, lower: problem.sample(key, lower, data, frozen))
        return draw(_keys(key, sampling, count), state.lowers)

    return propose


def labeller(annotate: Annotator | None, sampling: Sampling, count: int):
    """Returns `(key, sample, frozen) -> Labelled` for the samples of `proposer`; None without an annotator."""
    label = label_by(annotate)
    if label is None or sampling == "shared":
        return label

    def label_each(key: Key, sample: Sample, frozen: Params) -> Labelled:
        return map_iterates(lambda key, sample: label(key, sample, frozen))(_keys(key, sampling, count), sample)

    return label_each


def _keys(key: Key, sampling: Sampling, count: int) -> Key:
    return jnp.broadcast_to(key, (count, *key.shape)) if sampling == "common" else jax.random.split(key, count)
