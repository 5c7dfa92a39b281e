"""Resumable runs: checkpoints at failures and signals; non-finite steps are skipped."""

import json
import os
import signal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training.guard import Guarded, SkippedSteps, guarded
from jaxrlhf.training.loop import outer_steps
from jaxrlhf.training.resume import RunCheckpointer
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
    """Runs up to a number of steps in one folder; returns the last state, the batches used, and the metrics."""
    folder = RunFolder(tmp_path, "study", fixed="mine", resume=True)
    step, used = jax.jit(guarded(update, state=1), donate_argnums=1), []
    with RunCheckpointer(
        folder, {"seed": seed}, minutes=minutes, steps=every, keep_best=int(len(scores) > 0)
    ) as checkpointer:
        state, notes = checkpointer.restore_or_init(init, (jnp.ones(3),), where())
        begun = notes.get("data", 0)
        rows = list(range(begun, steps))
        data = (batch for number, batch in enumerate(batches(steps, fails_at=fails_at)) if number >= begun)
        if notes:
            folder.append_metrics(step=begun, loss=notes["info"]["loss"])
        for reached in outer_steps(step, state, data, 0.0, key=jax.random.key(1)):
            if reached.info is not None:
                folder.append_metrics(step=reached.info_step, loss=reached.info.info.loss)
            if reached.latest_info is None:
                break
            state = reached.state
            used.append(rows.pop(0))
            meanwhile(reached.step)
            noted = {"data": reached.step, "info": reached.latest_info.info}
            score = dict(scores).get(reached.step)
            if checkpointer.after_step(reached.step, state, noted, last=reached.step == steps, score=score):
                break
        if scores:
            state = checkpointer.best(jax.tree.map(jnp.zeros_like, state))
    lines = folder.metrics()
    del folder
    return state, used, lines


@pytest.fixture
def whole(tmp_path):
    return take(tmp_path / "whole", 7)


def same(found, wanted):
    np.testing.assert_array_equal(found[0].params, wanted[0].params)
    assert found[2] == wanted[2]


def test_a_failed_run_resumes_bit_for_bit(tmp_path, whole):
    with pytest.raises(OSError, match="the shard is gone"):
        take(tmp_path, 7, fails_at=4)
    found = take(tmp_path, 7)
    assert found[1] == [4, 5, 6]
    same(found, whole)


def test_metrics_after_the_checkpoint_are_removed_on_resume(tmp_path, whole, monkeypatch):
    def dies(step):
        if step == 6:
            raise SystemExit

    # Like a killed process: nothing after the last checkpoint is saved.
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpointer, "__exit__", lambda self, *error: self._exit_stack.close())
        with pytest.raises(SystemExit):
            take(tmp_path, 7, every=4, meanwhile=dies)
    found = take(tmp_path, 7)
    assert found[1] == [4, 5, 6]
    same(found, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_after_the_step_and_it_resumes(tmp_path, whole, number):
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


def test_the_best_step_is_kept_besides_the_last(tmp_path, whole):
    wanted = take(tmp_path / "three", 3)[0]
    best = take(tmp_path / "best", 7, scores=((1, 0.1), (3, 0.9), (5, 0.2), (7, 0.3)))[0]
    assert best.step == 3
    np.testing.assert_array_equal(best.arrays.params, wanted.params)
    kept = sorted(int(path.name) for path in (tmp_path / "best" / "mine" / "checkpoints").glob("[0-9]*"))
    assert kept == [3, 5, 7]
    # The run itself resumes from the last.
    same(take(tmp_path / "best", 7), whole)


def test_another_runs_folder_is_refused(tmp_path):
    take(tmp_path, 2)
    with pytest.raises(ValueError, match="another run's: its seed is 0, this one's 1"):
        take(tmp_path, 4, seed=1)
    with pytest.raises(ValueError, match="minutes between two checkpoints must be positive, got 0"):
        take(tmp_path, 4, minutes=0)


def test_a_non_finite_step_is_skipped(tmp_path):
    state, step = init(jnp.ones(3)), jax.jit(guarded(update, state=1))
    key, good, bad = jax.random.key(0), jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0])
    kept, found = step(key, state, bad, 0.0)
    assert found.skipped and int(kept.step) == 1 and np.isnan(found.info.loss)
    np.testing.assert_array_equal(kept.params, state.params)
    moved, found = step(key, state, good, 0.0)
    assert not found.skipped
    np.testing.assert_array_equal(moved.params, update(key, state, good, 0.0)[0].params)


def test_skipped_steps_are_saved_and_stop_the_run(tmp_path):
    skipped = SkippedSteps(tmp_path / "skipped", max_consecutive=2)
    assert skipped.notes() == []
    wrong, right = (
        Guarded(Info(jnp.asarray(value)), jnp.asarray(skipped)) for value, skipped in ((jnp.nan, True), (1.0, False))
    )
    skipped.record(3, wrong, {"tokens": np.arange(4)})
    skipped.record(4, right, None)
    skipped.record(5, wrong, None)
    with pytest.raises(ValueError, match=r"2 steps in a row up to step 6 were not finite \(loss nan\)"):
        skipped.record(6, wrong, {"tokens": np.arange(2)})
    np.testing.assert_array_equal(next(iter(np.load(tmp_path / "skipped" / "step-3.npz").values())), np.arange(4))
    assert skipped.count == 3 and "3 steps were not finite" in skipped.notes()[0]
    with pytest.raises(ValueError, match="At least 1 step must fail"):
        SkippedSteps(tmp_path, max_consecutive=0)


def test_metrics_are_plain_lines(tmp_path, whole):
    lines = (tmp_path / "whole" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
