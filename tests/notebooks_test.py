"""Each notebook runs in a clean kernel, computes what its text says, and is saved without traces of a machine."""

import json
import os
import pathlib
import re
import sys

import jax
import jupyter_client
import nbclient
import nbformat
import pytest
import tokenizers
from jupyter_client.kernelspec import KernelSpecManager

import jaxrlhf
from jaxrlhf.lm import DecoderConfig, SpecialIds, decoder, save_decoder

STORIES = pathlib.Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
PACKAGE = pathlib.Path(jaxrlhf.__file__).parents[1]

# Run in the notebook's kernel after its last cell, on its variables.
FIRST_STEPS = """
for name, order in (("forward", 1), ("central", 2), ("five_point", 4)):
    assert abs(slopes[name] - order) < 0.05, slopes
    assert np.all(np.diff(errors[name]) > 0), errors
assert errors["forward"][0] < 2e-3 and errors["central"][0] < 1e-5 and errors["five_point"][0] < 1e-9, errors

nothing_done = float(before.gap)
assert 0.5 < nothing_done < 1.0
assert float(after.gap) < 0.02 * nothing_done and after.win_rate > 0.7 > before.win_rate
late = {name: float(curve[-100:].mean()) for name, curve in gaps.items()}
assert all(abs(float(curve[0]) - nothing_done) < 1e-5 for curve in gaps.values())
assert abs(late["decoupled"]) < 1e-4, late
optimum = late["central, closed form"]
assert 0.004 < optimum < 0.008, late
assert all(abs(late[name] - optimum) < 0.1 * optimum for name in ("central", "boltzmann")), late
assert step._cache_size() == 1

assert all(0.15 < value.mean() < 0.3 for value in final.values()), final
assert abs(np.median(difference)) < 5e-3 and abs(difference.mean()) < 4 * error
"""

THE_METHOD = """
for name, order in (("forward", 1), ("central", 2), ("five_point", 4)):
    assert abs(slopes[name] - order) < 0.05, slopes
assert errors["forward"][3] < 0.15 and errors["central"][3] < 2e-3 and errors["five_point"][3] < 2e-6, errors
assert abs(slope(0.0) - upper_value(stable)) < 1e-12 and np.all(values - tangent < 1e-12)

at_stop, at_optimum = np.argmin(abs(positions)), np.argmin(abs(positions - 1))
assert abs(decoupled_slope[at_stop]) < 1e-6 and true_slope[at_stop] < -0.1
assert abs(true_slope[at_optimum]) < 1e-6 and decoupled_slope[at_optimum] > 0.05
assert np.all(np.sign(reward_weight) == [-1, 1, 1, 1, 1]), reward_weight
assert np.allclose(reward_weight, (costs - policies[0] @ costs) / beta, rtol=0.02)

assert np.ptp(spread["shared"]) < 0.01 * spread["shared"].mean(), spread
assert spread["independent"][0] > 20 * spread["shared"][0] and spread["common"][0] > 2 * spread["shared"][0], spread
assert all(final[name][0] < upper_value(optimum) + 0.004 and final[name][1] > 1.5 for name in ("boltzmann", "central"))
assert abs(final["decoupled"][0] - upper_value(stable)) < 0.01 and final["decoupled"][1] < 0.7, final
"""

FOUR_ROOMS = """
assert errors["boltzmann"] < 1e-9 and errors["central"] < 1e-3 and 0.5 < errors["decoupled"], errors
assert 0.29 < value(nothing) < 0.31 and 1.28 < value(designed) < 1.48  # better than the best published, 1.28
assert passing[1] > 3 * passing[0] and rooms.charges(designed).sum() < 0.2
"""

STATE_A_PRICE = """
assert abs(reference - 0.5) < 1e-6 and 0.80 < best < optimum < 0.90
assert ticked.sum() > 0 and all(len(set(row)) == 256 for row in texts)
assert share["bilevel"].min() > 0.95, share
assert share["iterated RLHF"].max() < 0.96 and share["iterated RLHF"][-1].max() < 0.05, share
assert np.all(np.diff(kl.mean(axis=1)) < 0) and np.all(np.abs(marginal / prices - 1) < 0.3), (kl, marginal)
gains = [(float(row.min()) - 0.5) / (limit[0] - 0.5) for row, limit in zip(utility, others)]
assert min(gains) > 0.9, gains
"""

LABEL_IT_YOURSELF = """
assert len(queue.votes()) == 64 and len(policies) == 9 and not queue.counts()["left"] == 0
answers = np.array([each[1] for each in map(frequencies, policies)])  # right, wrong, that depends, no idea
assert 0.25 < answers[0, 0] < 0.35 and answers[-1, 0] > 0.6 and answers[-1, 1] < 0.15, answers
assert win_rate > 0.7 and 0.5 < kl < 3.0, (win_rate, kl)
"""

# These hold for any model, however little it learns.
ALIGN_A_MODEL = """
assert len(steps) == STEPS and {row["labels"] for row in steps} == {len(TRAINING) // 2 * PAIRS}
assert [row["step"] for row in evaluations] == list(range(0, STEPS + 1, EVALUATE_EVERY))
assert all(np.isfinite(list(row.values())).all() for row in evaluations + steps)
assert happiness("Happy, happy and SAD, but fun.") == 2.0 and happiness("unhappy") == 0.0
assert happier([""] * 9, ["fun play kind friends"] * 9, ["sad mad"] * 9).all()

log_prob = lambda params: np.asarray(reference_log_prob(params, fresh_prompts, after)).sum(axis=1)
np.testing.assert_allclose(token_log_ratios.sum(axis=1), log_prob(aligned) - log_prob(weights), atol=1e-3)
assert abs(log_ratios(before)).max() < 1e-4 and abs(token_log_ratios[np.asarray(after.mask)]).max() > 1e-4
assert abs(evaluations[0]["kl"]) < 1e-3 and abs(evaluations[0]["learned reward"]) < 1e-6
assert evaluation.pairs == len(labels) == len(FRESH) * STORIES and labels.mean() == controlled.raw_rate
assert abs(best_by_happiness.gold[0] - pool.mean()) < 1e-9
assert np.all(best_by_reward.gold < best_by_happiness.gold + 1e-9)
assert pool.shape == (len(FRESH), POOLS * STORIES) and np.all(np.diff(best_by_happiness.gold) > -1e-9)
assert max(frequency_after.values()) <= 1 and 0 <= old.min() and sum(frequency_before.values()) > 1
assert jax.tree.all(jax.tree.map(lambda left, right: bool(jnp.all(left == right)), loaded, aligned))
assert reloaded_texts == texts_after and kl_target(STEPS) == TARGET_KL
"""

# What the text says of the pretrained model, from a full run.
ALIGNED = """
assert 0.72 < low < labels.mean() < 0.92 and abs(controlled.rate - labels.mean()) < 0.03
assert 3.0 < token_log_ratios.sum(axis=1).mean() < 5.5 and gain > happiness_before.std()
assert TARGET_KL < max(row["kl"] for row in evaluations) < TARGET_KL + 2
assert np.argmax([row["learned reward"] for row in evaluations]) == len(evaluations) - 1
assert lengths_after.mean() < lengths_before.mean()
assert np.sum(lengths_after == MAX_NEW_TOKENS) < np.sum(lengths_before == MAX_NEW_TOKENS)
assert min(frequency_after[word] - 2 * frequency_before[word] for word in ("play", "friends", "loved")) > 0
assert len(frequency_after) < len(frequency_before)
assert evaluation.accuracy > 0.8 and evaluation.calibration_error < 0.1
assert abs(slope * (learned_after.mean() - learned_before.mean()) - gain) < 1
behind = best_by_happiness.gold - best_by_reward.gold
assert behind[-1] == max(behind) > 1
assert best_by_happiness.gold[-1] - pool.mean() > 1.3 * gain and max(best_by_reward.gold) - pool.mean() > gain
"""

VALUES = {
    "align_a_model": ALIGN_A_MODEL,
    "first_steps": FIRST_STEPS,
    "four_rooms": FOUR_ROOMS,
    "label_it_yourself": LABEL_IT_YOURSELF,
    "state_a_price": STATE_A_PRICE,
    "the_method": THE_METHOD,
}
PICTURES = {"align_a_model": 5, "first_steps": 2, "four_rooms": 3, "label_it_yourself": 1, "state_a_price": 1}
PICTURES |= {"the_method": 6}
# Appended to the cell `settings` of a notebook whose full run takes minutes.
SHORT = {"align_a_model": "STEPS, EVALUATE_EVERY, PAIRS, MAX_NEW_TOKENS, STORIES, POOLS = 12, 4, 2, 12, 4, 2"}
each_notebook = pytest.mark.parametrize("name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def own_kernel(folder):
    """Returns a kernel manager whose only `python3` is this test's interpreter with the package that this test imports."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "env": {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")])),
            "IPYTHONDIR": str(folder / "ipython"),
        },
    }
    home = folder / "kernels" / "python3"
    home.mkdir(parents=True)
    (home / "kernel.json").write_text(json.dumps(spec))
    specs = KernelSpecManager(kernel_dirs=[str(home.parent)], ensure_native_kernel=False)
    return jupyter_client.AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The directory of a random Llama with a vocabulary of a few words and a line break, for `align_a_model`."""
    directory = tmp_path_factory.mktemp("model")
    words = ("<s>", "</s>", "<unk>", "\n", "the", "dog", "saw", "happy", "play", "friends", "sad", "lost")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    shape = DecoderConfig(len(words), 16, 1, 2, 1, 8, 16, context_length=64)
    params = decoder(shape).init(jax.random.key(0))
    save_decoder(directory, shape, params, special=SpecialIds(bos=0, eos=(1,)), tokenizer=tokenizer)
    return directory


def execute(notebook, folder, *, timeout=300):
    work = folder / "work"
    work.mkdir()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook, km=own_kernel(folder), timeout=timeout, resources={"metadata": {"path": str(work)}}
    )
    client.execute(cleanup_kc=True)  # by default, a kernel manager that is passed in keeps running
    assert list(work.iterdir()) == []  # the notebook writes no files
    return notebook


@pytest.mark.parametrize(
    "name",
    [
        # The first notebook that a newcomer opens is always tested.
        pytest.param(path.stem, marks=() if path.stem == "first_steps" else pytest.mark.slow)
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)
def test_a_notebook_runs_and_its_values_are_right(name, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JAXRLHF_MODEL", str(tiny_model))
    monkeypatch.setenv("JAXRLHF_SIMULATED_PERSON", "1")
    notebook = read(name)
    for cell in notebook.cells:
        if cell.id == "settings" and name in SHORT:
            cell.source += "\n" + SHORT[name]
    stored = {cell.id: len(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    interpreter = "import sys; print(sys.executable)"
    notebook.cells += [nbformat.v4.new_code_cell(VALUES[name]), nbformat.v4.new_code_cell(interpreter)]
    executed = execute(notebook, tmp_path)
    assert executed.cells[-1].outputs[0].text.strip() == sys.executable
    kinds = {output.output_type for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs}
    assert "error" not in kinds
    assert {cell.id: bool(cell.outputs) for cell in executed.cells if cell.id in stored} == {
        cell: count > 0 for cell, count in stored.items()
    }


@pytest.mark.slow
def test_a_pretrained_model_is_aligned_as_the_text_says(tmp_path, monkeypatch):
    if not STORIES.is_dir():
        pytest.skip(f"the pretrained model is missing: {STORIES} does not exist")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JAXRLHF_MODEL", str(STORIES))
    notebook = read("align_a_model")
    notebook.cells += [nbformat.v4.new_code_cell(values) for values in (ALIGN_A_MODEL, ALIGNED)]
    execute(notebook, tmp_path, timeout=1800)


def test_a_missing_model_is_reported_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JAXRLHF_MODEL", str(tmp_path / "nowhere"))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="nowhere is no directory: set JAXRLHF_MODEL to"):
        execute(read("align_a_model"), tmp_path)


def test_a_failing_cell_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute(notebook, tmp_path)


@each_notebook
def test_a_saved_notebook_is_complete_and_without_traces_of_a_machine(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", cell_id) for cell_id in ids), ids
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == PICTURES[name] and all(len(picture) < 100_000 for picture in pictures)
    for output in outputs:
        assert output.output_type in ("stream", "display_data")
        assert output.get("name") != "stderr"
    texts = [output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs]
    text = "\n".join([cell.source for cell in notebook.cells] + texts)
    assert not re.search(r"/(home|tmp|work|root|usr|Users)/|[A-Z]:\\", text)


def test_every_notebook_begins_by_installing_the_library_where_it_is_missing(tmp_path, monkeypatch):
    """For Colab: the same cell in each, which does nothing where the library is there."""
    (source,) = {
        cell.source for path in NOTEBOOKS.glob("*.ipynb") for cell in read(path.stem).cells if cell.id == "install"
    }
    assert all([cell.id for cell in read(path.stem).cells][1] == "install" for path in NOTEBOOKS.glob("*.ipynb"))
    installed = []
    monkeypatch.setattr("subprocess.run", lambda command, check: installed.append(command[-1]))
    monkeypatch.chdir(NOTEBOOKS)
    exec(source, {})
    assert installed == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: name)
    exec(source, {})
    assert installed == [f"jaxrlhf[cuda] @ {NOTEBOOKS.parent.as_uri()}"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("JAXRLHF_SOURCE", "git+https://example.org/a/repository")
    exec(source, {})
    assert installed[1] == "jaxrlhf @ git+https://example.org/a/repository"
    monkeypatch.delenv("JAXRLHF_SOURCE")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="set SOURCE to"):
        exec(source, {})
