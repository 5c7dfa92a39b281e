"""Completions token by token: those of `generate`, each program compiled once, and text as its characters are whole."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxrlhf.lm import stream
from jaxrlhf.lm.generate import sample_rows


class Given:
    """A source of given uniforms."""

    def __init__(self, values):
        self.values = iter(values)

    def uniform(self, size):
        return np.array([next(self.values)])


def test_tokens_are_those_of_generate_and_programs_compile_once(tiny, monkeypatch):
    model, params = tiny
    monkeypatch.setattr(stream, "SMALLEST", 8)
    traced = {"prefill": [], "decode": []}

    def counted(name):
        def call(params, tokens, *arguments):
            traced[name].append(tokens.shape)
            return getattr(model, name)(params, tokens, *arguments)

        return call

    plain = model._replace(prefill=counted("prefill"), decode=counted("decode"))
    settings = {"stop_ids": (2,), "temperature": 0.8, "top_p": 0.9}
    sample = stream.open_stream(plain, params, columns=40, max_new_tokens=10, **settings)
    theirs = jax.jit(partial(sample_rows, model, pad_id=0, **settings))
    source, ended = np.random.default_rng(0), 0
    for length in (5, 30, 5, 30, 5, 5):
        prompt, uniforms = source.integers(0, 23, length).astype(np.int32), source.uniform(size=10).astype(np.float32)
        tokens = list(sample(prompt, Given(uniforms)))
        completions = theirs(params, prompt[None], np.ones((1, length), bool), uniforms[None])
        expected = np.asarray(completions.tokens)[0][np.asarray(completions.mask)[0]].tolist()
        ended += expected[-1] == 2
        assert tokens == [token for token in expected if token != 2]
    assert 0 < ended < 6
    # 8 columns, and the 30 that leave room for a reply.
    assert traced == {"prefill": [(1, 8), (1, 30)], "decode": [(1,)]}
    for prompt in (np.zeros(0, np.int32), np.zeros(31, np.int32)):
        with pytest.raises(ValueError, match=f"1 to 30 tokens, got {len(prompt)}"):
            next(sample(prompt, Given([])))


def test_text_comes_once_its_characters_are_whole():
    words = " ça 🎉 va".encode()
    pieces = list(stream.text_pieces(iter(words), list(b"Hi:"), lambda tokens: bytes(tokens).decode(errors="replace")))
    assert pieces == [" ", "ç", "a", " ", "🎉", " ", "v", "a"]
    # What is cut in the middle of a character is shown as it is.
    cut = list(stream.text_pieces(iter(words[:7]), [], lambda tokens: bytes(tokens).decode(errors="replace")))
    assert "".join(cut) == " ça �"
