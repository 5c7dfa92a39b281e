"""Runs that go on where they were: kept at failures and at signals, never damaged by a step that is not finite."""

import json
import os
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training.guard import Guarded, Patience, guarded
from jaxrlhf.training.keeping import Keeper
from jaxrlhf.training.loop import outer_steps
from jaxrlhf.training.run_folder import RunFolder


class State(NamedTuple):
    step: jax.Array
    params: jax.Array
    hidden: jax.Array


class Info(NamedTuple):
    loss: jax.Array


def init(start):
    return State(jnp.zeros((), jnp.int32), start, jnp.full((), jnp.nan))


def update(key, state, data, frozen):
    loss = jnp.sum(state.params * data) + frozen
    params = state.params - 0.1 * data * jax.random.uniform(key, state.params.shape)
    return State(state.step + 1, params, state.hidden), Info(loss)


def where():
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: here, jax.eval_shape(init, jnp.zeros(3)))


def batches(count, *, fails_at=None):
    for number in range(count):
        if number == fails_at:
            raise OSError("the shard is gone")
        yield jnp.arange(3.0) + number


def take(tmp_path, steps, *, seed=0, minutes=None, every=None, fails_at=None, meanwhile=lambda step: None, scores=()):
    """Runs up to a number of steps in one folder; returns the last state and the steps whose data were used."""
    folder = RunFolder(tmp_path, "study", fixed="mine", resume=True)
    step, used = jax.jit(guarded(update, state=1), donate_argnums=1), []
    with Keeper(folder, {"seed": seed}, minutes=minutes, steps=every, keep_best=int(len(scores) > 0)) as keeper:
        state, notes = keeper.begin(init, (jnp.ones(3),), where())
        begun = notes.get("data", 0)
        rows = list(range(begun, steps))
        data = (batch for number, batch in enumerate(batches(steps, fails_at=fails_at)) if number >= begun)
        if notes:
            folder.append_metrics(step=begun, loss=notes["info"]["loss"])
        for reached in outer_steps(step, state, data, 0.0, key=jax.random.key(1)):
            if reached.info is not None:
                folder.append_metrics(step=reached.told, loss=reached.info.info.loss)
            if reached.latest is None:
                break
            state = reached.state
            used.append(rows.pop(0))
            meanwhile(reached.step)
            noted = {"data": reached.step, "info": reached.latest.info}
            score = dict(scores).get(reached.step)
            if keeper.stops(reached.step, state, noted, last=reached.step == steps, score=score):
                break
        if scores:
            state = keeper.best(jax.tree.map(jnp.zeros_like, state))
    lines = folder.metrics()
    del folder
    return state, used, lines


@pytest.fixture
def whole(tmp_path):
    return take(tmp_path / "whole", 7)


def same(found, wanted):
    np.testing.assert_array_equal(found[0].params, wanted[0].params)
    assert found[2] == wanted[2]


def test_what_fails_is_kept_and_goes_on_bit_for_bit(tmp_path, whole):
    with pytest.raises(OSError, match="the shard is gone"):
        take(tmp_path, 7, fails_at=4)
    found = take(tmp_path, 7)
    assert found[1] == [4, 5, 6]
    same(found, whole)


def test_metrics_of_steps_that_are_taken_again_are_taken_back(tmp_path, whole, monkeypatch):
    def dies(step):
        if step == 6:
            raise SystemExit

    # As a killed process would: nothing after the last checkpoint is kept.
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "__exit__", lambda self, *error: self._ending.close())
        with pytest.raises(SystemExit):
            take(tmp_path, 7, every=4, meanwhile=dies)
    found = take(tmp_path, 7)
    assert found[1] == [4, 5, 6]
    same(found, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_the_step_and_it_goes_on(tmp_path, whole, number):
    found = take(tmp_path, 7, meanwhile=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    assert found[1] == [0, 1, 2]
    found = take(tmp_path, 7)
    assert found[1] == [3, 4, 5, 6]
    same(found, whole)


def test_a_finished_run_takes_more_steps(tmp_path, whole):
    take(tmp_path, 5)
    found = take(tmp_path, 7)
    assert found[1] == [5, 6]
    same(found, whole)


def test_the_best_step_is_kept_beside_the_last(tmp_path, whole):
    wanted = take(tmp_path / "three", 3)[0]
    best = take(tmp_path / "best", 7, scores=((1, 0.1), (3, 0.9), (5, 0.2), (7, 0.3)))[0]
    assert best.step == 3
    np.testing.assert_array_equal(best.arrays.params, wanted.params)
    kept = sorted(int(path.name) for path in (tmp_path / "best" / "mine" / "checkpoints").glob("[0-9]*"))
    assert kept == [3, 5, 7]
    # The run itself goes on from the last.
    same(take(tmp_path / "best", 7), whole)


def test_another_runs_folder_is_refused(tmp_path):
    take(tmp_path, 2)
    with pytest.raises(ValueError, match="another run's: its seed is 0, this one's 1"):
        take(tmp_path, 4, seed=1)
    with pytest.raises(ValueError, match="minutes between two checkpoints must be positive, got 0"):
        take(tmp_path, 4, minutes=0)


def test_a_step_that_is_not_finite_is_not_taken(tmp_path):
    state, step = init(jnp.ones(3)), jax.jit(guarded(update, state=1))
    key, good, bad = jax.random.key(0), jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0])
    kept, found = step(key, state, bad, 0.0)
    assert found.skipped and int(kept.step) == 1 and np.isnan(found.info.loss)
    np.testing.assert_array_equal(kept.params, state.params)
    moved, found = step(key, state, good, 0.0)
    assert not found.skipped
    np.testing.assert_array_equal(moved.params, update(key, state, good, 0.0)[0].params)


def test_patience_keeps_what_went_wrong_and_ends(tmp_path):
    patience = Patience(tmp_path / "skipped", limit=2)
    assert patience.notes() == []
    wrong, right = (
        Guarded(Info(jnp.asarray(value)), jnp.asarray(skipped)) for value, skipped in ((jnp.nan, True), (1.0, False))
    )
    patience.take(3, wrong, {"tokens": np.arange(4)})
    patience.take(4, right, None)
    patience.take(5, wrong, None)
    with pytest.raises(ValueError, match=r"2 steps in a row up to step 6 were not finite \(loss nan\)"):
        patience.take(6, wrong, {"tokens": np.arange(2)})
    np.testing.assert_array_equal(next(iter(np.load(tmp_path / "skipped" / "step-3.npz").values())), np.arange(4))
    assert patience.skipped == 3 and "3 steps came to something" in patience.notes()[0]
    with pytest.raises(ValueError, match="At least 1 step must fail"):
        Patience(tmp_path, limit=0)


def test_metrics_are_plain_lines(tmp_path, whole):
    lines = (tmp_path / "whole" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
