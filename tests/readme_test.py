"""The README's call site runs as printed."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxrlhf import Labelled, bilevel_descent, central, tangent
from jaxrlhf.commands.main import COMMANDS
from jaxrlhf.lm import (
    DecoderConfig,
    LanguageFrozen,
    Prompts,
    decoder,
    language_problem,
    load_decoder,
    reward_model,
    save_decoder,
)
from jaxrlhf.objectives import add, likelihood, utility

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
GUIDE = README.parent / "docs" / "language_models.md"


def test_the_call_site_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    shape = DecoderConfig(9, 16, 1, 2, 1, 8, 16, context_length=32)
    save_decoder(tmp_path, shape, decoder(shape).init(jax.random.key(0)))
    names = {
        "directory": tmp_path,
        "key": jax.random.key(1),
        "batches": [Prompts(jnp.full((2, 3), 4), jnp.ones((2, 3), bool))] * 2,
        "annotate": lambda sample: jnp.ones((2, 4, 1)),
    }
    library = (Labelled, bilevel_descent, central, tangent, LanguageFrozen, decoder, language_problem, load_decoder,
               reward_model, add, likelihood, utility)  # fmt: skip
    names |= {part.__name__: part for part in library} | {"jax": jax, "optax": optax}
    exec(compile(code, "README.md", "exec"), names)
    assert names["state"].step == 2
    assert jnp.isfinite(names["info"].hypergradient_norm)


def test_the_set_up_lines_are_the_ones_that_ci_runs():
    lines = [line.strip() for line in README.read_text().splitlines() if line.startswith("    python3 -m venv")]
    assert len(lines) == 2
    assert lines[0].endswith("experiments/online_rlhf.py")
    assert lines[1].endswith("bin/pytest")
    assert all("-c constraints.txt" in line for line in lines)


def test_every_command_that_is_shown_is_understood():
    shown = [line.split("jaxrlhf ", 1)[1] for text in (README, GUIDE) for line in text.read_text().splitlines()
             if re.match(r"    (\.venv/bin/)?jaxrlhf ", line)]  # fmt: skip
    assert len(shown) >= 9
    for line in shown:
        name, *arguments = shlex.split(line)
        kind, _ = COMMANDS[name]
        assert isinstance(tyro.cli(kind, args=arguments), kind)


def test_the_functions_that_the_guide_shows_are_annotators():
    names = {}
    exec(re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[0], names)
    assert list(names["prefer"](["p", "p"], ["a", "long"], ["bb", "no"])) == [1.0, 0.0]
    assert list(names["score"](["p"], ["x" * 100])) == [-1.0]
