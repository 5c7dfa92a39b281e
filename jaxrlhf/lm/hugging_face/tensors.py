"""Correspondence of a checkpoint's tensors and a decoder's parameters: names and layouts, in both directions.

A checkpoint's are separate and mostly `[out, in]`; the decoder's are `[in, out]` and fused (queries, key and value by
key/value head; gate and up). Each `Entry` has both directions of one parameter; all else follows from the list of entries.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.lm.transformer.config import DecoderConfig


class Entry(NamedTuple):
    """One parameter of the decoder.

    Attributes:
        path: in the nested dict of parameters, with layers by number; `params_from` stacks them.
        sources: names and shapes of the checkpoint's tensors that it consists of, in order.
        join: from those tensors to the parameter.
        split: the inverse.
    """

    path: tuple[str, ...]
    sources: dict[str, tuple[int, ...]]
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def entries(config: DecoderConfig, kind: Kind) -> list[Entry]:
    """Returns the correspondence for a policy, or for the trunk and head of a reward model."""
    width, gpt2 = config.width, config.family == "gpt2"
    shape = (config.vocabulary_size, width)
    names = ("transformer.wte", "transformer.ln_f") if gpt2 else ("model.embed_tokens", "model.norm")
    found = [_same(("embedding",), f"{names[0]}.weight", shape)]
    if config.rope_base is None:
        found.append(_same(("positions",), "transformer.wpe.weight", (config.context_length, width)))
    of_layer = _gpt2_layer if gpt2 else _llama_like_layer
    for index in range(config.layers):
        found += of_layer(config, ("layers", str(index)), f"{'transformer.h' if gpt2 else 'model.layers'}.{index}")
    found += _norm(config, ("final_norm",), names[1], width)
    if kind == "reward":
        found.append(Entry(("head",), {"score.weight": (1, width)}, lambda row: row[0], lambda param: (param[None],)))
    elif not config.tied_embeddings:
        found.append(_transposed(("output_head",), "lm_head.weight", shape))
    return found


def tensor_shapes(config: DecoderConfig, kind: Kind) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the tensors of a checkpoint."""
    return {name: shape for entry in entries(config, kind) for name, shape in entry.sources.items()}


def params_from(tensors: dict[str, np.ndarray], config: DecoderConfig, kind: Kind) -> dict:
    """Returns parameters from a checkpoint's tensors; those of a reward model have a `head` beside the trunk's."""
    params: dict[str, Any] = {}
    for entry in entries(config, kind):
        *parents, name = entry.path
        parent = params
        for key in parents:
            parent = parent.setdefault(key, {})
        parent[name] = entry.join(*(tensors[name] for name in entry.sources))
    layers = [params["layers"][str(index)] for index in range(config.layers)]
    return params | {"layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}


def tensors_from(params: dict, config: DecoderConfig, kind: Kind) -> dict[str, np.ndarray]:
    """Returns a checkpoint's tensors from parameters; the inverse of `params_from`."""
    tensors, stacked = {}, jax.tree.map(np.asarray, params["layers"])
    layers = {
        str(index): jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(config.layers)
    }
    for entry in entries(config, kind):
        leaf: Any = params | {"layers": layers}
        for key in entry.path:
            leaf = leaf[key]
        tensors |= dict(zip(entry.sources, entry.split(np.asarray(leaf)), strict=True))
    return tensors


def _llama_like_layer(config: DecoderConfig, path: tuple[str, ...], prefix: str) -> list[Entry]:
    width, mlp_width, size = config.width, config.mlp_width, config.head_size
    attended = config.query_heads * size
    # Gemma has a norm after attention under the name that other families use for the norm before the MLP.
    before_mlp = "pre_feedforward_layernorm" if config.norm_after else "post_attention_layernorm"
    found: list[Entry] = []
    if config.norm_before:
        found += _norm(config, (*path, "attention_norm"), f"{prefix}.input_layernorm", width)
        found += _norm(config, (*path, "mlp_norm"), f"{prefix}.{before_mlp}", width)
    if config.norm_after:
        found += _norm(config, (*path, "attention_norm_after"), f"{prefix}.post_attention_layernorm", width)
        found += _norm(config, (*path, "mlp_norm_after"), f"{prefix}.post_feedforward_layernorm", width)
    if config.query_key_norm:
        queries, keys = (config.query_heads, config.key_value_heads) if config.norm_heads_together else (1, 1)
        found += _norm(config, (*path, "query_norm"), f"{prefix}.self_attn.q_norm", queries * size)
        found += _norm(config, (*path, "key_norm"), f"{prefix}.self_attn.k_norm", keys * size)
    heads = _heads(config, (*path, "query_key_value"), [f"{prefix}.self_attn.{kind}_proj" for kind in "qkv"])
    if config.experts is not None:
        found += heads
        found += _linear((*path, "attention_output"), f"{prefix}.self_attn.o_proj", attended, width, config.output_bias)
        return found + _experts(config, (*path, "experts"), prefix)
    gate_up = _gate_up(config, (*path, "gate_up"), f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")
    if config.family == "phi3":
        heads = [_in_one(entry, f"{prefix}.self_attn.qkv_proj.weight") for entry in heads]
        gate_up = [_in_one(entry, f"{prefix}.mlp.gate_up_proj.weight") for entry in gate_up]
    found += heads
    found += _linear((*path, "attention_output"), f"{prefix}.self_attn.o_proj", attended, width, config.output_bias)
    found += gate_up
    found += _linear((*path, "mlp_output"), f"{prefix}.mlp.down_proj", mlp_width, width, config.mlp_bias)
    return found


def _experts(config: DecoderConfig, path: tuple[str, ...], prefix: str) -> list[Entry]:
    """Returns the entries of a mixture of experts, whose checkpoint has three matrices for each expert."""
    assert config.experts is not None
    count, width, inner = config.experts.count, config.width, config.mlp_width
    mixtral = config.family == "mixtral"
    module = f"{prefix}.block_sparse_moe" if mixtral else f"{prefix}.mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    into = {f"{module}.experts.{index}.{name}.weight": (inner, width) for name in (gate, up) for index in range(count)}
    out = {f"{module}.experts.{index}.{down}.weight": (width, inner) for index in range(count)}

    def join(*tensors):
        return np.stack(tensors).reshape(2, count, inner, width).transpose(3, 1, 0, 2)

    def split(param):
        return tuple(param.transpose(2, 1, 3, 0).reshape(-1, inner, width))

    return [
        _transposed((*path, "router"), f"{module}.gate.weight", (count, width)),
        Entry((*path, "gate_up"), into, join, split),
        Entry(
            (*path, "output"),
            out,
            lambda *tensors: np.stack(tensors).swapaxes(1, 2),
            lambda param: tuple(param.swapaxes(1, 2)),
        ),
    ]


def _gpt2_layer(config: DecoderConfig, path: tuple[str, ...], prefix: str) -> list[Entry]:
    """Returns the entries of a GPT-2 layer: weights are `[in, out]`; queries, keys and values are three blocks."""
    width, mlp_width, heads, size = config.width, config.mlp_width, config.query_heads, config.head_size

    def by_head(blocks):
        grouped = blocks.reshape(-1, 3, heads, size).swapaxes(1, 2)
        return grouped.reshape(*blocks.shape[:-1], -1)

    def by_kind(grouped):
        blocks = grouped.reshape(-1, heads, 3, size).swapaxes(1, 2)
        return (blocks.reshape(*grouped.shape[:-1], -1),)

    def fused(leaf, shape):
        name = f"{prefix}.attn.c_attn.{leaf}"
        return Entry((*path, "query_key_value", leaf), {name: shape}, by_head, by_kind)

    def ungated(leaf, shape):
        def join(tensor):
            return tensor.reshape(*tensor.shape[:-1], 1, -1)

        def split(param):
            return (param.reshape(*param.shape[:-2], -1),)

        return Entry((*path, "gate_up", leaf), {f"{prefix}.mlp.c_fc.{leaf}": shape}, join, split)

    found = _norm(config, (*path, "attention_norm"), f"{prefix}.ln_1", width)
    found += _norm(config, (*path, "mlp_norm"), f"{prefix}.ln_2", width)
    found += [fused("weight", (width, 3 * width)), fused("bias", (3 * width,))]
    found += [ungated("weight", (width, mlp_width)), ungated("bias", (mlp_width,))]
    for param, name, inner in (("attention_output", "attn.c_proj", width), ("mlp_output", "mlp.c_proj", mlp_width)):
        found.append(_same((*path, param, "weight"), f"{prefix}.{name}.weight", (inner, width)))
        found.append(_same((*path, param, "bias"), f"{prefix}.{name}.bias", (width,)))
    return found


def _in_one(entry: Entry, name: str) -> Entry:
    """Returns the entry for a checkpoint that has the sources below one another in one tensor."""
    shapes = list(entry.sources.values())
    ends = np.cumsum([shape[0] for shape in shapes])
    source = {name: (int(ends[-1]), *shapes[0][1:])}
    return Entry(
        entry.path,
        source,
        lambda tensor: entry.join(*np.split(tensor, ends[:-1])),
        lambda param: (np.concatenate(entry.split(param)),),
    )


def _same(path: tuple[str, ...], name: str, shape: tuple[int, ...]) -> Entry:
    return Entry(path, {name: shape}, lambda tensor: tensor, lambda param: (param,))


def _transposed(path: tuple[str, ...], name: str, shape: tuple[int, int]) -> Entry:
    return Entry(path, {name: shape}, lambda tensor: tensor.T, lambda param: (param.T,))


def _norm(config: DecoderConfig, path: tuple[str, ...], name: str, size: int) -> list[Entry]:
    found = [_same((*path, "scale"), f"{name}.weight", (size,))]
    return [*found, _same((*path, "bias"), f"{name}.bias", (size,))] if config.norm == "layer" else found


def _linear(path: tuple[str, ...], name: str, inner: int, outer: int, bias: bool) -> list[Entry]:
    found = [_transposed((*path, "weight"), f"{name}.weight", (outer, inner))]
    return [*found, _same((*path, "bias"), f"{name}.bias", (outer,))] if bias else found


def _heads(config: DecoderConfig, path: tuple[str, ...], names: list[str]) -> list[Entry]:
    """Returns the entries of queries, keys and values, which are grouped by key/value head."""
    width, heads, size = config.width, config.key_value_heads, config.head_size
    group = config.query_heads // heads
    outer = (config.query_heads * size, heads * size, heads * size)

    def join(*tensors):
        # `[out, in]` or `[out]`, where out is heads times head size.
        parts = [tensor.T.reshape(-1, heads, len(tensor) // heads // size, size) for tensor in tensors]
        return np.concatenate(parts, axis=2).reshape(*tensors[0].T.shape[:-1], -1)

    def split(fused):
        parts = np.split(fused.reshape(-1, heads, group + 2, size), [group, group + 1], axis=2)
        return tuple(part.reshape(*fused.shape[:-1], -1).T for part in parts)

    shapes = {f"{name}.weight": (rows, width) for name, rows in zip(names, outer, strict=True)}
    found = [Entry((*path, "weight"), shapes, join, split)]
    if config.query_key_value_bias:
        shapes = {f"{name}.bias": (rows,) for name, rows in zip(names, outer, strict=True)}
        found.append(Entry((*path, "bias"), shapes, join, split))
    return found


def _gate_up(config: DecoderConfig, path: tuple[str, ...], gate: str, up: str) -> list[Entry]:
    width, mlp_width = config.width, config.mlp_width

    def join(gate, up):
        return np.stack([gate.T, up.T], axis=-2)

    def split(fused):
        return fused[..., 0, :].T, fused[..., 1, :].T

    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (mlp_width, width) for name in (gate, up)}
    found = [Entry((*path, "weight"), shapes, join, split)]
    if config.mlp_bias:
        found.append(Entry((*path, "bias"), {f"{name}.bias": (mlp_width,) for name in (gate, up)}, join, split))
    return found
