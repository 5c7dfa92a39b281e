"""The chain of `docs/chain.md` from its files: settings that the commands take, and the whole of it on a tiny model."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jaxrlhf.commands.configuration import parse
from jaxrlhf.commands.main import COMMANDS, run_command

CHAIN = pathlib.Path(__file__).parents[2] / "examples" / "chain"
STAGES = ("sft", "reward", "align", "evaluate")


def load(name):
    specification = importlib.util.spec_from_file_location(name, CHAIN / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", STAGES)
def test_the_files_are_settings_of_their_commands(name):
    config = parse(COMMANDS[name][0], ["--config", str(CHAIN / f"{name}.yaml")], name)
    given = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default}
    assert {"data", "policy"} <= given
    if name != "evaluate":
        assert config.lora_rank == 8 and config.run == f"chain-{name}"


def test_the_annotator_prefers_the_shorter_answer():
    assert load("answers").brief(["x", "x"], ["one two", " one\n"]) == [-2.0, -1.0]


@pytest.mark.slow
def test_the_chain_of_a_tiny_chat_model_ends_in_transformers_and_peft(lay_out, tmp_path, monkeypatch):
    """Each stage from its file, through the chat template; the export names the end of a turn, and both loads agree."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    base = lay_out(tmp_path / "base", "config", "own-line", model_type="llama")
    settings = json.loads((base / "config.json").read_text())
    settings |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 8}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(base)
    source, lines = np.random.default_rng(0), []
    for _ in range(80):
        prompt = [{"role": "user", "content": f"{source.integers(100)} or {source.integers(100)}?"}]
        answers = {"chosen": "No.", "rejected": "Yes, it is as you say."}
        turns = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
        lines.append(json.dumps({"prompt": prompt} | turns))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(CHAIN))
    small = ["--data", "pairs.jsonl", "--held-out", "0.2"]
    for name in STAGES:
        further = {
            "sft": ["--policy", "base", "--steps", "3"],
            "reward": ["--steps", "3"],
            "align": ["--steps", "2", "--max-new-tokens", "8", "--evaluation-answers", "4"],
            "evaluate": ["--prompts", "4", "--max-new-tokens", "8"],
        }[name]
        run_command(name, ["--config", str(CHAIN / f"{name}.yaml"), *small, *further])
    run_command("export", ["--source", "runs/chain-align", "--to", "exported"])
    merged = transformers.AutoModelForCausalLM.from_pretrained("exported").eval()
    ends = merged.generation_config.eos_token_id
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    assert tokenizer.convert_tokens_to_ids("<end>") in ends
    tokens = torch.tensor([tokenizer("user: hello")["input_ids"]])
    # The policy of align was trained on the merged model of sft, which is the base of its adapter.
    adapter = pathlib.Path("runs/chain-align/policy/adapter")
    start = peft.PeftConfig.from_pretrained(adapter).base_model_name_or_path
    adapted = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(start), adapter).eval()
    with torch.no_grad():
        np.testing.assert_allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-5)
    assert (tmp_path / "exported" / "README.md").is_file()
