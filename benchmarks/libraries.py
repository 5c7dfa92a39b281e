"""The same weights in three libraries: ours, transformers on torch, and Tunix.

`jaxrlhf` itself needs none of the others; `pip install '.[benchmarks]'` installs them. Together with the newest
transformers pip resolves to an old Tunix, because the two disagree about safetensors;
`pip install --no-deps google-tunix==0.1.7` afterwards installs the version measured here, which runs with either. Imports
are inside functions, so that a benchmark runs with whichever libraries are installed.
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

from benchmarks.batches import as_prompts
from jaxrlhf.base.types import Params
from jaxrlhf.commands.models import Model, open_model
from jaxrlhf.lm.generate import generate
from jaxrlhf.lm.hugging_face.settings import settings_from
from jaxrlhf.lm.transformer.config import DecoderConfig
from jaxrlhf.lm.transformer.model import LanguageModel, decoder

OLDEST_TUNIX = (0, 1, 7)


class LoadedPolicy(NamedTuple):
    """Our policy: the contents of its directory, its pure functions and its parameters, float32."""

    model: Model
    policy: LanguageModel
    params: Params


def open_policy(directory: pathlib.Path) -> LoadedPolicy:
    """Loads the policy of a Hugging Face directory."""
    model = open_model(directory, "policy")
    return LoadedPolicy(model, decoder(model.config), model.params)


def generate_texts(loaded: LoadedPolicy, rows: int, length: int, *, seed: int = 0) -> np.ndarray:
    """Returns texts that the model itself generated, `[rows, length]`, BOS first and no special token after it.

    Args:
        loaded: the model to sample from.
        rows: number of texts.
        length: tokens of each.
        seed: of the sampling.
    """
    bos = loaded.model.bundle.special.bos or 0
    prompts = np.full((rows, 1), bos, np.int32)
    sample = jax.jit(functools.partial(generate, loaded.policy, max_new_tokens=length - 1, stop_ids=()))
    completions = sample(loaded.params, jax.random.key(seed), *as_prompts(prompts))
    tokens = np.concatenate([prompts, np.asarray(completions.tokens)], axis=1)
    # Libraries differ in how they treat EOS, BOS and padding inside a text.
    special = np.isin(tokens[:, 1:], [0, *loaded.model.bundle.stop_ids])
    tokens[:, 1:][special] = 1 + max(loaded.model.bundle.stop_ids, default=0)
    return tokens.astype(np.int32)


def quiet() -> None:
    """Turns off the progress bars and warnings of transformers."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def torch_policy(directory: pathlib.Path) -> Any:
    """Loads the model with transformers, float32, without dropout."""
    import torch
    import transformers

    quiet()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval()


def torch_device() -> str:
    """Returns torch's device: "cuda" where a GPU is visible."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_random(config: DecoderConfig, dtype: str) -> Any:
    """Returns transformers' model of this configuration, randomly initialised on torch's device."""
    import torch
    import transformers

    quiet()
    settings = transformers.AutoConfig.for_model(**settings_from(config, "policy", dtype))
    with torch.device(torch_device()):
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype))


def torch_reward(directory: pathlib.Path, head: np.ndarray) -> Any:
    """Loads the model's trunk as a sequence classifier of transformers.

    Args:
        directory: of the policy.
        head: `[D]`, the weights of the scalar head.
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


def tunix_config(config: DecoderConfig) -> Any:
    """Returns Tunix's configuration of a Llama."""
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    version = importlib.metadata.version("google-tunix")
    if tuple(map(int, version.split(".")[:3])) < OLDEST_TUNIX:
        raise ImportError(name="google-tunix " + ".".join(map(str, OLDEST_TUNIX)))
    # Some versions ignore the RoPE base of their configuration and use this function's default.
    apply_rope = getattr(llama3.apply_rope, "func", llama3.apply_rope)
    llama3.apply_rope = functools.partial(apply_rope, rope_theta=int(config.rope_base or 0))
    return llama3.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocabulary_size,
        embed_dim=config.width,
        hidden_dim=config.mlp_width,
        num_heads=config.query_heads,
        head_dim=config.head_size,
        num_kv_heads=config.key_value_heads,
        rope_theta=int(config.rope_base or 0),
        norm_eps=config.norm_epsilon,
        weight_tying=config.tied_embeddings,
    )


def tunix_policy(directory: pathlib.Path, config: DecoderConfig) -> Any:
    """Loads the model with Tunix, float32."""
    from tunix.models.llama3 import params  # pyright: ignore[reportMissingImports]

    return params.create_model_from_safe_tensors(str(directory), tunix_config(config), dtype=jnp.float32)


def tunix_random(config: DecoderConfig, *, remat: bool = False) -> Any:
    """Returns Tunix's model with random weights in bfloat16; `remat` recomputes each layer in the backward pass."""
    from flax import nnx
    from tunix.models.llama3 import model as llama3  # pyright: ignore[reportMissingImports]

    remat_config = llama3.RematConfig.DECODER if remat else llama3.RematConfig.NONE  # its sampler needs NONE
    settings = dataclasses.replace(tunix_config(config), remat_config=remat_config)
    return tunix_bfloat16(llama3.Llama3(settings, rngs=nnx.Rngs(0)))


def tunix_bfloat16(model: Any) -> Any:
    """Casts a Tunix model's weights to bfloat16, which is then also the dtype that it computes in."""
    from flax import nnx

    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model)))
    return model


def torch_log_probs(model: Any, tokens: Any, prompt_length: int) -> Any:
    """Returns the log-probabilities of the tokens after the prompts, `[N, T - P]`, differentiable in torch.

    Args:
        model: a causal language model of transformers.
        tokens: `[N, T]`, a tensor.
        prompt_length: P.
    """
    import torch

    positions = tokens.shape[1] - prompt_length + 1
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits[:, :-1]
    completions = tokens[:, prompt_length:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), completions.flatten(), reduction="none")
    return -loss.view(completions.shape)


def tunix_log_probs(model: Any, tokens: np.ndarray, prompt_length: int) -> Callable[[], jax.Array]:
    """Returns a compiled call for the log-probabilities of Tunix's model, `() -> [N, T - P]`."""
    from flax import nnx
    from tunix.rl import common  # pyright: ignore[reportMissingImports]

    mask = jnp.ones(tokens.shape, bool)
    rows = jnp.asarray(tokens), common.build_positions_from_mask(mask), common.make_causal_attn_mask(mask)
    completion_length = tokens.shape[1] - prompt_length
    compiled = nnx.jit(lambda model, *rows: common.get_per_token_logps(model, *rows, logits_to_keep=completion_length))
    return lambda: jax.block_until_ready(compiled(model, *rows))
