"""Batches without padding, as `jaxrlhf` reads them."""

import jax.numpy as jnp
import numpy as np

from jaxrlhf.data.batches import Demonstrations, Pairs
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.transformer.config import DecoderConfig


def random_tokens(config: DecoderConfig, rows: int, length: int) -> np.ndarray:
    """Returns random tokens `[rows, length]`, none of them 0."""
    return np.random.default_rng(0).integers(1, config.vocabulary_size, (rows, length)).astype(np.int32)


def as_prompts(tokens: np.ndarray) -> Prompts:
    """Returns rows in which every token is real."""
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def as_demonstrations(tokens: np.ndarray) -> Demonstrations:
    """Returns texts `[N, T]` with a loss on every token but the first."""
    in_loss = np.ones(tokens.shape, bool)
    in_loss[:, 0] = False
    return Demonstrations(tokens, np.ones(tokens.shape, np.int32), in_loss)


def as_pairs(tokens: np.ndarray) -> Pairs:
    """Returns preferences for the first of each pair of texts, `[B, 2, T]`."""
    mask, ones = np.ones(tokens.shape, bool), np.ones(len(tokens), np.float32)
    return Pairs(tokens, mask, mask, ones, 0 * ones, ones)
