"""Our training steps for `benchmarks.gpu`, and the check of the FLOP count against their programs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.batches import as_demonstrations, as_pairs, as_prompts, random_tokens
from benchmarks.bilevel_steps import step_algorithm, step_problem
from benchmarks.gpu.cases import TINY, Case, ModelName, Row, Sizes, Workload, tiny_model
from benchmarks.gpu.flops import step_flops
from benchmarks.learning import adamw
from benchmarks.programs import flops_of
from benchmarks.timing import check_close, stateful
from jaxrlhf import bilevel
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Labelled
from jaxrlhf.lm import lora
from jaxrlhf.lm.learning import learning, preference_loss, supervised_loss
from jaxrlhf.lm.problem import LanguageFrozen
from jaxrlhf.lm.reward import NOT_IN_TRUNK, reward_model
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import LanguageModel, decoder
from jaxrlhf.lm.transformer.trunk import MAX_UNROLLED_LAYERS

REMAT: dict[Workload, tuple[str, ...]] = {
    "supervised": ("products", "layer"),
    "reward": ("products", "layer"),
    "bilevel": ("products", "layer"),
}
"""Rematerialisation policies, tried in order until the step fits."""


class Step(NamedTuple):
    """`update(state, batch, frozen) -> (state, info)` and its arguments."""

    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    frozen: Any


def random_weights(model: DecoderConfig, dtype: Any) -> Params:
    """Returns random parameters drawn in their dtype, so that no float32 copy of 8 billion exists at any time."""
    key, scale = jax.random.key(0), model.width**-0.5

    @functools.partial(jax.jit, static_argnums=1)
    def draw(index, shape):
        return scale * jax.random.normal(jax.random.fold_in(key, index), shape, dtype)

    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(decoder(model).init, key))
    return jax.tree.unflatten(
        structure,
        [
            jnp.ones(leaf.shape, dtype) if path[-1].key == "scale" else draw(index, leaf.shape)
            for index, (path, leaf) in enumerate(leaves)
        ],
    )


def initial_reward(base: Params, rank: int) -> Params:
    """Returns the trained parameters of a reward model. Its head is random, as a zero one gives the policy no gradient."""
    width = base["embedding"].shape[1]
    head = 0.1 * jax.random.normal(jax.random.key(2), (width,))
    if rank:
        return {"adapter": lora.init_adapter(jax.random.key(3), base, rank=rank), "head": head}
    return {"trunk": {name: part for name, part in base.items() if name not in NOT_IN_TRUNK}, "head": head}


def supervised_step(policy: LanguageModel, base: Params, rank: int, tokens: np.ndarray, learning_rate=1e-5) -> Step:
    """The step of supervised fine-tuning on every token but the first."""
    params_of = lora.policy_on_reference if rank else (lambda lower, frozen: lower)
    algorithm = learning(supervised_loss(policy, params_of=params_of), adamw(learning_rate))
    batch = jax.device_put(as_demonstrations(tokens))
    lower = lora.init_adapter(jax.random.key(1), base, rank=rank) if rank else base
    return Step(algorithm.update, algorithm.init(lower), batch, LanguageFrozen(base if rank else ()))


def reward_step(policy: LanguageModel, base: Params, rank: int, tokens: np.ndarray) -> Step:
    """The step of a reward model, each two texts a pair."""
    params_of = lora.reward_on_reference if rank else (lambda upper, frozen: upper)
    algorithm = learning(preference_loss(reward_model(policy), params_of=params_of), adamw(1e-5))
    batch = jax.device_put(as_pairs(tokens.reshape(-1, 2, tokens.shape[1])))
    state = algorithm.init(initial_reward(base, rank))
    return Step(algorithm.update, state, batch, LanguageFrozen(base if rank else ()))


def bilevel_step(policy: LanguageModel, base: Params, rank: int, prompts: np.ndarray, sizes: Sizes) -> Step:
    """The bilevel update alone, on a sample of the policy with random labels."""
    params_of = {"policy_params": lora.policy_on_reference, "reward_params": lora.reward_on_reference} if rank else {}
    problem = step_problem(policy, pairs=sizes.pairs, new_tokens=sizes.completion, **params_of)
    solver = bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))
    algorithm = step_algorithm(problem, bilevel.central(relative_sigma=0.2), solver, annotate=None)
    key, *keys = jax.random.split(jax.random.key(4), 4)
    lower = lora.init_adapter(keys[0], base, rank=rank) if rank else base
    sample = jax.jit(problem.sample)(keys[1], lower, as_prompts(prompts), LanguageFrozen(base))
    labels = jax.random.bernoulli(keys[2], shape=(*sample.measure.shape, 1)).astype(jnp.float32)

    def update(state, labelled, frozen):
        return algorithm.update(key, state, labelled, frozen)

    state = algorithm.init(key, initial_reward(base, rank), lower)
    return Step(update, state, Labelled(sample, labels), LanguageFrozen(base if rank else ()))


def step_of(case: Case, *, remat: str | None) -> Step:
    """Returns the step of a case. Its weights live only in its state, or in `frozen` under adapters."""
    row, model, sizes = case.row, case.model, case.sizes
    base = random_weights(model, jnp.bfloat16 if row.rank else jnp.float32)
    policy = decoder(model, dtype=row.dtype, remat=remat, attention=case.attention)
    if row.workload == "bilevel":
        return bilevel_step(policy, base, row.rank, random_tokens(model, sizes.prompts, sizes.prompt), sizes)
    make = supervised_step if row.workload == "supervised" else reward_step
    return make(policy, base, row.rank, random_tokens(model, sizes.texts, sizes.length))


def call_of(step: Step) -> Callable[[], Any]:
    """Returns the call of a compiled step, which returns its info."""
    update = jax.jit(step.update, donate_argnums=0)
    return stateful(lambda state: update(state, step.batch, step.frozen), step.state)


def check_flops() -> str:
    """Checks the count against the matrix products in the programs of tiny models without rematerialisation.

    Raises:
        ValueError: they differ by more than 1 %.
    """
    ratios, models = {}, get_args(ModelName)
    for model, rank in zip(models, (0, 4), strict=True):
        for workload in REMAT:
            # Enough layers for a scan. Unrolled, the first layer has no input gradient under adapters.
            case = Case(Row(model, rank, workload), tiny_model(model, MAX_UNROLLED_LAYERS + 1), TINY, 1)
            update, *arguments = step_of(case, remat=None)
            program = flops_of(jax.make_jaxpr(update)(*arguments))
            name = f"{workload}, {f'rank {rank}' if rank else 'all weights'}"
            ratios[name] = step_flops(case, as_compiled=True) / program
    check_close("FLOPs of programs", list(ratios.values()), np.ones(len(ratios)), tolerance=0.01)
    listed = "; ".join(f"{name}: {ratio:.4f}" for name, ratio in ratios.items())
    return (
        f"Counted FLOPs, attention as compiled, divided by those in the programs of tiny models (within 1 %): {listed}"
    )
