"""State entropy as a policy's reward."""

import jax

from jaxrlhf.base.problem import Sample
from jaxrlhf.base.types import Params
from jaxrlhf.control.ensembles import SampleReward
from jaxrlhf.mdp.exploration import state_entropy_bonus


def entropy_reward(units: jax.Array | float = 1.0, *, neighbours: int = 5, particles: int = 512) -> SampleReward:
    """Returns the reward `log(1 + distance to the k-th nearest state)` among the states of a sample's episodes.

    Args:
        units: factors `[O]` on the observations, in which distances are meaningful.
        neighbours: k.
        particles: maximum number of states that distances are measured to.
    """

    def reward(upper: Params, sample: Sample, frozen: Params) -> jax.Array:
        del upper, frozen
        return state_entropy_bonus(
            units * sample.responses.observations,
            sample.cumulative_discount > 0,
            neighbours=neighbours,
            particles=particles,
        )

    return reward
