"""State entropy as a reward: pre-training that makes a policy explore before any labels are collected.

The particle estimate of the entropy of visited states is, up to constants, the mean log-distance of each to its k-th
nearest neighbour (Kozachenko-Leonenko; used in this way in arXiv 2106.05091). The term of each state is its reward.
"""

import jax
import jax.numpy as jnp


def state_entropy_bonus(
    observations: jax.Array, visited: jax.Array, *, neighbours: int = 5, particles: int = 512
) -> jax.Array:
    """Returns `log(1 + distance to the k-th nearest visited state)`, `[...]`; 0 on steps that were not taken.

    The 1 inside the logarithm keeps the reward non-negative, as in arXiv 2103.04551. Distances are Euclidean and are
    measured to at most `particles` visited states, evenly spaced in order, so memory is linear in the number of states.

    Args:
        observations: `[..., O]`, in units in which distances are meaningful.
        visited: `[...]`, whether the step was taken.
        neighbours: k. A state that is itself a particle counts as its own nearest neighbour.
        particles: maximum number of states that distances are measured to.

    Raises:
        ValueError: fewer than 1 neighbour, or not more particles than neighbours.
    """
    if not 1 <= neighbours < particles:
        raise ValueError(f"Needs 1 neighbour and more particles than that, got {neighbours} and {particles}.")
    states = observations.reshape(-1, observations.shape[-1])
    is_visited = visited.reshape(-1) > 0
    # Visited states first, in order, so that the stride runs over them alone.
    order = jnp.argsort(~is_visited, stable=True)
    count = jnp.sum(is_visited)
    ranks = jnp.arange(particles)
    selected = order[jnp.where(count > particles, ranks * count // particles, jnp.minimum(ranks, len(order) - 1))]
    is_particle = ranks < count
    nearest = nearest_distance(states, states[selected], is_particle, neighbours=neighbours)
    bonus = jnp.where(is_visited & jnp.isfinite(nearest), jnp.log1p(nearest), 0.0)
    return jax.lax.stop_gradient(bonus.reshape(visited.shape))


def nearest_distance(states: jax.Array, particles: jax.Array, valid: jax.Array, *, neighbours: int) -> jax.Array:
    """Returns the Euclidean distance of states `[N, O]` to their k-th nearest particle `[P, O]`, `[N]`.

    Args:
        states: what distances are measured from.
        particles: what they are measured to.
        valid: `[P]`, which particles count; with fewer than k of them the distance is infinite.
        neighbours: k.
    """
    squares = jnp.sum(states**2, -1)[:, None] - 2.0 * states @ particles.T + jnp.sum(particles**2, -1)[None, :]
    squares = jnp.where(valid[None, :], jnp.maximum(squares, 0.0), jnp.inf)
    return jnp.sqrt(-jax.lax.top_k(-squares, neighbours)[0][:, -1])
