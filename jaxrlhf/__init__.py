"""Online RLHF as one bilevel problem, in JAX, with first-order gradients only."""

__version__ = "0.1.0"
