"""FLOPs and bytes of a step, counted from the model's configuration.

Recomputation to save memory does not count, and of causal attention half the T x T square does.
"""

from typing import NamedTuple

from benchmarks.gpu.cases import Case, Sizes
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import query_blocks
from jaxrlhf.lm.transformer.trunk import keeps_scores


class PassFlops(NamedTuple):
    """FLOPs of one pass over a batch: forward, backward, and the attention products of the forward pass."""

    forward: float
    backward: float
    attention: float


def pass_flops(
    model: DecoderConfig,
    rows: int,
    length: int,
    *,
    logit_columns: int = 0,
    rank: int = 0,
    attended_fraction: float = 0.5,
) -> PassFlops:
    """Counts the matrix products of a gated decoder.

    Forward: 2 per weight of the layers and token; 2 per weight of the head and column of logits; and in attention 4 per
    query, key and head feature, for scores and averages. Backward: twice that, for inputs and for weights; weights frozen
    under adapters need the former only. Adapters are trained: 2 per weight and token forward, 4 backward.

    Args:
        model: the decoder.
        rows: N.
        length: T, tokens per row.
        logit_columns: positions with logits; 0 for a reward model.
        rank: of adapters; 0 trains all weights.
        attended_fraction: of the T x T scores; 1/2 is causal.
    """
    query_width = model.query_heads * model.head_size
    qkv_width = query_width + 2 * model.key_value_heads * model.head_size
    matrices = (
        (model.width, qkv_width),
        (query_width, model.width),
        (model.width, 2 * model.mlp_width),
        (model.mlp_width, model.width),
    )
    tokens = rows * length * model.layers
    weights = 2.0 * tokens * sum(inputs * outputs for inputs, outputs in matrices)
    adapters = 2.0 * tokens * rank * sum(inputs + outputs for inputs, outputs in matrices)
    head = 2.0 * rows * logit_columns * model.width * model.vocabulary_size
    attention = 4.0 * tokens * length * query_width * attended_fraction
    backward = (1 if rank else 2) * (weights + head) + 2 * (adapters + attention)
    return PassFlops(weights + adapters + head + attention, backward, attention)


def step_flops(case: Case, *, as_compiled: bool = False) -> float:
    """Returns the FLOPs of a training step.

    Supervised and reward steps need one forward and one backward pass over their texts. A bilevel update with `central`,
    `tangent` and one shared sample needs, of the policy on its own B M completions (those of the reference do not depend
    on it):

    - forward and backward at tilt 0, for the gradient of -J;
    - forward and backward at +sigma and -sigma, for the gradient of the tangent's proximal loss;
    - forward at the three new iterates, for the density ratios that weigh the hypergradient;

    6 forward and 3 backward; and of the reward model on all 2 B M completions, one forward and one backward.

    Args:
        case: what is trained, and on what.
        as_compiled: counts attention as the programs compute it: in blocks that include some masked scores, and once more
            in a backward pass where scores are recomputed.
    """
    sizes = case.sizes

    def passes(rows: int, length: int, logit_columns: int, forward: int, backward: int) -> float:
        fraction, recomputed = 0.5, 0
        if as_compiled:
            fraction = sum((end - begin) * end for begin, end in query_blocks(length)) / length**2
            recomputed = 0 if keeps_scores(case.model, rows, length) else 1
        flops = pass_flops(
            case.model,
            rows,
            length,
            logit_columns=logit_columns,
            rank=case.row.rank,
            attended_fraction=fraction,
        )
        return forward * flops.forward + backward * (flops.backward + recomputed * flops.attention)

    if case.row.workload != "bilevel":
        logit_columns = sizes.length - 1 if case.row.workload == "supervised" else 0
        return passes(sizes.texts, sizes.length, logit_columns, 1, 1)
    completions, length = sizes.prompts * sizes.pairs, sizes.prompt + sizes.completion
    # The last token of a completion predicts nothing, so only the reward model reads it.
    policy = passes(completions, length - 1, sizes.completion, 6, 3)
    return policy + passes(2 * completions, length, 0, 1, 1)


def decode_bytes(model: DecoderConfig, sizes: Sizes) -> float:
    """Returns the bytes that decoding one token must read in bfloat16, averaged over a completion.

    These are every weight once, except an embedding that is not also the head, of which few rows are read; and for every
    row the keys and values of the prompt and of half the completion.
    """
    weights = pass_flops(model, 1, 1, logit_columns=1, attended_fraction=0.0).forward / 2
    cached = sizes.rows * (sizes.prompt + sizes.completion / 2)
    return 2 * (weights + 2 * model.layers * model.key_value_heads * model.head_size * cached)
