"""The algorithm of `jaxrlhf align`: a method by its name, labels that are kept, a target for the KL."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import bilevel, preferences
from jaxrlhf.algorithms.methods import METHODS, Critic, Method, Parts
from jaxrlhf.algorithms.methods import bilevel as bilevel_method
from jaxrlhf.algorithms.target_kl import ramp, target_kl
from jaxrlhf.base.algorithm import Algorithm, compose, label_by
from jaxrlhf.base.problem import SKIPPED, BilevelProblem, Labelled, Sample, uniform_measure
from jaxrlhf.base.types import Key, Params
from jaxrlhf.commands.align_config import Align, estimator_of, measures_mistakes
from jaxrlhf.commands.method_flags import beta_of, learns_scale
from jaxrlhf.commands.mixture import weights_of
from jaxrlhf.lm.pairing import Prompts, Responses
from jaxrlhf.preferences.mixture import attach_scores, mixture_optimizer, report_mixture
from jaxrlhf.preferences.scale import scale_optimizer
from jaxrlhf.training.sharding import parse_mesh

RAMP = 2 / 3
"""Fraction of a run over which the KL that is aimed at rises to --target-kl."""


def method_of(config: Align) -> Method:
    """Returns the method of a run.

    Functions of --rewards score the responses of pairs alone, so the pairs of bilevel are then with the reference.
    """
    method = METHODS[config.method]
    if config.rewards and config.method == "bilevel":
        return method._replace(assemble=functools.partial(bilevel_method, against="reference"), against="reference")
    return method


class Assembled(NamedTuple):
    """The algorithm of a run, and where labels are kept the `review` of `methods.Reusing`."""

    algorithm: Algorithm
    review: Callable[[Key, Any, Params], Any] | None


def build_algorithm(
    config: Align,
    problem: Callable[..., BilevelProblem],
    critic: Callable[[optax.GradientTransformation], Critic],
    annotate: preferences.Annotator | None,
    start: tuple[Params, Params, Params],
    *,
    prompt_length: int,
    existing_rows: int = 0,
) -> Assembled:
    """Returns the algorithm of a run.

    Args:
        config: of the run.
        problem: of `methods.Parts`.
        critic: `(optimizer) -> ` the critic of PPO.
        annotate: the annotator, if it can be traced.
        start: upper, lower and frozen parameters, or their shapes.
        prompt_length: columns of a step's prompts, where labels are kept.
        existing_rows: rows kept for labels that exist before the run.
    """
    method = method_of(config)
    parts = _parts(config, problem, critic)
    first = beta_of(config) if method.weighs == "beta" else config.kl_price

    shapes: Any = _sample_shapes(config, method.assemble(parts, first), start, prompt_length) if config.reuse else None

    def reusing(weight, parts=parts):
        return method.reusing(
            method.assemble(parts, weight),
            parts,
            weight,
            sample=shapes,
            capacity=existing_rows - (-config.kept_labels // config.pairs),
            size=config.batch_size,
            updates=config.reuse,
        )

    def make(weight, parts=parts):
        return reusing(weight, parts).algorithm if config.reuse else method.assemble(parts, weight)

    def whole(parts):
        # The price of the label gradient is all that holds its policy, and is moved in place of a beta.
        steered = functools.partial(make, parts=parts)
        return steered(first) if config.target_kl is None else _steered(config, steered, method, first)

    algorithm = whole(parts)
    if measures_mistakes(config):
        algorithm = _with_measured_mistakes(algorithm, parts, whole)
    if config.rewards:
        weight = _label_weight(config)
        algorithm = report_mixture(algorithm, weights_of, kl_price=config.kl_price, label_weight=weight)
    label = label_by(annotate)
    if label is not None and config.labels_per_step is not None:
        label = _label_some(label, config.labels_per_step)
    algorithm = algorithm._replace(step=compose(algorithm.propose, label, algorithm.update))
    return Assembled(algorithm, reusing(first).review if config.reuse else None)


def _parts(config: Align, problem: Callable[..., BilevelProblem], critic: Callable[..., Critic]) -> Parts:
    def adam(rate):
        return optax.adam(optax.linear_schedule(0.0, rate, config.warmup) if config.warmup else rate)

    rates = learning_rates(config)
    reward, fit = adam(rates.reward), adam(rates.reward)
    if config.rewards:
        weights = adam(_given(config.weights_learning_rate, 0.02))
        reward, fit = mixture_optimizer(weights, reward), mixture_optimizer(weights, fit)
    if learns_scale(config):
        reward = scale_optimizer(reward, adam(_given(config.scale_learning_rate, 0.03)))
        fit = scale_optimizer(fit, optax.set_to_zero())
    return Parts(
        problem,
        policy_optimizer=adam(rates.policy),
        tangent_optimizer=adam(rates.tangent),
        reward_optimizer=reward,
        fit_optimizer=fit,
        rule=rule_of(config),
        kl_price=config.kl_price,
        utility_weight=config.utility_weight,
        scaled=learns_scale(config),
        critic=critic(adam(rates.critic)) if config.method == "ppo" else None,
        # In parallel only where the mesh splits the tilts.
        sequential=parse_mesh(config.mesh).get("stencil", 1) == 1,
        label_weight=_label_weight(config),
        choice=preferences.Choice(mistake=config.mistakes if isinstance(config.mistakes, float) else 0.0),
    )


def rule_of(config: Align) -> bilevel.HypergradientRule:
    """Returns the rule of --estimator.

    Raises:
        ValueError: --relative-sigma is too large for it.
    """
    rules = {
        "central": lambda: bilevel.central(relative_sigma=config.relative_sigma),
        "forward": lambda: bilevel.forward(config.relative_sigma),
        "five_point": lambda: bilevel.five_point(config.relative_sigma),
        "boltzmann": bilevel.boltzmann,
        "decoupled": bilevel.decoupled,
    }
    return rules[estimator_of(config)]()


def _label_weight(config: Align) -> float:
    return config.batch_size * config.pairs / labels_per_step(config)


def labels_per_step(config: Align) -> int:
    """Returns the labels that a step asks for."""
    return config.batch_size * config.pairs if config.labels_per_step is None else config.labels_per_step


def _sample_shapes(config: Align, algorithm: Algorithm, start: tuple[Params, Params, Params], length: int) -> Sample:
    """Returns the shapes of what the algorithm proposes in a step."""

    def propose(upper, lower, frozen):
        key = jax.random.key(0)
        tokens = jnp.zeros((config.batch_size, length), jnp.int32)
        state = algorithm.init(key, upper, lower)
        sample = algorithm.propose(key, state, Prompts(tokens, tokens == 0), frozen)
        if not config.rewards:
            return sample
        # Scores are computed on the host, and kept with the pairs.
        scores = jnp.zeros((*sample.measure.shape, 2, len(config.rewards)), jnp.float32)
        return attach_scores(Labelled(sample, scores), scores).sample

    return jax.eval_shape(propose, *start)


def _with_measured_mistakes(algorithm: Algorithm, parts: Parts, whole: Callable[[Parts], Algorithm]) -> Algorithm:
    """Returns the algorithm whose likelihood allows for the rate of mistakes in `frozen.annotator`, `[]`."""

    def update(key, state, labelled, frozen):
        choice = preferences.Choice(mistake=frozen.annotator)
        return whole(parts._replace(choice=choice)).update(key, state, labelled, frozen)

    return algorithm._replace(update=update)


class SteeredInfo(NamedTuple):
    """Diagnostics of a step with a target KL.

    Attributes:
        inner: the algorithm's.
        kl, labels: of it.
        beta: the weight of the next step.
        target: the KL that this step aimed at, in nats; NaN where it left beta alone.
    """

    inner: Any
    kl: jax.Array
    labels: jax.Array
    beta: jax.Array
    target: jax.Array


def _steered(config: Align, make: Callable[[Any], Algorithm], method: Method, first: float) -> Algorithm:
    """Returns the method with its beta (or price) moved towards --target-kl, which is reached after `RAMP` of the run."""
    assert config.target_kl is not None
    # A reward that has seen no labels yet leaves the policy where it is.
    begin = min(config.warmup, config.steps // 5) if method.learns == "reward" else 0
    target = ramp(config.target_kl, steps=round(RAMP * config.steps), begin=begin)
    algorithm = target_kl(make, target=target, beta=first, gain=0.03, proportional=1.5)

    def update(key, state, labelled, frozen):
        state, info = algorithm.update(key, state, labelled, frozen)
        return state, SteeredInfo(info, info.kl, info.labels, jnp.exp(state.log_beta), jnp.asarray(target(state.step)))

    return algorithm._replace(update=update)


def _chosen(key: Key, shape: tuple[int, ...], count: int) -> jax.Array:
    """Returns the flat indices `[count]` of pairs `[B, M]`, drawn without replacement."""
    return jax.random.choice(key, int(np.prod(shape)), (count,), replace=False)


def _label_some(label: Callable[..., Labelled], count: int) -> Callable[..., Labelled]:
    """Returns the traced labeller with labels for some pairs only."""

    def some(key, sample, frozen):
        chosen_key, label_key = jax.random.split(key)
        labels = label(label_key, sample, frozen).labels
        chosen = jnp.zeros(sample.measure.size, bool).at[_chosen(chosen_key, sample.measure.shape, count)].set(True)
        return Labelled(sample, jnp.where(chosen.reshape(*sample.measure.shape, 1), labels, SKIPPED))

    return some


def label_chosen(annotate: preferences.Annotator) -> Callable[[Key, Sample, Params, jax.Array], jax.Array]:
    """Returns the traceable annotator whose labels count for the pairs of `chosen` only, `make_outer_step`'s indices."""

    def annotate_chosen(key, sample, frozen, chosen):
        labels = annotate(key, sample, frozen)
        is_chosen = jnp.zeros(sample.measure.size, bool).at[chosen].set(True)
        return jnp.where(is_chosen.reshape(*sample.measure.shape, 1), labels, SKIPPED)

    return annotate_chosen


def ask_about_some(annotate: Callable[[Key, Sample], Any], count: int) -> Callable[..., np.ndarray]:
    """Returns the host annotator `(key, sample, chosen=None) -> labels [B, M, 1]` that is shown `count` pairs.

    Those of `chosen`, `make_outer_step`'s indices, in its order; else some drawn at random.
    """

    def annotate_some(key, sample, chosen=None):
        chosen_key, label_key = jax.random.split(key)
        shape = sample.measure.shape
        if chosen is None:
            chosen = np.sort(np.asarray(_chosen(chosen_key, shape, count)))
        rows = np.unravel_index(chosen, shape)
        measure, num_draws = uniform_measure(count, 1)
        shown = sample._replace(
            prompts=Prompts(*(jnp.asarray(np.asarray(leaf)[rows[0]]) for leaf in sample.prompts)),
            responses=Responses(*(jnp.asarray(np.asarray(leaf)[rows][:, None]) for leaf in sample.responses)),
            measure=measure,
            num_draws=num_draws,
        )
        given = np.asarray(annotate(label_key, shown)).reshape(-1)
        labels = np.full(shape, SKIPPED, np.float32)
        labels[rows] = given
        return labels[..., None]

    return annotate_some


class LearningRates(NamedTuple):
    """Of the policy, of its response to the reward, of the reward model, and of PPO's critic."""

    policy: float
    tangent: float
    reward: float
    critic: float


def learning_rates(config: Align) -> LearningRates:
    """Returns the learning rates given, or their defaults; a rate of 0 is one, and keeps its parameters fixed."""
    policy = _given(config.policy_learning_rate, 1e-3 if config.lora_rank else 2e-4)
    reward = _given(config.reward_learning_rate, 2e-3 if config.lora_rank else 1e-3)
    tangent, critic = _given(config.tangent_learning_rate, policy / 20), _given(config.critic_learning_rate, reward)
    return LearningRates(policy, tangent, reward, critic)


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
