"""What a step of `jaxrlhf align` needs on machines that are not at hand, from their own compilers where those can be had.

    python -m benchmarks.plan --model llama-8b --topology v5p:2x4x4          # needs pip install '.[plan]'
    python -m benchmarks.plan --model llama-8b --topology h100:8

The update is the one that `align` runs, on arrays that are described and never made. For TPUs libtpu compiles it, which
needs no TPU: what it says of memory and communication is the compiler's own word. For GPUs, whose compiler needs one, it
is partitioned for as many simulated CPU devices: the communication is the partitioner's, and the memory is predicted.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any, Literal, NamedTuple

import tyro

from benchmarks.chips import CHIPS, Chip

SHAPES = {
    "llama-1b": {"width": 2048, "layers": 16, "query_heads": 32, "head_size": 64, "mlp_width": 8192, "tied": True},
    "llama-8b": {"width": 4096, "layers": 32, "query_heads": 32, "head_size": 128, "mlp_width": 14336, "tied": False},
    "llama-70b": {"width": 8192, "layers": 80, "query_heads": 64, "head_size": 128, "mlp_width": 28672, "tied": False},
}
"""Llama 3's, all with 8 key/value heads and 128,256 tokens."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to plan."""

    model: Literal["llama-1b", "llama-8b", "llama-70b"] = "llama-8b"
    topology: str = "v5e:2x4"
    """A TPU's, such as v5e:2x4, v5p:2x4x4, v6e:4x4; or h100:8, h200:16."""
    mesh: str = "fsdp=-1"
    batch_size: int | None = None
    """Prompts a step; one a device by default."""
    pairs: int = 4
    max_prompt: int = 512
    max_new_tokens: int = 512
    lora_rank: int = 16
    """0 trains all weights."""
    remat: Literal["layer", "products"] = "layer"
    microbatches: int = 1
    """Pieces that the responses of a step are read in."""
    layers: int | None = None
    """Fewer layers than the model has, to try it."""
    output: pathlib.Path | None = None
    """A file of JSON lines to add the row to."""


class Row(NamedTuple):
    """One plan; bytes and seconds are those of one device and one update.

    Attributes:
        model, topology, devices, mesh, lora_rank, microbatches: what was planned.
        tokens: in the responses and prompts of a step.
        arguments: bytes of state, reference and batch; temporaries: bytes beside them.
        fits: whether both fit the chip.
        flops: of the update's products, on all devices together.
        collectives: bytes by kind; None where the compiler cannot write its program down.
        seconds: the longest of computing at the published peak, of moving the collectives' bytes over all links, and of
            reading the arguments once: what no run can be faster than.
        compile_seconds: of this machine.
        how: "compiled" by the chip's own compiler, or "predicted".
    """

    model: str
    topology: str
    devices: int
    mesh: str
    lora_rank: int
    microbatches: int
    tokens: int
    arguments: float
    temporaries: float
    fits: bool
    flops: float
    collectives: dict[str, float] | None
    seconds: float
    compile_seconds: float
    how: str


def devices_of(config: Config) -> tuple[Any, Chip, str]:
    """Returns the devices to compile for, their chip, and whether the compiler is the chip's own.

    Raises:
        ValueError: the topology is unknown, or libtpu is not installed.
    """
    kind, _, rest = config.topology.partition(":")
    if kind not in CHIPS or not rest:
        known = ", ".join(CHIPS)
        raise ValueError(f"A topology is written as v5e:2x4 or h100:8, with one of {known}; not {config.topology!r}.")
    import jax

    if kind.startswith("h"):
        return jax.devices("cpu"), CHIPS[kind], "predicted"
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=config.topology)
    except Exception as error:  # a plug-in that is missing, or does not know the topology, has no error of its own
        raise ValueError(
            f"There is no compiler for {config.topology} here ({' '.join(str(error).split())[:150]}); "
            "pip install '.[plan]', or correct the topology."
        ) from None
    return found.devices, CHIPS[kind], "compiled"


def program_of(config: Config, mesh: Any) -> tuple[Any, tuple, tuple, Any]:
    """Returns the update, the shapes of its arguments, where they lie, and the shardings of its results."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxrlhf.bilevel import Labelled
    from jaxrlhf.commands.align import Align, assemble
    from jaxrlhf.commands.comparison import Judge
    from jaxrlhf.commands.models import Model
    from jaxrlhf.lm.problem import Prompts
    from jaxrlhf.lm.reward import reward_model
    from jaxrlhf.lm.transformer.axes import decoder_names
    from jaxrlhf.lm.transformer.config import DecoderConfig
    from jaxrlhf.lm.transformer.model import decoder
    from jaxrlhf.training.sharding import shardings
    from jaxrlhf.training.step import where_labelled, within

    shape = dict(SHAPES[config.model])
    tied = shape.pop("tied")
    context = config.max_prompt + config.max_new_tokens
    shape = DecoderConfig(
        vocabulary_size=128_256,
        key_value_heads=8,
        context_length=context,
        tied_embeddings=bool(tied),
        rope_base=500_000.0,
        **(shape | ({"layers": config.layers} if config.layers else {})),  # pyright: ignore[reportArgumentType]
    )
    weights = jnp.bfloat16 if config.lora_rank else jnp.float32
    key = jax.eval_shape(lambda: jax.random.key(0))

    def described(init):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, weights), jax.eval_shape(init, key))

    class Words:
        """No tokenizer: what ends a response and what fills a row."""

        stop_ids, pad_id = (0,), 0

    words: Any = Words()
    model = Model(shape, described(decoder(shape).init), words)
    start = model if config.lora_rank else model._replace(params=described(reward_model(decoder(shape)).init))
    settings = Align(
        policy=pathlib.Path(config.model),
        data="",
        batch_size=config.batch_size or math.prod(mesh.devices.shape),
        pairs=config.pairs,
        max_prompt=config.max_prompt,
        max_new_tokens=config.max_new_tokens,
        lora_rank=config.lora_rank,
        remat=config.remat,
        microbatches=config.microbatches,
    )
    parts = assemble(settings, model, start, Judge(None, None, ()))
    state = jax.eval_shape(parts.algorithm.init, key, parts.upper, parts.lower)
    rows = (settings.batch_size, config.max_prompt)
    prompts = Prompts(jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, bool))  # pyright: ignore
    sample = jax.eval_shape(parts.algorithm.propose, key, state, prompts, parts.frozen)
    labels: Any = jax.ShapeDtypeStruct((settings.batch_size, config.pairs, 1), jnp.float32)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state_where, frozen_where = (shardings(tree, mesh, decoder_names) for tree in (state, parts.frozen))
    arguments = key, state, Labelled(sample, labels), parts.frozen
    where: Any = (everywhere, state_where, where_labelled(mesh), frozen_where)
    return within(mesh, parts.algorithm.update), arguments, where, (state_where, everywhere)


def plan(config: Config) -> Row:
    """Compiles the update and reads what it needs.

    Raises:
        ValueError: as `devices_of` and `make_mesh`.
    """
    import jax

    from benchmarks.programs import collectives_of, flops_of
    from jaxrlhf.training.sharding import make_mesh, parse_mesh

    devices, chip, how = devices_of(config)
    mesh = make_mesh(parse_mesh(config.mesh), devices=devices)
    update, arguments, where, results = program_of(config, mesh)
    began = time.monotonic()
    lowered = jax.jit(update, in_shardings=where, out_shardings=results, donate_argnums=1).lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        told = re.search(r"(Ran out of memory|Used [\d.]+\w of)[^\n]*", str(error))
        reason = told.group(0) if told else " ".join(str(error).split())[:200]
        raise ValueError(f"The compiler gives up on {config.topology}: {reason}") from None
    seconds = time.monotonic() - began
    flops = flops_of(jax.make_jaxpr(update)(*arguments))
    memory: Any = compiled.memory_analysis()
    text = text_of(compiled)
    moved = None if text is None else collectives_of(text)
    given, beside = float(memory.argument_size_in_bytes), float(memory.temp_size_in_bytes)
    least = max(flops / len(devices) / chip.flops, sum((moved or {}).values()) / chip.link, given / chip.bandwidth)
    batch = arguments[2].sample.responses.tokens.shape
    return Row(
        model=config.model,
        topology=config.topology,
        devices=len(devices),
        mesh=config.mesh,
        lora_rank=config.lora_rank,
        microbatches=config.microbatches,
        tokens=math.prod(batch[:3]) * (config.max_prompt + config.max_new_tokens),
        arguments=given,
        temporaries=beside,
        fits=given + beside <= chip.memory,
        flops=flops,
        collectives=moved,
        seconds=least,
        compile_seconds=seconds,
        how=how,
    )


def text_of(compiled: Any) -> str | None:
    """Returns the compiled program's text; None where the compiler cannot write it (libtpu's, for some of v6e)."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def main(config: Config) -> Row:
    """Prints a plan, and adds it to a file where one is given."""
    kind, _, count = config.topology.partition(":")
    if kind.startswith("h") and count.isdigit():
        # Before JAX looks for its devices.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # It compiles and holds no TPU: several may do that at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        row = plan(config)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    gigabytes = [f"{name} {size / 1e9:.2f} GB" for name, size in (row.collectives or {}).items()]
    for name, value in {
        "model": f"{row.model}, {row.tokens:,} tokens a step",
        "devices": f"{row.devices} ({row.topology}), mesh {row.mesh}",
        "state, reference and batch": f"{row.arguments / 1e9:.2f} GB a device",
        "beside them": f"{row.temporaries / 1e9:.2f} GB a device: {'fits' if row.fits else 'does not fit'}",
        "collectives": "not told" if row.collectives is None else ", ".join(gigabytes) or "none",
        "products": f"{row.flops / 1e12:,.1f} TFLOP",
        "least time": f"{row.seconds:.3f} s at published peaks",
        "compiled in": f"{row.compile_seconds:.0f} s; {row.how}",
    }.items():
        print(f"{name:28s}{value}")
    if config.output is not None:
        with config.output.open("a") as stream:
            stream.write(json.dumps(row._asdict()) + "\n")
    return row


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
