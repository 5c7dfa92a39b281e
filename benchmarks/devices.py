"""The CPU cores and devices that benchmarks run on."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.training.step import batch_sharding, data_mesh, put_on_devices, replicate, within


def use_all_cores(*, device_per_core: bool = False) -> None:
    """Gives torch, where it is installed, one thread per core, and JAX, if asked to, one device per core.

    A single device has the threads of all cores. `JAX_NUM_CPU_DEVICES=1` in the environment keeps JAX at one.
    """
    cores = len(os.sched_getaffinity(0))
    if device_per_core and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", cores)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(cores)


def batch_mesh(rows: int) -> Mesh:
    """Returns a mesh of the most devices that divide this many rows, as `jaxrlhf` itself splits a batch."""
    return data_mesh(jax.devices()[: math.gcd(rows, jax.device_count())])


def data_parallel(function: Callable[..., Any], params: Any, *rows: Any) -> Callable[[], Any]:
    """Returns the call of a compiled `(params, *arrays [N, ...]) -> arrays [N, ...]`, rows split over `batch_mesh`."""
    mesh = batch_mesh(len(rows[0]))
    split, params = batch_sharding(mesh), replicate(params, mesh)
    compiled, rows = jax.jit(within(mesh, function), out_shardings=split), put_on_devices(rows, split)
    return lambda: jax.block_until_ready(compiled(params, *rows))
