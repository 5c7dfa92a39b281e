"""The same weights in three libraries: ours, transformers on torch, and Tunix.

Nothing here is needed by the product. `pip install '.[benchmarks]'` brings the peers. Beside the newest transformers pip
finds an old Tunix only, as the two disagree about safetensors; `pip install --no-deps google-tunix==0.1.7` after it brings
the one that is measured, which runs with either. Imports are inside of functions, so that a benchmark runs with whichever
peers there are.
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.base.types import Params
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.settings import settings_from
from jaxrlhf.lm.problem import Prompts
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import LanguageModel, decoder

OLDEST_TUNIX = (0, 1, 7)


class Opened(NamedTuple):
    """Our side of a model: what the directory holds, its pure functions and its parameters, float32."""

    model: Model
    policy: LanguageModel
    params: Params


def open_policy(directory: pathlib.Path) -> Opened:
    """Returns the model of a Hugging Face directory."""
    model = open_model(directory, "policy")
    return Opened(model, decoder(model.config), model.params)


def texts_of(opened: Opened, rows: int, length: int, *, seed: int = 0) -> np.ndarray:
    """Returns token rows `[rows, length]` that the model itself wrote, BOS first; without tokens that peers treat as ends.

    Args:
        opened: the model.
        rows: texts.
        length: tokens of each.
        seed: of the sampling.
    """
    begin = opened.model.words.special.bos or 0
    start = jnp.full((rows, 1), begin, jnp.int32)
    write = functools.partial(generate, opened.policy, max_new_tokens=length - 1, stop_ids=())
    written = jax.jit(write)(opened.params, jax.random.key(seed), start, jnp.ones((rows, 1), bool))
    tokens = np.concatenate([np.asarray(start), np.asarray(written.tokens)], axis=1)
    # Ends, beginnings and padding in the midst of a text mean something to one library and nothing to another.
    unwanted = np.isin(tokens[:, 1:], [0, *opened.model.words.stop_ids])
    tokens[:, 1:][unwanted] = 1 + max(opened.model.words.stop_ids, default=0)
    return tokens.astype(np.int32)


def without_padding(tokens: np.ndarray) -> Prompts:
    """Returns rows that are real tokens throughout."""
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def quiet() -> None:
    """Keeps progress bars and advice of transformers out of the output."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def torch_policy(directory: pathlib.Path) -> Any:
    """Returns the model as transformers opens it, float32, without dropout."""
    import torch
    import transformers

    quiet()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def torch_device() -> str:
    """Returns where torch computes: on a graphics card if it sees one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_random(shape: DecoderConfig, dtype: str) -> Any:
    """Returns transformers' model of a shape with its own random weights, made where torch computes."""
    import torch
    import transformers

    quiet()
    described = transformers.AutoConfig.for_model(**settings_from(shape, "policy", dtype))
    with torch.device(torch_device()):
        return transformers.AutoModelForCausalLM.from_config(described, dtype=getattr(torch, dtype))


def torch_reward(directory: pathlib.Path, head: np.ndarray) -> Any:
    """Returns transformers' sequence classifier on the model's trunk.

    Args:
        directory: of the policy.
        head: `[D]`.
    """
    import torch
    import transformers

    quiet()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, num_labels=1, dtype=torch.float32, pad_token_id=0
    )
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(np.asarray(head))[None])
    return model.eval()


def tunix_config(shape: DecoderConfig) -> Any:
    """Returns Tunix's description of a Llama of ours."""
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    version = importlib.metadata.version("google-tunix")
    if tuple(map(int, version.split(".")[:3])) < OLDEST_TUNIX:
        raise ImportError(name="google-tunix " + ".".join(map(str, OLDEST_TUNIX)))
    # Some versions take the base from a default of this function, whatever their own configuration says.
    rotate = getattr(llama3.apply_rope, "func", llama3.apply_rope)
    llama3.apply_rope = functools.partial(rotate, rope_theta=int(shape.rope_base or 0))
    return llama3.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocabulary_size,
        embed_dim=shape.width,
        hidden_dim=shape.mlp_width,
        num_heads=shape.query_heads,
        head_dim=shape.head_size,
        num_kv_heads=shape.key_value_heads,
        rope_theta=int(shape.rope_base or 0),
        norm_eps=shape.norm_epsilon,
        weight_tying=shape.tied_embeddings,
    )


def tunix_policy(directory: pathlib.Path, shape: DecoderConfig) -> Any:
    """Returns the model as Tunix opens it, float32."""
    from tunix.models.llama3 import params  # pyright: ignore[reportMissingImports]

    return params.create_model_from_safe_tensors(str(directory), tunix_config(shape), dtype=jnp.float32)


def tunix_random(shape: DecoderConfig, *, remat: bool = False) -> Any:
    """Returns Tunix's model with random weights in bfloat16; with `remat` a backward pass computes each layer again."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    kept = llama3.RematConfig.DECODER if remat else llama3.RematConfig.NONE  # its sampler runs without alone
    settings = dataclasses.replace(tunix_config(shape), remat_config=kept)
    return tunix_halved(llama3.Llama3(settings, rngs=nnx.Rngs(0)))


def tunix_halved(model: Any) -> Any:
    """Returns a model of Tunix's with its weights in bfloat16: it computes in what they are stored in."""
    from flax import nnx

    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model)))
    return model


def torch_log_probs(model: Any, tokens: Any, prompt_length: int) -> Any:
    """Returns the log-probabilities of everything behind the prompts, `[N, T - P]`, differentiable in torch.

    Args:
        model: transformers' policy.
        tokens: `[N, T]`, a tensor.
        prompt_length: P.
    """
    import torch

    kept = tokens.shape[1] - prompt_length + 1
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    completions = tokens[:, prompt_length:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), completions.flatten(), reduction="none")
    return -loss.view(completions.shape)


def tunix_log_probs(model: Any, tokens: np.ndarray, prompt_length: int) -> Callable[[], jax.Array]:
    """Returns a call for the same of Tunix's policy, compiled."""
    from flax import nnx
    from tunix.rl import common  # pyright: ignore[reportMissingImports]

    mask = jnp.ones(tokens.shape, bool)
    rows = jnp.asarray(tokens), common.build_positions_from_mask(mask), common.make_causal_attn_mask(mask)
    kept = tokens.shape[1] - prompt_length
    compiled = nnx.jit(lambda model, *rows: common.get_per_token_logps(model, *rows, logits_to_keep=kept))
    return lambda: jax.block_until_ready(compiled(model, *rows))
