"""FLOPs and bytes of a step, counted from the model's configuration.

Recomputation to save memory does not count, of causal attention half the T x T square does, and a prompt that several
completions share counts once.
"""

from typing import NamedTuple

from benchmarks.gpu.cases import Case, Sizes
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.layers import query_blocks
from jaxrlhf.lm.transformer.trunk import MAX_UNROLLED_LAYERS, keeps_scores


class PassFlops(NamedTuple):
    """FLOPs of one pass over a batch: forward, backward, and of the forward pass attention and adapters' first factors."""

    forward: float
    backward: float
    attention: float
    down: float


class Read(NamedTuple):
    """What a pass reads: tokens, pairs of a query and a key that it may attend to, and positions with logits."""

    tokens: float
    scores: float
    logits: float = 0


def pass_flops(model: DecoderConfig, read: Read, *, rank: int = 0) -> PassFlops:
    """Counts the matrix products of a gated decoder.

    Forward: 2 per weight of the layers and token; 2 per weight of the head and position with logits; and in attention 4
    per query, key and head feature, for scores and averages. Backward: twice that, for inputs and for weights; weights
    frozen under adapters need the former only. Adapters are trained: 2 per weight and token forward, 4 backward.

    Args:
        model: the decoder.
        read: what the pass reads; a reward model has no logits.
        rank: of adapters; 0 trains all weights.
    """
    query_width = model.query_heads * model.head_size
    qkv_width = query_width + 2 * model.key_value_heads * model.head_size
    matrices = (
        (model.width, qkv_width),
        (query_width, model.width),
        (model.width, 2 * model.mlp_width),
        (model.mlp_width, model.width),
    )
    tokens = read.tokens * model.layers
    weights = 2.0 * tokens * sum(inputs * outputs for inputs, outputs in matrices)
    down, up = (2.0 * tokens * rank * sum(matrix[axis] for matrix in matrices) for axis in (0, 1))
    head = 2.0 * read.logits * model.width * model.vocabulary_size
    attention = 4.0 * read.scores * model.layers * query_width
    backward = (1 if rank else 2) * (weights + head) + 2 * (down + up + attention)
    return PassFlops(weights + down + up + head + attention, backward, attention, down)


def causal_scores(length: int, before: int = 0, *, as_compiled: bool = False) -> float:
    """Counts the scores of one row's last `length` columns with them and `before` more: half of their own square.

    Args:
        length: columns that attend.
        before: columns before them.
        as_compiled: in blocks of queries that include some masked scores, as in the programs.
    """
    if not as_compiled:
        return length * before + length**2 / 2
    return sum((end - begin) * (before + end) for begin, end in query_blocks(length))


def step_flops(case: Case, *, as_compiled: bool = False) -> float:
    """Returns the FLOPs of a training step.

    Supervised and reward steps need one forward and one backward pass over their texts. A bilevel update with `central`,
    `tangent` and one shared sample needs, of the policy on its own B M completions (those of the reference do not depend
    on it):

    - forward and backward at tilt 0, for the gradient of -J;
    - forward and backward at +sigma and -sigma, for the gradient of the tangent's proximal loss;
    - forward at the three new iterates, for the density ratios that weigh the hypergradient;

    6 forward and 3 backward; and of the reward model on all 2 B M completions, one forward and one backward. Each reads a
    prompt once for all of its completions.

    Args:
        case: what is trained, and on what.
        as_compiled: counts as the programs compute it on a CPU: attention in blocks that include some masked scores; and
            in a backward pass again what is not saved, of many layers attention and the adapters' first factors.
    """
    sizes = case.sizes

    def passes(read: Read, rows: int, length: int, forward: int, backward: int) -> float:
        flops = pass_flops(case.model, read, rank=case.row.rank)
        scans = case.model.layers > MAX_UNROLLED_LAYERS
        again = (flops.attention if scans or not keeps_scores(case.model, rows, length) else 0) + scans * flops.down
        return forward * flops.forward + backward * (flops.backward + as_compiled * again)

    if case.row.workload != "bilevel":
        logits = sizes.texts * (sizes.length - 1) if case.row.workload == "supervised" else 0
        scores = sizes.texts * causal_scores(sizes.length, as_compiled=as_compiled)
        return passes(Read(sizes.texts * sizes.length, scores, logits), sizes.texts, sizes.length, 1, 1)

    def completions(count: int, length: int, logits: int) -> Read:
        """`count` completions of each prompt."""
        scores = causal_scores(sizes.prompt, as_compiled=as_compiled)
        scores += count * causal_scores(length, sizes.prompt, as_compiled=as_compiled)
        read = Read(sizes.prompt + count * length, scores, count * logits)
        return Read(*(sizes.prompts * each for each in read))

    # The last token of a completion predicts nothing, so only the reward model reads it.
    policy = completions(sizes.pairs, sizes.completion - 1, sizes.completion)
    reward = completions(2 * sizes.pairs, sizes.completion, 0)
    rows, length = sizes.prompts * sizes.pairs, sizes.prompt + sizes.completion
    return passes(policy, rows, length - 1, 6, 3) + passes(reward, 2 * rows, length, 1, 1)


def decode_bytes(model: DecoderConfig, sizes: Sizes) -> float:
    """Returns the bytes that decoding one token must read in bfloat16, averaged over a completion.

    These are every weight once, except an embedding that is not also the head, of which few rows are read; and for every
    row the keys and values of the prompt and of half the completion.
    """
    weights = pass_flops(model, Read(tokens=1, scores=0, logits=1)).forward / 2
    cached = sizes.rows * (sizes.prompt + sizes.completion / 2)
    return 2 * (weights + 2 * model.layers * model.key_value_heads * model.head_size * cached)
