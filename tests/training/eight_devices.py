"""One algorithm on 8 simulated devices, arranged in three ways, and on one; run by `training_test`.

    python tests/training/eight_devices.py four_rooms
    python tests/training/eight_devices.py stories260K MODEL_DIRECTORY
    python tests/training/eight_devices.py mixture
    python tests/training/eight_devices.py small                # the enumerable language, and microbatches

The same tokens and labels must give the same gradients (the first moments of Adam after a step) to 1e-5 and the same state
after 5 steps to 1e-4, relative; the same keys must give the same tokens. The hypergradient is reported separately, as a
stencil divides the rounding of its iterates by sigma. `small` also tests generation and scoring in microbatches on two
devices of a CPU. Prints its results as JSON.
"""

import functools
import importlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.programs import collectives_of, largest_collective
from jaxrlhf import bilevel, objectives, preferences
from jaxrlhf.lm import microbatch
from jaxrlhf.lm.generate import Generation
from jaxrlhf.lm.hugging_face.weights import load_decoder
from jaxrlhf.lm.language import alphabet_gold
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.pairing import Prompts
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.axes import decoder_names
from jaxrlhf.lm.transformer.config import Experts
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder
from jaxrlhf.mdp import four_rooms as rooms
from jaxrlhf.mdp import incentives
from jaxrlhf.training.sharding import by_size, make_mesh, shardings
from jaxrlhf.training.step import batch_sharding, compile_algorithm, init_on_devices, put_on_devices, within

MESHES = ({"fsdp": 8}, {"tensor": 2, "data": 4}, {"stencil": 2, "fsdp": 4})
STEPS = 5


class Case(NamedTuple):
    """An algorithm, where it begins, what it is given, and how its labels are made of `(key, sample, frozen)`."""

    algorithm: bilevel.Algorithm
    upper: Any
    lower: Any
    data: Any
    frozen: Any
    label: Callable
    names_of: Callable


def language(policy, shape, params, prompts, *, pairs: int, new_tokens: int) -> Case:
    """Returns a language model against its own reference, with a stencil of two iterates."""
    reward = reward_model(policy)
    objective = objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.1))
    problem = language_problem(policy, reward, objective, pairs=pairs, generation=Generation(new_tokens, (0,)))
    solver = bilevel.tangent(optax.adam(1e-3), optax.adam(1e-3))
    algorithm = bilevel.bilevel_descent(problem, bilevel.forward(0.2), solver, optax.adam(1e-3), beta=0.4)
    trunk = {name: part for name, part in params.items() if name != "output_head"}
    upper = {"trunk": trunk, "head": 0.3 + 0.1 * jax.random.normal(jax.random.key(3), (shape.width,))}
    gold = preferences.gold_annotator(lambda sample, frozen: alphabet_gold(sample.prompts, sample.responses))
    return Case(algorithm, upper, params, prompts, LanguageFrozen(params), jax.jit(gold), decoder_names)


def enumerable() -> Case:
    return of_letters(DecoderConfig(8, 16, 1, 2, 1, 8, 16, context_length=6))


def of_letters(shape: DecoderConfig) -> Case:
    policy = decoder(shape)
    prompts = Prompts(jnp.arange(16).reshape(8, 2) % 7 + 1, jnp.ones((8, 2), bool))
    params = optax.tree.cast(policy.init(jax.random.key(0)), jnp.result_type(float))
    return language(policy, shape, params, prompts, pairs=4, new_tokens=4)


def mixture() -> Case:
    """The enumerable language of a mixture of experts, which `tensor` splits."""
    shape = DecoderConfig(8, 16, 1, 2, 1, 8, 16, context_length=6, experts=Experts(4, 2))
    return of_letters(shape)


def stories(directory: str) -> Case:
    shape, params = load_decoder(pathlib.Path(directory), dtype=jnp.result_type(float))
    tokens = jax.random.randint(jax.random.key(1), (16, 6), 3, shape.vocabulary_size)
    prompts = Prompts(tokens, jnp.ones((16, 6), bool))
    return language(decoder(shape), shape, params, prompts, pairs=2, new_tokens=16)


def in_rooms() -> Case:
    """Four-Rooms by drawn episodes, each goal in four contexts, as the batch is split by contexts."""
    rewards = (rooms.follower_reward, rooms.leader_reward)
    environment, data = (
        jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4), each)
        for each in (rooms.four_rooms(), rooms.coefficients(0.003, 1.0))
    )
    data = data._replace(weight=data.weight / 4)
    problem = incentives.incentive_problem(*rewards, episodes=16, steps=50)
    algorithm = bilevel.bilevel_descent(
        problem, bilevel.forward(0.2), incentives.best_response(*rewards), optax.adam(0.1), beta=1.0
    )
    upper = rooms.draw_incentives(jax.random.key(0))
    return Case(algorithm, upper, jnp.zeros((8, 104, 4)), data, environment, incentives.unlabelled, by_size)


def relative(found: Any, wanted: Any) -> float:
    """Returns |found - wanted| / |wanted| over the inexact arrays of two trees."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    both = [(np.asarray(a, float), np.asarray(b, float)) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.inexact)]
    finite = [(a, b) for a, b in both if np.all(np.isfinite(b))]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in finite) / sum(np.sum(b**2) for _, b in finite)))


def moments(state: Any) -> list[Any]:
    """Returns the first moments of every Adam in a state."""
    adams = (each for each in jax.tree.leaves(state, is_leaf=lambda each: hasattr(each, "mu")) if hasattr(each, "mu"))
    return [each.mu for each in adams]


class Followed(NamedTuple):
    """What one arrangement did; the gradients are the upper level's, then the lower level's."""

    gradients: tuple[Any, Any]
    state: Any
    tokens: Any
    share: float
    text: str


def follow(case: Case, sizes: dict[str, int], given: list[bilevel.Labelled] | None) -> tuple[Followed, list]:
    """Takes the steps on given samples, or draws and labels them itself; returns what came of it, and the samples."""
    mesh = make_mesh(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    begins = jax.random.key(2), case.upper, case.lower
    where = shardings(jax.eval_shape(case.algorithm.init, *begins), mesh, case.names_of)
    frozen_where = shardings(case.frozen, mesh, case.names_of)
    compiled = compile_algorithm(case.algorithm, mesh, state=where, frozen=frozen_where)
    state = init_on_devices(case.algorithm.init, *begins, shardings=where)
    frozen = put_on_devices(case.frozen, frozen_where)
    drawn = compiled.propose(jax.random.key(7), state, case.data, frozen)
    tokens = jax.tree.map(np.asarray, drawn.responses)
    labelled = given[0] if given else bilevel.Labelled(drawn, case.label(jax.random.key(8), drawn, case.frozen))
    update = compiled.update.lower(jax.random.key(8), state, labelled, frozen).compile()
    text = update.as_text()
    parts = [(leaf.addressable_shards[0].data.nbytes, leaf.nbytes) for leaf in jax.tree.leaves(state)]
    share, gradients, used = sum(part for part, _ in parts) / sum(whole for _, whole in parts), None, []
    for step in range(STEPS):
        if given:
            labelled = given[step]
        else:
            sample = compiled.propose(jax.random.key(10 + step), state, case.data, frozen)
            labelled = bilevel.Labelled(sample, case.label(jax.random.key(30 + step), sample, case.frozen))
            labelled = jax.tree.map(np.asarray, labelled)
            used.append(labelled)
        state, _ = update(jax.random.key(50 + step), state, labelled, frozen)
        if gradients is None:
            gradients = jax.tree.map(np.asarray, (moments(state.upper_optimizer), moments(state.solver)))
    return Followed(gradients, jax.tree.map(np.asarray, state), tokens, share, text), used


def largest_layer_bytes(case: Case) -> int:
    """Returns the bytes of the largest array of one layer."""
    return max(
        leaf.nbytes // (len(leaf) if "layers" in str(path) else 1)
        for path, leaf in jax.tree_util.tree_leaves_with_path((case.upper, case.lower))
    )


def in_microbatches() -> dict[str, Any]:
    """Returns how completions and gradients of two devices, in four parts of eight rows, differ from all rows at once."""
    writing = importlib.import_module("jaxrlhf.lm.generate")
    writing.CPU_CACHE_BYTES, microbatch.CPU_TOKENS = 1, 144
    model = decoder(DecoderConfig(8, 16, 1, 2, 1, 8, 16, context_length=16))
    params, key = optax.tree.cast(model.init(jax.random.key(0)), jnp.result_type(float)), jax.random.key(1)
    rows = jnp.arange(128).reshape(64, 2) % 7 + 1, jnp.ones((64, 2), bool)
    write = functools.partial(writing.generate, model, max_new_tokens=7, stop_ids=(0,))

    def negative(params, count, *rows):
        log_prob = completion_log_probs(model, params, *rows, microbatches=count)
        return -jnp.sum(log_prob * jnp.cos(jnp.arange(log_prob.size).reshape(log_prob.shape)))

    def read(params, *rows):
        return jax.grad(negative)(params, None, *rows)

    mesh = make_mesh({"data": 2}, devices=jax.devices()[:2])
    split, seen, fewest = batch_sharding(mesh), [], microbatch.fewest_microbatches
    microbatch.fewest_microbatches = writing.fewest_microbatches = lambda *given, **settings: (
        seen.append(fewest(*given, **settings)) or seen[-1]
    )
    two = within(mesh, write), within(mesh, read)
    here = jax.jit(two[0])(params, key, *put_on_devices(rows, split))
    text = jax.jit(two[0]).lower(params, key, *put_on_devices(rows, split)).compile().as_text()
    moved = jax.jit(two[1])(params, *put_on_devices((*rows, here.tokens, here.mask), split))
    whole = jax.jit(functools.partial(write, microbatches=1))(params, key, *rows)
    return {
        "microbatches": seen,
        "same_tokens": all(map(np.array_equal, here[:2], whole[:2])),
        "gradients": relative(moved, jax.jit(jax.grad(negative), static_argnums=1)(params, 1, *rows, *whole[:2])),
        "bytes": sum(collectives_of(text).values()),
    }


def in_meshes(case: Case) -> dict[str, Any]:
    """Follows every arrangement and returns how far it is from one device."""
    one, given = follow(case, {"data": 1}, None)
    rows = max(leaf.nbytes for leaf in jax.tree.leaves(given[0]))
    found = {}
    for sizes in MESHES:
        here, _ = follow(case, sizes, given)
        found[",".join(f"{axis}={size}" for axis, size in sizes.items())] = {
            "hypergradient": relative(here.gradients[0], one.gradients[0]),
            "gradients": relative(*(each.gradients[1] for each in (here, one))) if one.gradients[1] else 0.0,
            "states": relative(here.state, one.state),
            "same_tokens": all(map(np.array_equal, jax.tree.leaves(here.tokens), jax.tree.leaves(one.tokens))),
            "share": here.share,
            "largest_collective": largest_collective(here.text) / max(largest_layer_bytes(case), rows),
            "host": any(word in here.text for word in ("infeed", "outfeed", "callback", " send(", " recv(")),
        }
    return found


def main(name: str, *arguments: str) -> None:
    """Prints the results of one problem, or of both small ones."""
    assert jax.device_count() == 8
    if name == "small":
        found = {"enumerable": in_meshes(enumerable()), "microbatches": in_microbatches()}
    else:
        found = in_meshes({"stories260K": stories, "four_rooms": in_rooms, "mixture": mixture}[name](*arguments))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
