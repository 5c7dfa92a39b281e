"""Times each library's training steps and decoding for `benchmarks.gpu`."""

import functools
import gc
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import libraries, trainers
from benchmarks.batches import as_prompts, random_tokens
from benchmarks.generation import tunix_sampler
from benchmarks.gpu.cases import ROWS, Case, Config, Library, Row, Workload, decoding_prompts
from benchmarks.gpu.flops import decode_bytes, step_flops
from benchmarks.gpu.steps import REMAT, call_of, random_weights, step_of
from benchmarks.timing import Implementation, Timing, check_close, interleave, warm_up
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.log_probs import completion_log_probs
from jaxrlhf.lm.transformer.model import decoder

BFLOAT16_TOLERANCE = 0.05
"""Nats that losses, and on average the log-probabilities of tokens, may differ by in bfloat16; they are about 6."""
TORCH_MICROBATCH = 4
"""Texts that torch, which keeps all activations, processes at once; gradients are accumulated."""


class Measurement(NamedTuple):
    """What was measured.

    Attributes:
        timing: of one step.
        work: FLOPs of a training step, bytes of a decoding step.
        tokens: of one step.
        notes: batch and settings.
        agreed: what was checked to be equal beforehand.
    """

    timing: Timing
    work: float
    tokens: int
    notes: str
    agreed: str = ""


def out_of_memory(error: BaseException) -> bool:
    """Returns whether a library's error reports a lack of memory."""
    return bool(re.search(r"RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE))


def free_memory() -> None:
    """Frees unreferenced arrays and compiled programs."""
    gc.collect()
    jax.clear_caches()


def time_training(case: Case, call: Callable[[], Any], settings: str) -> Measurement:
    """Times a training step."""
    (timing,) = interleave([Implementation(case.row.workload, call)], rounds=case.rounds)
    return Measurement(timing, step_flops(case), case.tokens, f"{case.batch}; {settings}")


def time_decoding(case: Case, make: Callable[[int], Callable[[], Any]], *, rounds: int) -> Measurement:
    """Times decoding one token: a full completion minus a completion of one token, so that the prompt does not count.

    Args:
        case: what is decoded.
        make: `(new tokens) -> ` a call that generates them.
        rounds: calls of both.
    """
    length = case.sizes.completion
    implementations = [Implementation(str(tokens), make(tokens)) for tokens in (1, length)]
    short, full = interleave(implementations, rounds=rounds, warm_ups=warm_up(implementations, calls=1))
    seconds = tuple((long - one) / (length - 1) for one, long in zip(short.seconds, full.seconds, strict=True))
    timing = Timing("decode", short.first + full.first, seconds)
    return Measurement(timing, decode_bytes(case.model, case.sizes), case.tokens, case.batch)


def train_ours(case: Case) -> Measurement:
    """Times our step with the least rematerialisation that fits."""
    *cheaper, last = REMAT[case.row.workload]
    for remat in cheaper:
        try:
            return time_training(
                case, call_of(step_of(case, remat=remat)), f"remat {remat}, attention {case.attention}"
            )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        free_memory()
    return time_training(case, call_of(step_of(case, remat=last)), f"remat {last}, attention {case.attention}")


def decode_ours(case: Case) -> Measurement:
    """Times our sampler, after checking its log-probabilities against those without a cache."""
    policy = decoder(case.model, dtype=case.row.dtype, attention=case.attention)
    params = random_weights(case.model, case.row.dtype)
    prompts = as_prompts(decoding_prompts(case))
    sample = jax.jit(functools.partial(generate, policy, stop_ids=()), static_argnames="max_new_tokens")

    def make(tokens):
        return lambda: jax.block_until_ready(sample(params, jax.random.key(1), *prompts, max_new_tokens=tokens))

    completions = make(case.sizes.completion)()
    *rows, log_prob = jax.tree.map(lambda leaf: leaf[:4], (*prompts, *completions))
    uncached = jax.jit(functools.partial(completion_log_probs, policy))(params, *rows)
    distance = float(jnp.mean(jnp.abs(uncached - log_prob)))
    what = "mean absolute difference of log-probabilities from those without a cache is 0"
    agreed = check_close(what, distance, 0.0, tolerance=BFLOAT16_TOLERANCE)
    return time_decoding(case, make, rounds=case.rounds)._replace(agreed=agreed)


def torch_step(model: Any, tokens: np.ndarray, learning_rate: float) -> trainers.Step:
    """Returns the step of a plain torch loop: autocast to bfloat16, gradients accumulated, fused AdamW."""
    import torch

    rows = torch.from_numpy(tokens).long().to(model.device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    microbatches = rows.split(TORCH_MICROBATCH)

    def step():
        total = torch.zeros((), device=model.device)
        for microbatch in microbatches:
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = -libraries.torch_log_probs(model, microbatch, 1).mean() * (len(microbatch) / len(rows))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    return step


def train_torch(case: Case) -> Measurement:
    """Times the torch loop on transformers' model."""
    tokens = random_tokens(case.model, case.sizes.texts, case.sizes.length)
    call = torch_step(libraries.torch_random(case.model, "float32"), tokens, 1e-5)
    return time_training(case, call, f"torch loop, microbatches of {TORCH_MICROBATCH} texts")


def decode_torch(case: Case) -> Measurement:
    """Times transformers' `generate` with its default cache and attention."""
    import torch

    model = libraries.torch_random(case.model, "bfloat16").eval()
    model.generation_config.eos_token_id = None
    rows = torch.from_numpy(decoding_prompts(case)).long().to(model.device)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}

    def make(tokens):
        def call():
            with torch.inference_mode():
                mask = torch.ones_like(rows)
                return model.generate(rows, attention_mask=mask, max_new_tokens=tokens, **settings).cpu()

        return call

    return time_decoding(case, make, rounds=2)


def train_tunix(case: Case) -> Measurement:
    """Times the step of Tunix's `PeftTrainer`."""
    tokens = random_tokens(case.model, case.sizes.texts, case.sizes.length)
    call = trainers.tunix_supervised(libraries.tunix_random(case.model, remat=True), tokens, 1e-5)
    return time_training(case, call, "weights and moments bfloat16, remat layer")


def decode_tunix(case: Case) -> Measurement:
    """Times Tunix's sampler."""
    model, prompts = libraries.tunix_random(case.model), decoding_prompts(case)

    def make(tokens):
        return functools.partial(tunix_sampler(model, case.model, prompts, tokens), 1.0)

    return time_decoding(case, make, rounds=2)


MEASURES: dict[tuple[Library, Workload], Callable[[Case], Measurement]] = {
    ("ours", "supervised"): train_ours,
    ("ours", "reward"): train_ours,
    ("ours", "bilevel"): train_ours,
    ("ours", "decode"): decode_ours,
    ("transformers", "supervised"): train_torch,
    ("transformers", "decode"): decode_torch,
    ("Tunix", "supervised"): train_tunix,
    ("Tunix", "decode"): decode_tunix,
}


def rows_of(config: Config, library: Library) -> list[Row]:
    """Returns the rows that a library runs."""
    selected = [row for row in ROWS if row.model in config.models and row.workload in config.workloads]
    if library == "ours":
        return selected
    return [row for row in selected if (library, row.workload) in MEASURES and not row.rank]
