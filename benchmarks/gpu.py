"""How well one graphics card is used: training in shares of its peak arithmetic, decoding in shares of its bandwidth.

    python -m benchmarks.gpu                            # one H100 or H200, 8 minutes
    python -m benchmarks.gpu --who ours --what decode
    python -m benchmarks.gpu --tiny                     # the same code on any machine

Llamas with random weights, products in bfloat16. Where all weights are trained they are float32; with adapters of rank 16
they are bfloat16 and the adapters float32, as `jaxrlhf align --lora-rank 16` has them. FLOPs are counted from the shape:
what is computed again to save memory does not count, and of causal attention half the square does. Peaks are published.

Each side has a process and the whole card, ours first; one that takes longer than its share of the time is ended, and
what it had not measured is said. What is checked first: the count against the programs, the first losses of all sides from
the same weights, and our sampler's log-probabilities. With JAX_COMPILATION_CACHE_DIR set a second run compiles little.
"""

import dataclasses
import functools
import gc
import multiprocessing
import os
import pathlib
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import peers, trainers
from benchmarks.chips import chip_of
from benchmarks.generation import of_tunix
from benchmarks.learning import adamw
from benchmarks.plan import SHAPES
from benchmarks.programs import flops_of
from benchmarks.scaling import texts
from benchmarks.sides import EXTRA, Side, Timed, agree, alternate, machine, report, stepping, warm_up
from jaxrlhf import bilevel, objectives
from jaxrlhf.base.types import Params
from jaxrlhf.bilevel import Labelled
from jaxrlhf.commands.models import Model
from jaxrlhf.data.batches import Demonstrations, Pairs
from jaxrlhf.lm import lora
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.weights import load_decoder, save_decoder
from jaxrlhf.lm.learning import learning, preference_loss, supervised_loss
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.problem import LanguageFrozen, language_problem
from jaxrlhf.lm.reward import reward_model
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import pieces
from jaxrlhf.lm.transformer.model import LanguageModel, decoder
from jaxrlhf.lm.transformer.trunk import UNROLLED, keeps_scores
from jaxrlhf.training.report import Table

Who = Literal["ours", "transformers", "Tunix"]
What = Literal["supervised", "reward", "bilevel", "decode"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    seconds: float = 480.0
    """For everything."""
    models: tuple[Literal["llama-1b", "llama-8b"], ...] = ("llama-1b", "llama-8b")
    who: tuple[Who, ...] = ("ours", "transformers", "Tunix")
    what: tuple[What, ...] = ("supervised", "reward", "bilevel", "decode")
    rows: int = 64
    """Decoded at once."""
    rounds: int = 5
    tiny: bool = False
    """Models and batches of next to nothing."""
    output: pathlib.Path = pathlib.Path("runs")


class Row(NamedTuple):
    """A line of a table: the model, the rank of its adapters (0: all weights are trained), what is done, and in what."""

    model: str
    rank: int
    what: str
    dtype: Any = jnp.bfloat16


ROWS = (
    Row("llama-1b", 0, "supervised"),
    Row("llama-1b", 0, "reward"),
    Row("llama-1b", 16, "bilevel"),
    Row("llama-1b", 0, "decode"),
    Row("llama-8b", 16, "supervised"),
    Row("llama-8b", 16, "bilevel"),
    Row("llama-8b", 0, "decode"),
    Row("llama-8b", 16, "reward"),
    Row("llama-8b", 16, "bilevel", jnp.float32),  # what `align` computes in
    Row("llama-1b", 0, "bilevel"),  # with gradients at least 14 copies of the weights, 69 GB
)
"""The most telling first. Peers are measured where they need no more packages: without adapters."""
GOALS = {"supervised": 55, "reward": 55, "bilevel": 45, "decode": 60}
"""Percent of the peak."""
SHARES = {"ours": 0.65, "transformers": 0.5, "Tunix": 1.0}
"""Of the time that is left when a side begins; the last one has all of it."""
REMAT = {"supervised": ("products", "layer"), "reward": ("products", "layer"), "bilevel": ("layer",)}
"""What is tried in turn until it fits."""
ROUNDING = 0.05
"""Nats that losses, and in the mean the log-probabilities of tokens, may differ by in bfloat16; they are about 6."""
CHECKED_RATE = 1e-2
"""Of the first steps that are compared: losses must fall by much more than rounding."""
PIECE = 4
"""Texts that torch, which keeps all activations, computes at once; their gradients add up."""


class Sizes(NamedTuple):
    """Of batches: texts and their length; prompts, pairs a prompt; rows decoded; tokens of a prompt and of an answer."""

    texts: int
    length: int
    prompts: int
    pairs: int
    rows: int
    prompt: int
    new: int

    @property
    def decoded(self) -> str:
        """A decoded batch in words."""
        return f"{self.rows} rows, {self.prompt} + {self.new} tokens"


TINY = Sizes(texts=4, length=32, prompts=2, pairs=2, rows=4, prompt=8, new=16)


class Case(NamedTuple):
    """A row with the model's shape and the batch's sizes, and how many times it is timed."""

    row: Row
    shape: DecoderConfig
    sizes: Sizes
    rounds: int

    @property
    def batch(self) -> tuple[str, int]:
        """A training batch in words and in tokens; of a bilevel one both answers count, with their prompts."""
        sizes = self.sizes
        if self.row.what != "bilevel":
            return f"{sizes.texts} x {sizes.length} tokens", sizes.texts * sizes.length
        said = f"{sizes.prompts} prompts x {sizes.pairs} pairs, {sizes.prompt} + {sizes.new} tokens"
        return said, 2 * sizes.prompts * sizes.pairs * (sizes.prompt + sizes.new)


def case_of(config: Config, row: Row) -> Case:
    """Returns what a row is measured on."""
    if config.tiny:
        return Case(row, tiny_shape(row.model), TINY, config.rounds)
    whole = {"vocabulary_size": 128_256, "key_value_heads": 8, "context_length": 2048, "rope_base": 500_000.0}
    own: dict[str, Any] = dict(SHAPES[row.model])
    shape = DecoderConfig(tied_embeddings=own.pop("tied"), **own, **whole)
    # Adapters' products are kept in float32: fewer texts fit.
    return Case(row, shape, Sizes(4 if row.rank else 16, 1024, 4, 4, config.rows, 128, 256), config.rounds)


def prompts_of(case: Case) -> np.ndarray:
    """Returns what is decoded from, `[N, P]`; all begin alike, as Tunix gives a beginning to rows that have another."""
    prompts = texts(case.shape, case.sizes.rows, case.sizes.prompt)
    prompts[:, 0] = 1
    return prompts


def tiny_shape(name: str, layers: int = 2) -> DecoderConfig:
    """Returns a shape of width 64, its embeddings tied where the model's are."""
    tied = bool(SHAPES[name]["tied"])
    return DecoderConfig(512, 64, layers, 4, 2, 16, 128, tied_embeddings=tied, context_length=64, rope_base=500_000.0)


class Pass(NamedTuple):
    """FLOPs of reading rows once: forward, backward, and of the forward ones those of attention."""

    forward: float
    backward: float
    attention: float


def one_pass(
    shape: DecoderConfig, rows: int, length: int, *, logits: int = 0, rank: int = 0, square: float = 0.5
) -> Pass:
    """Counts the products of a gated decoder.

    Forward: 2 a weight of the layers and token; 2 a weight of the head and column of logits; and in attention 4 a query,
    key and feature of a head, for scores and averages. Backward: twice that, for inputs and for weights; frozen weights,
    under adapters, have the former alone. Adapters are trained: 2 a weight and token forward, 4 backward.

    Args:
        shape: the decoder's.
        rows: N.
        length: T, tokens a row.
        logits: columns that have them; 0 for a reward model.
        rank: of adapters; 0 trains all weights.
        square: the part of the T x T scores that counts; half is causal.
    """
    attended = shape.query_heads * shape.head_size
    joined = attended + 2 * shape.key_value_heads * shape.head_size
    width, inner = shape.width, shape.mlp_width
    products = ((width, joined), (attended, width), (width, 2 * inner), (inner, width))
    tokens = rows * length * shape.layers
    weights = 2.0 * tokens * sum(given * made for given, made in products)
    adapters = 2.0 * tokens * rank * sum(given + made for given, made in products)
    head = 2.0 * rows * logits * width * shape.vocabulary_size
    attention = 4.0 * tokens * length * attended * square
    backward = (1 if rank else 2) * (weights + head) + 2 * (adapters + attention)
    return Pass(weights + adapters + head + attention, backward, attention)


def model_flops(case: Case, *, written: bool = False) -> float:
    """Returns the FLOPs of a training step.

    Supervised and reward steps read their texts forward and backward once. A bilevel update with `central`, `tangent` and
    one shared sample needs, of the policy on its own B M answers (the reference's do not depend on it):

    - forward and backward at tilt 0, for the gradient of -J;
    - forward and backward at +sigma and -sigma, for the gradient of the tangent's proximal loss;
    - forward at the three new iterates, for the density ratios that weigh the hypergradient;

    6 forward and 3 backward; and of the reward model on all 2 B M answers, one forward and one backward.

    Args:
        case: what is trained, and on what.
        written: counts attention as the programs have it: in pieces that hold some of what no query sees, and once more
            for a backward pass where scores are not kept.
    """
    row, sizes = case.row, case.sizes

    def reading(rows, length, logits, forward, backward):
        square, again = 0.5, 0
        if written:
            square = sum((end - begin) * end for begin, end in pieces(length)) / length**2
            again = 0 if keeps_scores(case.shape, rows, length) else 1
        once = one_pass(case.shape, rows, length, logits=logits, rank=row.rank, square=square)
        return forward * once.forward + backward * (once.backward + again * once.attention)

    if row.what != "bilevel":
        logits = sizes.length - 1 if row.what == "supervised" else 0
        return reading(sizes.texts, sizes.length, logits, 1, 1)
    answers, length = sizes.prompts * sizes.pairs, sizes.prompt + sizes.new
    # An answer's last token predicts nothing, and is read by the reward alone.
    return reading(answers, length - 1, sizes.new, 6, 3) + reading(2 * answers, length, 0, 1, 1)


def decode_bytes(shape: DecoderConfig, sizes: Sizes) -> float:
    """Returns the bytes that a token step must read, in bfloat16, in the mean over an answer.

    Every weight once, less an embedding that is not the head too, as few of its rows are read; and of every row the keys
    and values of the prompt and of half the answer.
    """
    weights = one_pass(shape, 1, 1, logits=1, square=0.0).forward / 2
    seen = sizes.rows * (sizes.prompt + sizes.new / 2)
    return 2 * (weights + 2 * shape.layers * shape.key_value_heads * shape.head_size * seen)


class Step(NamedTuple):
    """`update(state, batch, frozen) -> (state, info)` and its first arguments."""

    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    frozen: Any


def random_weights(shape: DecoderConfig, dtype: Any) -> Params:
    """Returns parameters that are made in their dtype: no float32 copy of 8 billion is ever held."""
    key, scale = jax.random.key(0), shape.width**-0.5

    @functools.partial(jax.jit, static_argnums=1)
    def draw(number, size):
        return scale * jax.random.normal(jax.random.fold_in(key, number), size, dtype)

    leaves, structure = jax.tree_util.tree_flatten_with_path(jax.eval_shape(decoder(shape).init, key))
    return jax.tree.unflatten(
        structure,
        [
            jnp.ones(leaf.shape, dtype) if path[-1].key == "scale" else draw(number, leaf.shape)
            for number, (path, leaf) in enumerate(leaves)
        ],
    )


def supervised(policy: LanguageModel, base: Params, rank: int, tokens: np.ndarray, rate: float = 1e-5) -> Step:
    """The step of supervised fine-tuning on all tokens but the first."""
    params_of = lora.policy_on_reference if rank else (lambda lower, frozen: lower)
    algorithm = learning(supervised_loss(policy, params_of=params_of), adamw(rate))
    learned = np.ones(tokens.shape, bool)
    learned[:, 0] = False
    batch = jax.device_put(Demonstrations(tokens, np.ones(tokens.shape, np.int32), learned))
    lower = lora.init_adapter(jax.random.key(1), base, rank=rank) if rank else base
    return Step(algorithm.update, algorithm.init(lower), batch, LanguageFrozen(base if rank else ()))


def upper_of(base: Params, rank: int) -> Params:
    """Returns a reward's trained parameters. Its head is drawn: a zero one has no gradient for the policy."""
    width = base["embedding"].shape[1]
    head = 0.1 * jax.random.normal(jax.random.key(2), (width,))
    if rank:
        return {"adapter": lora.init_adapter(jax.random.key(3), base, rank=rank), "head": head}
    return {"trunk": {name: part for name, part in base.items() if name not in lora.UNREAD}, "head": head}


def rewarded(policy: LanguageModel, base: Params, rank: int, tokens: np.ndarray) -> Step:
    """The step of a reward model on half as many pairs as there are texts."""
    params_of = lora.reward_on_reference if rank else (lambda upper, frozen: upper)
    algorithm = learning(preference_loss(reward_model(policy), params_of=params_of), adamw(1e-5))
    pairs = tokens.reshape(-1, 2, tokens.shape[1])
    mask, one = np.ones(pairs.shape, bool), np.ones(len(pairs), np.float32)
    batch = jax.device_put(Pairs(pairs, mask, mask, one, 0 * one, one))
    return Step(algorithm.update, algorithm.init(upper_of(base, rank)), batch, LanguageFrozen(base if rank else ()))


def coupled(policy: LanguageModel, base: Params, rank: int, prompts: np.ndarray, sizes: Sizes) -> Step:
    """The bilevel update alone, on a sample that the policy drew, with drawn labels."""
    adapters = {"policy_params": lora.policy_on_reference, "reward_params": lora.reward_on_reference} if rank else {}
    problem = language_problem(
        policy,
        reward_model(policy),
        objectives.add(objectives.likelihood(coupled=False), objectives.utility(kl_price=0.05)),
        pairs=sizes.pairs,
        max_new_tokens=sizes.new,
        stop_ids=(),
        **adapters,
    )
    rule, solver = bilevel.central(relative_sigma=0.2), bilevel.tangent(optax.adam(1e-5), optax.adam(1e-6))
    algorithm = bilevel.bilevel_descent(problem, rule, solver, optax.adam(1e-4), beta=0.2, sequential=True)
    key, *keys = jax.random.split(jax.random.key(4), 4)
    lower = lora.init_adapter(keys[0], base, rank=rank) if rank else base
    sample = jax.jit(problem.sample)(keys[1], lower, peers.without_padding(prompts), LanguageFrozen(base))
    labels = jax.random.bernoulli(keys[2], shape=(*sample.measure.shape, 1)).astype(jnp.float32)

    def update(state, labelled, frozen):
        return algorithm.update(key, state, labelled, frozen)

    state = algorithm.init(key, upper_of(base, rank), lower)
    return Step(update, state, Labelled(sample, labels), LanguageFrozen(base if rank else ()))


def step_of(case: Case, *, remat: str | None) -> Step:
    """Returns a step. Weights that it was made from are not kept, but in its state or as the frozen ones."""
    row, shape, sizes = case.row, case.shape, case.sizes
    base = random_weights(shape, jnp.bfloat16 if row.rank else jnp.float32)
    given = decoder(shape, dtype=row.dtype, remat=remat), base, row.rank
    if row.what == "bilevel":
        return coupled(*given, texts(shape, sizes.prompts, sizes.prompt), sizes)
    return (supervised if row.what == "supervised" else rewarded)(*given, texts(shape, sizes.texts, sizes.length))


def calling(step: Step) -> Callable[[], Any]:
    """Returns the call of a compiled step, which gives its info."""
    update = jax.jit(step.update, donate_argnums=0)
    return stepping(lambda state: update(state, step.batch, step.frozen), step.state)


def count_check() -> str:
    """Returns how close the count comes to the products of the programs, without remat, of tiny models.

    Raises:
        ValueError: not within 1 %.
    """
    shares = {}
    for model, rank in (("llama-1b", 0), ("llama-8b", 4)):
        for what in REMAT:
            # So many layers make a loop. Of written out ones the first has no gradient of its input, under adapters.
            case = Case(Row(model, rank, what), tiny_shape(model, UNROLLED + 1), TINY, 1)
            update, *arguments = step_of(case, remat=None)
            program = flops_of(jax.make_jaxpr(update)(*arguments))
            shares[f"{what}, {f'rank {rank}' if rank else 'all weights'}"] = model_flops(case, written=True) / program
    agree("FLOPs of programs", list(shares.values()), np.ones(len(shares)), tolerance=0.01)
    told = "; ".join(f"{name}: {share:.4f}" for name, share in shares.items())
    return f"FLOPs counted, with attention as it is written, as a share of the tiny programs' own (within 1 %): {told}"


class Figure(NamedTuple):
    """What was measured.

    Attributes:
        took: seconds of one step, of every round; and of the first calls.
        work: FLOPs or bytes of one step.
        tokens: of one step.
        how: what one should know of it.
        agreed: what was seen to be equal before.
    """

    took: Timed
    work: float
    tokens: int
    how: str
    agreed: str = ""


def trained(case: Case, call: Callable[[], Any], how: str) -> Figure:
    """Times a training step."""
    (took,) = alternate([Side(case.row.what, call)], rounds=case.rounds)
    said, tokens = case.batch
    return Figure(took, model_flops(case), tokens, f"{said}; {how}")


def decoded(case: Case, make: Callable[[int], Callable[[], Any]], *, rounds: int) -> Figure:
    """Times a token step: an answer less one of a single token, over the tokens between, so that prompts do not count.

    Args:
        case: what is decoded.
        make: `(new tokens) -> ` a call that writes them.
        rounds: of both.
    """
    sizes = case.sizes
    sides = [Side(str(new), make(new)) for new in (1, sizes.new)]
    one, whole = alternate(sides, rounds=rounds, warmed=warm_up(sides, calls=1))
    seconds = tuple((long - short) / (sizes.new - 1) for short, long in zip(one.seconds, whole.seconds, strict=True))
    took = Timed("decode", one.first + whole.first, seconds)
    return Figure(took, decode_bytes(case.shape, sizes), sizes.rows, sizes.decoded)


def train_ours(case: Case) -> Figure:
    """Times our step, with as little computed again as fits."""
    *more, last = REMAT[case.row.what]
    for remat in more:
        try:
            return trained(case, calling(step_of(case, remat=remat)), f"remat {remat}")
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        release()
    return trained(case, calling(step_of(case, remat=last)), f"remat {last}")


def decode_ours(case: Case) -> Figure:
    """Times our sampler; its log-probabilities are first compared with those without a cache."""
    shape, sizes, dtype = case.shape, case.sizes, case.row.dtype
    policy, params = decoder(shape, dtype=dtype), random_weights(shape, dtype)
    prompts = peers.without_padding(prompts_of(case))
    write = jax.jit(functools.partial(generate, policy, stop_ids=()), static_argnames="max_new_tokens")

    def make(new):
        return lambda: jax.block_until_ready(write(params, jax.random.key(1), *prompts, max_new_tokens=new))

    *rows, told = jax.tree.map(lambda leaf: leaf[:4], (*prompts, *make(sizes.new)()))
    again = jax.jit(functools.partial(completion_log_probs, policy))(params, *rows)
    distance = float(jnp.mean(jnp.abs(again - told)))
    agreed = agree("log-probabilities, in the mean, are those without a cache", distance, 0.0, tolerance=ROUNDING)
    return decoded(case, make, rounds=case.rounds)._replace(agreed=agreed)


def torch_step(model: Any, tokens: np.ndarray, rate: float) -> trainers.Step:
    """Returns the step of a plain torch loop: autocast to bfloat16, gradients of pieces added up, fused AdamW."""
    import torch

    rows = torch.from_numpy(tokens).long().to(model.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=rate, weight_decay=0.0, fused=True)
    pieces = rows.split(PIECE)

    def step():
        total = torch.zeros((), device=model.device)
        for piece in pieces:
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = -peers.torch_log_probs(model, piece, 1).mean() * (len(piece) / len(rows))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def train_torch(case: Case) -> Figure:
    """Times the torch loop on transformers' model."""
    tokens = texts(case.shape, case.sizes.texts, case.sizes.length)
    call = torch_step(peers.torch_random(case.shape, "float32"), tokens, 1e-5)
    return trained(case, call, f"torch loop, {PIECE} texts at once")


def decode_torch(case: Case) -> Figure:
    """Times transformers' `generate` with its default cache and attention."""
    import torch

    model = peers.torch_random(case.shape, "bfloat16").eval()
    model.generation_config.eos_token_id = None
    rows = torch.from_numpy(prompts_of(case)).long().to(model.device)
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}

    def make(new):
        def call():
            with torch.inference_mode():
                return model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=new, **drawn).cpu()

        return call

    return decoded(case, make, rounds=2)


def train_tunix(case: Case) -> Figure:
    """Times the step of Tunix's `PeftTrainer`."""
    tokens = texts(case.shape, case.sizes.texts, case.sizes.length)
    call = trainers.tunix_supervised(peers.tunix_random(case.shape, remat=True), tokens, 1e-5)
    return trained(case, call, "weights and moments bfloat16, remat layer")


def decode_tunix(case: Case) -> Figure:
    """Times Tunix's sampler."""
    words: Any = None
    opened = peers.Opened(Model(case.shape, {}, words), decoder(case.shape), {})
    model, prompts = peers.tunix_random(case.shape), prompts_of(case)
    return decoded(case, lambda new: functools.partial(of_tunix(model, opened, prompts, new), 1.0), rounds=2)


MEASURES = {
    ("ours", "supervised"): train_ours,
    ("ours", "reward"): train_ours,
    ("ours", "bilevel"): train_ours,
    ("ours", "decode"): decode_ours,
    ("transformers", "supervised"): train_torch,
    ("transformers", "decode"): decode_torch,
    ("Tunix", "supervised"): train_tunix,
    ("Tunix", "decode"): decode_tunix,
}


def first_losses(who: str, directory: pathlib.Path) -> list[float]:
    """Returns a side's losses of the first 4 supervised steps of the model in a directory."""
    shape, params = load_decoder(directory)
    tokens = texts(shape, 4, 32)
    if who == "ours":
        call = calling(supervised(decoder(shape, dtype=jnp.bfloat16), params, 0, tokens, CHECKED_RATE))
        return [float(call().loss) for _ in range(4)]
    if who == "transformers":
        step = torch_step(peers.torch_policy(directory).to(peers.torch_device()), tokens, CHECKED_RATE)
    else:
        model = peers.tunix_halved(peers.tunix_policy(directory, shape))
        step = trainers.tunix_supervised(model, tokens, CHECKED_RATE)
    return [step() for _ in range(4)]


def out_of_memory(error: BaseException) -> bool:
    """Returns whether a library's error says that memory was short."""
    return bool(re.search(r"RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE))


def release() -> None:
    """Frees what nothing holds any more, compiled programs included."""
    gc.collect()
    jax.clear_caches()


def rows_of(config: Config, who: str) -> list[Row]:
    """Returns what is measured of a side."""
    wanted = [row for row in ROWS if row.model in config.models and row.what in config.what]
    return [row for row in wanted if who == "ours" or ((who, row.what) in MEASURES and not row.rank)]


def attempt(function: Callable, *arguments: Any) -> Any:
    """Returns what a function does, or why it cannot, in a sentence.

    What it catches: a package is missing, memory is short, the device or its compiler fails, a check does not hold.
    """
    try:
        return function(*arguments)
    except ImportError as error:
        return f"{error.name or error} is not installed; {EXTRA}"
    except (MemoryError, RuntimeError, ValueError) as error:
        traceback.print_exc()
        told = " ".join(str(error).split())[:160]
        return f"out of memory: {told}" if out_of_memory(error) else told or repr(error)


def begun(who: str, directory: pathlib.Path) -> tuple[str, list[float]]:
    """Returns the name of the device that a side computes on, and its first losses."""
    kind = jax.devices()[0].device_kind
    if who == "transformers":
        import torch

        kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return kind, first_losses(who, directory)


def work(config: Config, who: str, directory: pathlib.Path, sender: Any) -> None:
    """Measures a side's rows one after the other, and sends each as it is done; runs in a process of its own."""
    if who == "transformers":
        jax.config.update("jax_platforms", "cpu")  # the card is torch's
    sender.send(attempt(begun, who, directory))
    for row in rows_of(config, who):
        began = time.monotonic()
        print(f"{who}, {label(row)}, {row.what}: begins", flush=True)
        figure = attempt(MEASURES[who, row.what], case_of(config, row))
        release()
        told = figure if isinstance(figure, str) else f"{1e3 * figure.took.median:.4g} ms"
        print(f"{who}, {label(row)}, {row.what}: {told} (after {time.monotonic() - began:.0f} s)", flush=True)
        sender.send(figure)


def received(config: Config, who: str, directory: pathlib.Path, until: float) -> tuple[list[Any], str]:
    """Returns what a side's process sent until a time, and why there is no more."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(config, who, directory, sender), daemon=True)
    found, reason = [], "not measured: the time was over"
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, until - time.monotonic())):
            found.append(receiver.recv())
    except EOFError:
        process.join()
        reason = f"not measured: the process ended with code {process.exitcode}"
    process.terminate()
    process.join()
    return found, reason


def compared(who: str, ours: list[float], theirs: list[float]) -> str:
    """Returns how a side's first losses compare with ours.

    Raises:
        ValueError: they differ.
    """
    said = f"First losses of a tiny model, {who}: {', '.join(f'{loss:.3f}' for loss in theirs)}"
    return f"{said}; {agree('equal', ours, theirs, tolerance=ROUNDING)}." if ours is not theirs else f"{said}."


def collect(config: Config, directory: pathlib.Path, until: float) -> tuple[dict, dict[str, Any], list[str]]:
    """Returns figures, or reasons why there are none, by side and row; each side's device; and what agreed."""
    found, devices, notes, ours = {}, {}, [], None
    for place, who in enumerate(config.who):
        share = 1.0 if place == len(config.who) - 1 else SHARES[who]
        began = time.monotonic()
        sent, reason = received(config, who, directory, began + share * (until - began))
        first, *figures = sent or [reason]
        if not isinstance(first, str):
            devices[who], losses = first
            ours = losses if ours is None else ours
            first = attempt(compared, who, ours, losses)
            agrees = first.startswith("First")
            notes += [first] if agrees else []
            figures = figures if agrees else []
            reason = reason if agrees else first
        else:
            figures, reason = [], first
        rows = rows_of(config, who)
        found |= {(who, row): figure for row, figure in zip(rows, [*figures, *[reason] * len(rows)], strict=False)}
    return found, devices, notes


def peaks_of(kind: str) -> str:
    """Returns the published peaks of a device in words."""
    chip = chip_of(kind)
    if chip is None:
        return "no peak is known here, and there are no shares of it"
    return f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s ({chip.source})"


def label(row: Row) -> str:
    """Returns a model with what is trained of it."""
    adapters = f", rank {row.rank}" if row.rank else ""
    return row.model + adapters + ("" if row.dtype == jnp.bfloat16 else f", {jnp.dtype(row.dtype).name}")


def tables_of(found: dict, devices: dict[str, str]) -> list[Table]:
    """Returns the tables of training and of decoding; where a side's device has no known peaks, no shares of them."""
    training, decoding = [], []
    for (who, row), figure in found.items():
        decodes, chip = row.what == "decode", chip_of(devices.get(who, ""))
        peak, unit = (chip and chip.bandwidth, 1e9) if decodes else (chip and chip.flops, 1e12)
        numbers: list[Any] = [None] * 6
        if not isinstance(figure, str):
            took = figure.took.median
            rate = figure.work / took
            share = 100 * rate / peak if peak else None
            numbers = [1e3 * took, figure.tokens / took, figure.work / unit, rate / unit, share, figure.took.first]
        told = figure if isinstance(figure, str) else figure.how
        line = (label(row), who, *numbers[:5], f">= {GOALS[row.what]}", numbers[5], told)
        (decoding if decodes else training).append(line if decodes else (row.what, *line))
    ends = "goal", "first call, s", "how"
    return [
        Table(title, columns, rows)
        for title, columns, rows in (
            ("Training", ("step", "model", "by", "ms", "tokens/s", "TFLOP", "TFLOP/s", "MFU, %", *ends), training),
            ("Decoding", ("model", "by", "ms a token", "tokens/s", "GB", "GB/s", "of bandwidth, %", *ends), decoding),
        )
        if rows
    ]


def main(config: Config) -> pathlib.Path:
    """Prints and writes the tables; returns their folder."""
    until = time.monotonic() + config.seconds
    jax.config.update("jax_platforms", "cpu")  # the card is the other processes'
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    counted = f"{count_check()}."
    print(counted, flush=True)
    with tempfile.TemporaryDirectory() as name:
        shape = tiny_shape("llama-1b")
        save_decoder(name, shape, random_weights(shape, jnp.float32))
        seen = machine()
        found, devices, notes = collect(config, pathlib.Path(name), until)
    seen["device"] = next(iter(devices.values()), seen["device"])
    seen["precision"] = "bfloat16 unless a line says float32"
    peaks = [f"{who} on {kind}: {peaks_of(kind)}." for who, kind in devices.items()]
    checked = [
        f"Checked before, {who}, {label(row)}: {figure.agreed}."
        for (who, row), figure in found.items()
        if not isinstance(figure, str) and figure.agreed
    ]
    figures = [{"by": who, "what": row.what, "model": label(row), "found": each} for (who, row), each in found.items()]
    notes = [*peaks, counted, *notes, *checked]
    return report(config, "gpu", tables_of(found, devices), figures, seen, notes=notes)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
