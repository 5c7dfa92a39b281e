"""Loads what the chain made into transformers, merged and as an adapter of PEFT, and lets it answer.

    python examples/chain/load.py exported runs/chain-align/policy/adapter

The two must agree; an answer must stop at the end of its turn. `pip install transformers peft torch` for this file alone.
"""

import sys
from typing import Any

import peft
import torch
import transformers

QUESTIONS = ("How do I keep bread fresh?", "What is the capital of France?", "Is it safe to mix bleach and vinegar?")


def main(merged: str, adapter: str) -> float:
    """Prints the answers, and whether each stops; returns the largest difference between the two models' logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    base = peft.PeftConfig.from_pretrained(adapter).base_model_name_or_path
    assert base is not None
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()
    ends, largest = whole.generation_config.eos_token_id, 0.0
    for question in QUESTIONS:
        talk = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            first, second = (model(**prompt).logits for model in (whole, adapted))
            written = whole.generate(**prompt, max_new_tokens=96, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        largest = max(largest, float((first - second).abs().max()))
        stopped = int(written[-1]) in (ends if isinstance(ends, list) else [ends])
        print(f"{question}\n  {tokenizer.decode(written, skip_special_tokens=True)!r}")
        print(f"  {len(written)} tokens, {'ended its turn' if stopped else 'not ended'}")
    print(f"largest difference of logits between the merged model and base with adapter: {largest:.1e}")
    return largest


if __name__ == "__main__":
    main(*sys.argv[1:])
