"""Hypergradient rules: estimators of grad Phi, including how the best response depends on the reward.

On samples, every estimator of grad Phi is a reweighting. A rule returns one weight per pair for the cost and one per step
for the reward, and the hypergradient is a single backward pass through the reward model of

    sum_bm measure (coupled * coupled_cost + uncoupled_cost + sum_kt reward_weight * discount * reward).

k is the response in its pair, p_k its slot weight (1/2 each, or (1, 0) where the reference gave the second), and w_i the
density ratio of the lower iterate at tilt s_i to the behaviour policy, cumulative up to step t:

| rule | weight of the coupled cost | weight of the reward |
|---|---|---|
| `penalty` (`forward`, `central`, `five_point`) | sum_i c_i s_i w_i(y0) w_i(y1) | - p_k sum_i c_i w_i |
| `boltzmann` | w_0(y0) w_0(y1) | (1 / beta) (centred dG/dpi) |
| `implicit` (for comparison) | w_0(y0) w_0(y1) | p_k d w_0 along H^-1 grad_lambda G, H the Hessian of -J |
| `decoupled` | w_0(y0) w_0(y1) | 0 |

On a shared sample, reward weights are centred over the responses to the same prompt (leave one out): their expectation
is 0, so this changes no expectation, and a reward that is constant over a prompt's responses gets no gradient.
"""

from jaxrlhf.bilevel.rules.boltzmann import boltzmann
from jaxrlhf.bilevel.rules.decoupled import decoupled
from jaxrlhf.bilevel.rules.implicit import implicit, implicit_from_direction
from jaxrlhf.bilevel.rules.penalty import central, five_point, forward, penalty
from jaxrlhf.bilevel.rules.rule import HypergradientRule, Losses, PolicyFunctions, RuleInputs, Weights

__all__ = [
    "HypergradientRule",
    "Losses",
    "PolicyFunctions",
    "RuleInputs",
    "Weights",
    "boltzmann",
    "central",
    "decoupled",
    "five_point",
    "forward",
    "implicit",
    "implicit_from_direction",
    "penalty",
]
