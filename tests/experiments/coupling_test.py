"""The trajectory families: exact bounds, whole trajectories as responses, and the gradient that the methods follow."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "experiments"))

import coupling

from jaxrlhf import mdp


def episodes(family):
    return jax.jit(coupling.episodes_of, static_argnums=0)(family, jax.random.key(3))


@pytest.mark.parametrize("family", coupling.FAMILIES)
def test_families_are_what_they_say(family):
    frozen = episodes(family)
    half = coupling.STATES // 2
    features, successors = np.asarray(frozen.features), np.asarray(frozen.successors)
    alike = [np.array_equal(features[state], features[state + 1]) for state in range(0, coupling.STATES, 2)]
    assert all(alike) == (family == "part")
    stays = np.all((np.asarray(successors[..., 0]) < half) == (np.arange(coupling.STATES) < half)[:, None])
    assert stays == (family == "shared")
    flat, gold = features.reshape(-1, coupling.FEATURES), np.asarray(frozen.gold).ravel()
    missed = gold - flat @ np.linalg.lstsq(flat, gold, rcond=None)[0]
    assert (np.linalg.norm(missed) < 1e-4) == (family == "whole")


def test_the_best_utility_is_that_of_the_best_policy():
    """No policy on the listed trajectories does better; brute force over their probabilities agrees."""
    frozen, price = episodes("shaping"), 0.2

    @jax.jit
    def both(frozen):
        tree = mdp.history_tree(frozen)
        gold = tree.returns(frozen.gold, frozen.discount)
        reference = tree.log_prob(frozen.reference[tree.states])
        return coupling.best_utility(frozen, price), gold, reference

    best, gold, reference = map(np.asarray, both(frozen))
    wins = np.einsum("bpq,bq->bp", 1 / (1 + np.exp(gold[:, None, :] - gold[:, :, None])), np.exp(reference))
    # Deterministic transitions: a policy is any distribution over the trajectories from a start.
    expected = price * np.log(np.sum(np.exp(reference + wins / price), axis=1))
    np.testing.assert_allclose(best, expected.mean(), rtol=1e-5)


@pytest.mark.slow
def test_a_short_run_gains_and_the_table_pairs_instances(capsys, tmp_path):
    arguments = ["--families", "shared", "--instances=2", "--steps=20", "--betas", "0.3", f"--output={tmp_path}"]
    coupling.main(tyro.cli(coupling.Config, args=[*arguments, "--methods", coupling.SCALED, coupling.ITERATED]))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| shared")]
    shares = [float(row.split("|")[3].split("±")[0]) for row in rows]
    assert len(rows) == 2 and all(0.1 < share < 1.0 for share in shares)
    gain = float(rows[0].split("|")[4].split("±")[0])
    np.testing.assert_allclose(gain, shares[0] - shares[1], atol=2e-3)
    assert (tmp_path / "shares.json").exists()


def test_what_does_not_exist_is_named(tmp_path):
    with pytest.raises(SystemExit, match="There is no family maze; there are whole; part"):
        coupling.main(coupling.Config(families=("maze",), output=tmp_path))
    with pytest.raises(SystemExit, match="There is no method newton"):
        coupling.main(coupling.Config(methods=("newton",), output=tmp_path))
    with pytest.raises(SystemExit, match="betas above 0"):
        coupling.main(coupling.Config(betas=(0.0,), output=tmp_path))


@pytest.mark.slow
def test_a_trajectory_is_one_response():
    frozen = episodes("whole")
    algorithm, first = coupling.method_of(coupling.COUPLED, 0.5, coupling.Config(steps=3, pairs=2))

    @jax.jit
    def drawn(frozen):
        state = algorithm.init(jax.random.key(0), first, mdp.reference_logits(frozen))
        sample = algorithm.propose(jax.random.key(1), state, None, frozen)
        return sample, mdp.gold_score(sample, frozen), mdp.gold_steps(sample, frozen)

    sample, score, steps = drawn(frozen)
    assert sample.behaviour_log_prob.shape == sample.cumulative_discount.shape == (4, 2, 2, 1)
    assert jnp.all(sample.cumulative_discount == 1)
    np.testing.assert_allclose(score, steps.sum(-1), rtol=1e-5)
