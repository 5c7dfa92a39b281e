"""State entropy as a reward: pre-training that teaches a policy to go everywhere before anyone is asked.

The particle estimate of the entropy of visited states is, up to constants, the mean log-distance of each to its k-th
nearest neighbour (Kozachenko-Leonenko; arXiv 2106.05091 uses it so), and each state's own term is its reward.
"""

import jax
import jax.numpy as jnp


def state_entropy_bonus(
    observations: jax.Array, visited: jax.Array, *, neighbours: int = 5, particles: int = 512
) -> jax.Array:
    """Returns `log(1 + distance to the k-th nearest visited state)`, 0 where nothing was visited.

    The one inside the logarithm bounds the reward from below, as in arXiv 2103.04551. Distances are Euclidean and are
    measured to at most `particles` of the visited states, at even strides, so that memory stays linear in their number.

    Args:
        observations: `[..., O]`, in units in which a distance means something.
        visited: `[...]`, whether the step was taken.
        neighbours: k. Where a state is itself among the particles it counts as its own nearest.
        particles: that distances are measured to.

    Raises:
        ValueError: fewer than 1 neighbour, or not more particles than neighbours.
    """
    if not 1 <= neighbours < particles:
        raise ValueError(f"Needs 1 neighbour and more particles than that, got {neighbours} and {particles}.")
    places = observations.reshape(-1, observations.shape[-1])
    taken = visited.reshape(-1) > 0
    # The visited ones first, in their order, so that the strides run over them alone.
    order = jnp.argsort(~taken, stable=True)
    count = jnp.sum(taken)
    ranks = jnp.arange(particles)
    picked = order[jnp.where(count > particles, ranks * count // particles, jnp.minimum(ranks, len(order) - 1))]
    used = ranks < count
    others = places[picked]
    squares = jnp.sum(places**2, -1)[:, None] - 2.0 * places @ others.T + jnp.sum(others**2, -1)[None, :]
    squares = jnp.where(used[None, :], jnp.maximum(squares, 0.0), jnp.inf)
    nearest = -jax.lax.top_k(-squares, neighbours)[0][:, -1]
    bonus = jnp.where(taken & jnp.isfinite(nearest), jnp.log1p(jnp.sqrt(nearest)), 0.0)
    return jax.lax.stop_gradient(bonus.reshape(visited.shape))
