"""Plans a step of `jaxrlhf align` for machines that are not at hand, with their own compilers where available.

    python -m benchmarks.plan --model llama-8b --topology v5p:2x4x4          # needs pip install '.[plan]'
    python -m benchmarks.plan --model llama-8b --topology h100:8

The planned program is the update that `align` runs, on abstract arrays that are never allocated. For TPUs libtpu compiles
it, which needs no TPU: memory and communication are the compiler's own figures. The GPU compiler needs a GPU, so for GPUs
the update is partitioned over as many simulated CPU devices: communication is the partitioner's, memory an estimate.
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
    """Of TPUs, such as v5e:2x4, v5p:2x4x4, v6e:4x4; of GPUs, h100:8, h200:16."""
    mesh: str = "fsdp=-1"
    batch_size: int | None = None
    """Prompts per step; one per device by default."""
    pairs: int = 4
    max_prompt: int = 512
    max_new_tokens: int = 512
    lora_rank: int = 16
    """Rank of the adapters; 0 trains all weights."""
    remat: Literal["layer", "products"] = "layer"
    microbatches: int = 1
    """Microbatches that the responses of a step are split into."""
    layers: int | None = None
    """Override of the number of layers, for a quick trial."""
    output: pathlib.Path | None = None
    """A JSON Lines file to append the plan to."""


class Row(NamedTuple):
    """One plan; bytes and seconds are per device and update.

    Attributes:
        model, topology, devices, mesh, lora_rank, microbatches: what was planned.
        tokens: in the prompts and responses of a step.
        arguments: bytes of state, reference and batch.
        temporaries: bytes beyond the arguments.
        fits: whether both fit into the chip's memory.
        flops: of the update's matrix products, all devices together.
        collectives: bytes by kind; None where the compiler cannot print its program.
        seconds: a lower bound: the longest of computing at peak FLOP/s, moving the collectives' bytes over all links, and
            reading the arguments once.
        compile_seconds: on this machine.
        method: "compiled" by the chip's own compiler, or "predicted".
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
    method: str


def devices_of(config: Config) -> tuple[Any, Chip, str]:
    """Returns the devices to compile for, their chip, and the method, "compiled" or "predicted".

    Raises:
        ValueError: the topology is unknown, or libtpu is not installed.
    """
    kind, _, size = config.topology.partition(":")
    if kind not in CHIPS or not size:
        known = ", ".join(CHIPS)
        raise ValueError(f"A topology is written as v5e:2x4 or h100:8, with one of {known}; not {config.topology!r}.")
    import jax

    if kind.startswith("h"):
        return jax.devices("cpu"), CHIPS[kind], "predicted"
    from jax.experimental import topologies

    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=config.topology)
    except Exception as error:  # a missing plug-in and an unknown topology have no exception type of their own
        raise ValueError(
            f"There is no compiler for {config.topology} here ({' '.join(str(error).split())[:150]}); "
            "pip install '.[plan]', or correct the topology."
        ) from None
    return description.devices, CHIPS[kind], "compiled"


class Update(NamedTuple):
    """The update to compile.

    Attributes:
        function: `(key, state, labelled, frozen) -> (state, info)`.
        arguments: abstract ones.
        in_shardings: of the arguments.
        out_shardings: of the results.
    """

    function: Any
    arguments: tuple
    in_shardings: Any
    out_shardings: Any


def decoder_config(name: str, context_length: int, layers: int | None = None) -> Any:
    """Returns the configuration of one of the `SHAPES`, with another number of layers if one is given."""
    from jaxrlhf.lm.transformer.config import DecoderConfig

    shape: dict[str, Any] = dict(SHAPES[name])
    tied = shape.pop("tied")
    shape |= {"layers": layers} if layers else {}
    return DecoderConfig(
        vocabulary_size=128_256,
        key_value_heads=8,
        context_length=context_length,
        tied_embeddings=tied,
        rope_base=500_000.0,
        **shape,
    )


def abstract_models(config: Config) -> tuple[Any, Any]:
    """Returns the policy and the start of the reward model as abstract arrays, in the dtypes that `align` loads."""
    import jax
    import jax.numpy as jnp

    from jaxrlhf.commands.models import Model
    from jaxrlhf.lm.reward import reward_model
    from jaxrlhf.lm.transformer.model import decoder

    class Bundle:
        """In place of a tokenizer: only what ends a response and fills a row."""

        stop_ids, pad_id = (0,), 0

    def abstract(init):
        shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)

    dtype = jnp.bfloat16 if config.lora_rank else jnp.float32
    shape = decoder_config(config.model, config.max_prompt + config.max_new_tokens, config.layers)
    bundle: Any = Bundle()
    policy = Model(shape, abstract(decoder(shape).init), bundle)
    if config.lora_rank:
        return policy, policy
    return policy, policy._replace(params=abstract(reward_model(decoder(shape)).init))


def make_update(config: Config, mesh: Any) -> Update:
    """Returns the update of `jaxrlhf align` with abstract arguments and their shardings."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxrlhf.bilevel import Labelled
    from jaxrlhf.commands.align_config import Align
    from jaxrlhf.commands.align_setup import build_setup
    from jaxrlhf.commands.annotators import ComparisonAnnotator
    from jaxrlhf.lm.pairing import Prompts
    from jaxrlhf.lm.transformer.axes import decoder_names
    from jaxrlhf.training.sharding import shardings
    from jaxrlhf.training.step import labelled_shardings, within

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
    setup = build_setup(settings, *abstract_models(config), ComparisonAnnotator(None, None, ()))
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(setup.algorithm.init, key, setup.upper, setup.lower)
    rows = (settings.batch_size, config.max_prompt)
    prompts = Prompts(jax.ShapeDtypeStruct(rows, jnp.int32), jax.ShapeDtypeStruct(rows, bool))  # pyright: ignore
    sample = jax.eval_shape(setup.algorithm.propose, key, state, prompts, setup.frozen)
    labels: Any = jax.ShapeDtypeStruct((settings.batch_size, config.pairs, 1), jnp.float32)
    replicated = NamedSharding(mesh, PartitionSpec())
    of_state, of_frozen = (shardings(tree, mesh, decoder_names) for tree in (state, setup.frozen))
    return Update(
        function=within(mesh, setup.algorithm.update),
        arguments=(key, state, Labelled(sample, labels), setup.frozen),
        in_shardings=(replicated, of_state, labelled_shardings(mesh), of_frozen),
        out_shardings=(of_state, replicated),
    )


def compile_update(update: Update, topology: str) -> Any:
    """Compiles the update with its state donated.

    Raises:
        ValueError: the compiler fails, such as out of memory.
    """
    import jax

    jitted = jax.jit(
        update.function, in_shardings=update.in_shardings, out_shardings=update.out_shardings, donate_argnums=1
    )
    lowered = jitted.lower(*update.arguments)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = re.search(r"(Ran out of memory|Used [\d.]+\w of)[^\n]*", str(error))
        reason = memory.group(0) if memory else " ".join(str(error).split())[:200]
        raise ValueError(f"The compiler gives up on {topology}: {reason}") from None


def plan(config: Config) -> Row:
    """Compiles the update and reads its costs.

    Raises:
        ValueError: as `devices_of`, `make_mesh` and `compile_update`.
    """
    import jax

    from benchmarks.programs import collectives_of, flops_of
    from jaxrlhf.training.sharding import make_mesh, parse_mesh

    devices, chip, method = devices_of(config)
    update = make_update(config, make_mesh(parse_mesh(config.mesh), devices=devices))
    start = time.monotonic()
    compiled = compile_update(update, config.topology)
    compile_seconds = time.monotonic() - start
    flops = flops_of(jax.make_jaxpr(update.function)(*update.arguments))
    memory: Any = compiled.memory_analysis()
    text = text_of(compiled)
    collectives = None if text is None else collectives_of(text)
    arguments, temporaries = float(memory.argument_size_in_bytes), float(memory.temp_size_in_bytes)
    communication = sum((collectives or {}).values()) / chip.link
    responses = update.arguments[2].sample.responses.tokens.shape[:3]
    return Row(
        model=config.model,
        topology=config.topology,
        devices=len(devices),
        mesh=config.mesh,
        lora_rank=config.lora_rank,
        microbatches=config.microbatches,
        tokens=math.prod(responses) * (config.max_prompt + config.max_new_tokens),
        arguments=arguments,
        temporaries=temporaries,
        fits=arguments + temporaries <= chip.memory,
        flops=flops,
        collectives=collectives,
        seconds=max(flops / len(devices) / chip.flops, communication, arguments / chip.bandwidth),
        compile_seconds=compile_seconds,
        method=method,
    )


def text_of(compiled: Any) -> str | None:
    """Returns the compiled program's text; None where the compiler cannot print it (libtpu, for some programs on v6e)."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def main(config: Config) -> Row:
    """Prints a plan, and appends it to a file if one is given."""
    kind, _, count = config.topology.partition(":")
    if kind.startswith("h") and count.isdigit():
        # JAX reads this when it first looks for devices.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling holds no TPU, so several processes may do it at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        row = plan(config)
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    gigabytes = [f"{name} {size / 1e9:.2f} GB" for name, size in (row.collectives or {}).items()]
    for name, value in {
        "model": f"{row.model}, {row.tokens:,} tokens per step",
        "devices": f"{row.devices} ({row.topology}), mesh {row.mesh}",
        "state, reference and batch": f"{row.arguments / 1e9:.2f} GB per device",
        "temporaries": f"{row.temporaries / 1e9:.2f} GB per device: {'fits' if row.fits else 'does not fit'}",
        "collectives": "unknown" if row.collectives is None else ", ".join(gigabytes) or "none",
        "matrix products": f"{row.flops / 1e12:,.1f} TFLOP",
        "lower bound on time": f"{row.seconds:.3f} s at published peaks",
        "compile time": f"{row.compile_seconds:.0f} s; {row.method}",
    }.items():
        print(f"{name:28s}{value}")
    if config.output is not None:
        with config.output.open("a") as stream:
            stream.write(json.dumps(row._asdict()) + "\n")
    return row


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
