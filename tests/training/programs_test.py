"""What is read from programs: products in jaxprs, communication in compiled text."""

import importlib
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.training.sharding import make_mesh

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
programs = importlib.import_module("benchmarks.programs")
plan = importlib.import_module("benchmarks.plan")
gpu_steps = importlib.import_module("benchmarks.gpu.steps")
sys.path.pop(0)

ONE = jnp.ones((4, 8)), jnp.ones((8, 8))
PRODUCT = 2 * 4 * 8 * 8


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]


CASES = {
    "one": (lambda x, w: x @ w, 1),
    "jitted": (jax.jit(lambda x, w: x @ w), 1),
    "a scan counts as often as it runs": (scanned, 5),
    "a scan of scans": (lambda x, w: jax.lax.scan(lambda x, _: (scanned(x, w), None), x, None, length=3)[0], 15),
    "a gradient has two more": (jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), argnums=(0, 1)), 3),
    "what is computed again counts": (
        jax.grad(lambda x, w: jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x))),
        6,
    ),
    "a loop whose turns nobody knows": (
        lambda x, w: jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x @ w, x),
        7,
    ),
    "and one inside of another": (
        lambda x, w: jax.lax.while_loop(
            lambda x: jnp.sum(x) < 1, lambda x: jax.lax.fori_loop(0, jnp.int32(jnp.sum(x)), lambda _, x: x @ w, x), x
        ),
        7,
    ),
    "the larger branch": (lambda x, w: jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w @ w, lambda: x @ w), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_products_are_counted(case):
    function, products = CASES[case]
    assert programs.flops_of(jax.make_jaxpr(function)(*ONE), trip_count=7) == products * PRODUCT


TEXT = """HloModule step, entry_computation_layout={()->f32[]}

%body (parameter: (s32[], f32[16])) -> (s32[], f32[16]) {
  %parameter = (s32[], f32[16]{0}) parameter(0)
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%slice), dimensions={0}
  ROOT %tuple = (s32[], f32[16]{0}) tuple(%next, %moved)
}

%fused (parameter.1: f32[8]) -> f32[8] {
  ROOT %all-reduce-start.3 = (f32[2]{0}, f32[8]{0}) all-reduce-start(%parameter.1), to_apply=%add
}

ENTRY %main (argument: f32[8]) -> f32[] {
  %while.1 = (s32[], f32[16]{0}) while(%start), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"32"}}
  %call.2 = f32[8]{0} fusion(%argument), kind=kCustom, calls=%fused
  ROOT %reduce-scatter.9 = f32[4]{0} reduce-scatter(%call.2), dimensions={0}
}
"""


def test_collectives_are_counted_as_often_as_their_loop_runs():
    found = programs.collectives_of(TEXT)
    assert found == {"all-gather": 32 * 16 * 64 * 2, "all-reduce": 8 * 4, "reduce-scatter": 4 * 4}
    assert programs.largest_collective(TEXT) == 16 * 64 * 2
    assert programs.collectives_of("") == {}


def test_a_loop_that_counts_to_a_constant_runs_as_often():
    condition = """%cond (state: (s32[], f32[16])) -> pred[] {
  %index = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit.2 = s32[]{:T(128)} constant(12)
  ROOT %lt.1 = pred[]{:T(512)} compare(%index, %limit.2), direction=LT, metadata={op_name="while/cond/lt"}
}

"""
    text = TEXT.replace(', backend_config={"known_trip_count":{"n":"32"}}', "").replace(
        "%fused (", condition + "%fused (", 1
    )
    assert programs.collectives_of(text)["all-gather"] == 12 * 16 * 64 * 2
    unknown = text.replace("direction=LT", "direction=NE")
    assert programs.collectives_of(unknown, trip_count=3)["all-gather"] == 3 * 16 * 64 * 2


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "h100:", "8"])
def test_a_topology_that_nobody_knows_is_named(topology):
    with pytest.raises(ValueError, match="A topology is written as v5e:2x4 or h100:8"):
        plan.devices_of(plan.Config(topology=topology))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_plan_is_made_of_the_update_that_align_runs(rank):
    """On abstract arrays: nothing is allocated or compiled."""
    config = plan.Config(
        model="llama-1b", layers=2, topology="h100:1", max_prompt=8, max_new_tokens=8, lora_rank=rank, batch_size=1
    )
    update = plan.make_update(config, make_mesh({"data": 1}, devices=jax.devices()[:1]))
    state, info = jax.eval_shape(update.function, *update.arguments)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, update.arguments[1])
    assert info.kl_slope.shape == ()


@pytest.mark.slow
def test_an_update_is_planned_for_a_tpu_that_is_not_here():
    pytest.importorskip("libtpu", reason="pip install '.[plan]'")
    row = plan.plan(plan.Config(model="llama-1b", layers=2, topology="v5e:2x4", max_prompt=64, max_new_tokens=64))
    assert row.method == "compiled" and row.fits and row.flops > 1e12 and row.collectives["all-gather"] > 0


@pytest.mark.slow
def test_the_flops_that_the_benchmark_counts_are_those_of_the_programs():
    listed = re.findall(r": ([\d.]+)", gpu_steps.check_flops())
    assert len(listed) == 6
    np.testing.assert_allclose([float(ratio) for ratio in listed], 1.0, atol=2e-3)
