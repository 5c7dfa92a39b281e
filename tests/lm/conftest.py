"""Models for the language-model tests: tiny random ones, their transformers counterparts, and a pretrained one."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.lm.transformer import trunk
from jaxrlhf.lm.transformer.model import DecoderConfig, decoder, functions_of

STORIES = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260K"


def draw(model, seed, scale):
    """Returns parameters of `model`: normal matrices of that scale, and norms around 1."""
    source = np.random.default_rng(seed)

    def draw_leaf(leaf):
        noise = source.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.25 * noise if leaf.ndim == 1 else scale * noise, jnp.float32)

    return jax.tree.map(draw_leaf, jax.eval_shape(model.init, jax.random.key(0)))


@pytest.fixture(scope="session")
def lively():
    """`lively(model, seed=0, scale=0.3)`: parameters whose distributions are far from uniform.

    Those of `init` are nearly uniform, which hides mistakes.
    """
    return lambda model, seed=0, scale=0.3: draw(model, seed, scale)


@pytest.fixture
def limit(monkeypatch):
    """`limit(name, value)` sets a limit of `trunk`, for decoders that are made after it."""

    def set_limit(name, value):
        monkeypatch.setattr(trunk, name, value)
        functions_of.cache_clear()

    yield set_limit
    functions_of.cache_clear()


@pytest.fixture(scope="session")
def tiny_config():
    return DecoderConfig(
        vocabulary_size=23,
        width=16,
        layers=2,
        query_heads=4,
        key_value_heads=2,
        head_size=6,
        mlp_width=20,
        context_length=64,
    )


@pytest.fixture(scope="session")
def tiny(tiny_config):
    """A tiny decoder, jitted since tests also call it outside of `jit`, and lively parameters."""
    model = decoder(tiny_config)
    model = model._replace(
        hidden=jax.jit(model.hidden),
        logits=jax.jit(model.logits),
        prefill=jax.jit(model.prefill, static_argnums=3),
        decode=jax.jit(model.decode),
    )
    return model, draw(model, 0, 0.3)


@pytest.fixture(scope="session")
def stories():
    """Directory of a pretrained model that is not part of this repository."""
    if not STORIES.is_dir():
        pytest.skip(f"the pretrained model is missing: {STORIES} does not exist")
    return STORIES


@pytest.fixture(scope="session")
def make_llama():
    """`make_llama(kind, **settings)`: a random transformers model with lively weights."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")

    def make(kind="LlamaForCausalLM", **settings):
        torch.manual_seed(0)
        settings = {
            "vocab_size": 31,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "pad_token_id": 0,
        } | settings
        llama = getattr(transformers, kind)(transformers.LlamaConfig(**settings)).eval()
        with torch.no_grad():
            for name, parameter in llama.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
        return llama

    return make
