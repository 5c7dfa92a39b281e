"""Random bandits: linear or network reward, tabular or network policy, realisable or misspecified, benign or hard."""

import jax
import jax.numpy as jnp

from jaxrlhf import exact, preferences
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import bilevel_descent, gradient, shared_adam
from jaxrlhf.exact import bandit
from jaxrlhf.known.problem import KnownProblem
from jaxrlhf.preferences import objectives
from jaxrlhf.preferences.objectives import Objective


def linear_reward(upper: Params, features: jax.Array) -> jax.Array:
    """Returns `features . upper`, `[C, K]` from `[C, K, F]`."""
    return features @ upper


def network_reward(upper: Params, features: jax.Array) -> jax.Array:
    """Returns a network of one hidden layer of tanh at each arm's features, `[C, K]`."""
    return jnp.tanh(features @ upper["in"] + upper["bias"][None, None]) @ upper["out"]


def network_policy(lower: Params, frozen: bandit.Bandit) -> jax.Array:
    """Returns logits `[C, K]`: a network on each context's features, added to the reference."""
    contexts = frozen.features.reshape(frozen.features.shape[0], -1)
    hidden = jnp.tanh(contexts @ lower["in"] + lower["bias"][None])
    return frozen.reference + hidden @ lower["out"]


def random_bandit(
    *,
    seed: int = 0,
    contexts: int = 2,
    arms: int = 5,
    features: int | None = None,
    network: str = "none",
    hidden: int = 16,
    objective: Objective | None = None,
    against_reference: bool = True,
    beta: float = 0.5,
    kl_price: float | None = None,
    gold_scale: float = 1.0,
) -> KnownProblem:
    """A random bandit: normal gold rewards, a softmax-normal reference.

    Args:
        seed: of the instance.
        contexts: C.
        arms: K.
        features: F random features of an arm, fewer than C K for a misspecified reward; None gives each arm its own, so
            that any reward can be held.
        network: "none" for a linear reward and a table of logits; "reward" makes the reward a network, "both" the policy
            too.
        hidden: width of the networks.
        objective: the upper objective; None is `utility`, whose optimum has a closed form if any reward can be held.
        against_reference: whether the second response of a pair comes from the reference.
        beta: weight of the lower level's KL.
        kl_price: of that utility; None is beta / 4.
        gold_scale: standard deviation of the gold rewards.

    Raises:
        ValueError: the kind of network is unknown, the objective does not suit the pairs, or both it and a KL
            price are given.
    """
    if network not in ("none", "reward", "both"):
        raise ValueError(f"network is none, reward or both, got {network!r}.")
    if objective is not None and kl_price is not None:
        raise ValueError("kl_price belongs to the utility that stands in for an objective; give one of the two.")
    utility = objective is None
    objective = objectives.utility(kl_price=beta / 4 if kl_price is None else kl_price) if utility else objective
    gold_key, reference_key, feature_key = jax.random.split(jax.random.key(seed), 3)
    shape = (contexts, arms)
    own = jnp.eye(contexts * arms).reshape(*shape, -1)
    frozen = bandit.Bandit(
        features=own if features is None else jax.random.normal(feature_key, (*shape, features)),
        gold=gold_scale * jax.random.normal(gold_key, shape),
        reference=jax.nn.log_softmax(0.5 * jax.random.normal(reference_key, shape), axis=-1),
    )
    reward = linear_reward if network == "none" else network_reward
    policy = network_policy if network == "both" else bandit.table
    size = frozen.features.shape[-1]

    def start(key, scale):
        keys = jax.random.split(key, 5)
        upper = scale * jax.random.normal(keys[0], (size,))
        if network != "none":
            upper = {
                "in": scale * jax.random.normal(keys[0], (size, hidden)),
                "bias": scale * jax.random.normal(keys[1], (hidden,)),
                "out": scale * jax.random.normal(keys[2], (hidden,)) / hidden**0.5,
            }
        lower = frozen.reference
        if network == "both":
            lower = {
                "in": scale * jax.random.normal(keys[3], (arms * size, hidden)),
                "bias": jnp.zeros(hidden),
                "out": scale * jax.random.normal(keys[4], (hidden, arms)) / hidden**0.5,
            }
        return upper, lower

    def algorithm(rule, solver, upper_optimizer, pairs=None, counts=False, choice=preferences.BRADLEY_TERRY, **options):
        problem = bandit.bandit_problem(
            reward, objective, policy=policy, against_reference=against_reference, pairs=pairs, counts=counts
        )
        if counts:
            annotate = preferences.counted_annotator(bandit.gold_score, choice=choice)
        else:
            kind = preferences.expected_annotator if pairs is None else preferences.gold_annotator
            annotate = kind(bandit.gold_score, labels=objective.labels, choice=choice)
        return bilevel_descent(problem, rule, solver, upper_optimizer, beta=beta, annotate=annotate, **options)

    def table_of_reward(upper):
        return exact.soft_policy(reward(upper, frozen.features), frozen.reference, beta)

    def worth(log_policy):
        return exact.soft_value(frozen.gold, frozen.reference, beta) - exact.evaluate_policy(
            log_policy, frozen.reference, frozen.gold, beta
        ).gap  # fmt: skip

    wins = exact.row_mean(lambda first, second: jax.nn.sigmoid(first - second), frozen.reference, frozen.gold)
    closed = (
        -float(exact.soft_value(wins, frozen.reference, objective.kl_price))
        if utility and objective.kl_price > 0
        else None
    )

    def tables(from_labels):
        return bandit.best_response(
            reward, objective, beta=beta, against_reference=against_reference, from_labels=from_labels
        )

    return KnownProblem(
        algorithm=algorithm,
        frozen=frozen,
        data=None,
        start=start,
        solver=gradient(shared_adam(0.05), steps=300) if network == "both" else tables(False),
        best_response_at=None if network == "both" else table_of_reward,
        solver_from_labels=tables(True) if network != "both" and against_reference else None,
        phi=lambda upper: exact.upper_value(
            objective,
            reward(upper, frozen.features),
            frozen.gold,
            frozen.reference,
            beta=beta,
            against_reference=against_reference,
        ),
        exploited=lambda upper: worth(table_of_reward(upper)),
        worth=lambda lower: worth(jax.nn.log_softmax(policy(lower, frozen), axis=-1)),
        best_worth=exact.soft_value(frozen.gold, frozen.reference, beta),
        optimum=closed if features is None else None,
        beta=beta,
        exact_solver=network != "both",
    )


def hard_bandit(
    *, seed: int = 0, contexts: int = 1, arms: int = 4, beta: float = 0.05, objective: Objective | None = None
) -> KnownProblem:
    """A bandit on which weak gradient domination is nearly tight: at a small beta and price optimal policies are
    deterministic.

    A softmax that has committed to a wrong arm lies on a plateau: the gradient of J vanishes with the probability of the
    right arm while J* - J does not. Near the optimum the gap falls like the inverse of the time, not geometrically.
    Arguments as in `random_bandit`; the utility's KL price is beta / 100.
    """
    return random_bandit(
        seed=seed,
        contexts=contexts,
        arms=arms,
        beta=beta,
        objective=objective,
        kl_price=None if objective is not None else beta / 100,
        gold_scale=0.3,
    )
