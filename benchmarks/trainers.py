"""One training step of each peer: of TRL's trainers, of Tunix's, and of a plain torch loop. All return the loss.

TRL's and Tunix's are the steps that their `train` takes, without its data loader, schedule, logging and checkpoints; what
the trainers compute for their logs within a step is theirs, and stays. AdamW has no weight decay and no clipping anywhere.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.peers import torch_log_probs, tunix_policy
from jaxrlhf.lm.transformer.config import DecoderConfig

Step = Callable[[], float]
"""Takes a step on one and the same batch, and returns the loss before it."""


def torch_loop(model: Any, loss: Callable[[Any], Any], rate: float) -> Step:
    """Returns the step of a plain loop: forward, backward, fused AdamW.

    Args:
        model: trained.
        loss: `(model) -> []`.
        rate: of AdamW.
    """
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)

    def step():
        found = loss(model)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.item()

    return step


def supervised_in_torch(tokens: np.ndarray) -> Callable[[Any], Any]:
    """Returns the loss of all tokens but the first of each row `[N, T]`."""
    import torch

    rows = torch.from_numpy(tokens).long()
    return lambda model: -torch_log_probs(model, rows, 1).mean()


def dpo_in_torch(tokens: np.ndarray, prompt_length: int, reference: np.ndarray, beta: float) -> Callable[[Any], Any]:
    """Returns DPO's loss.

    Args:
        tokens: `[2, B, T]`, the chosen texts first.
        prompt_length: of each text.
        reference: `[2, B]`, log-probabilities of the completions.
        beta: DPO's.
    """
    import torch

    rows, known = torch.from_numpy(tokens).long().flatten(0, 1), torch.from_numpy(reference)

    def loss(model):
        by_text = torch_log_probs(model, rows, prompt_length).sum(dim=-1).view(2, -1)
        chosen, rejected = by_text - known
        return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()

    return loss


def reward_in_torch(tokens: np.ndarray) -> Callable[[Any], Any]:
    """Returns the preference loss of texts `[2, B, T]`, the chosen ones first."""
    import torch

    rows = torch.from_numpy(tokens).long().flatten(0, 1)

    def loss(model):
        chosen, rejected = model(input_ids=rows, use_cache=False).logits.view(2, -1)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    return loss


def trl_settings(kind: Any, rate: float, **more: Any) -> Any:
    """Returns a configuration of TRL's with everything off that ours does not do.

    Args:
        kind: TRL's class of configurations.
        rate: of AdamW, constant.
        more: of that class.
    """
    import datasets  # pyright: ignore[reportMissingImports]

    datasets.disable_progress_bars()
    return kind(
        tempfile.mkdtemp(prefix="trl-"),
        learning_rate=rate,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )


def trl_step(trainer: Any, batch: Any) -> Step:
    """Returns a trainer's step on a batch as its collator would make it."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        given = dict(batch) if isinstance(batch, dict) else batch
        loss = trainer.training_step(trainer.model, given, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return step


def trl_tokenizer(directory: pathlib.Path) -> Any:
    """Returns the tokenizer that TRL wants beside a model."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def trl_supervised(model: Any, directory: pathlib.Path, tokens: np.ndarray, rate: float) -> Step:
    """Returns the step of TRL's `SFTTrainer`."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(tokens).long()
    trainer = SFTTrainer(
        model,
        args=trl_settings(SFTConfig, rate),
        train_dataset=Dataset.from_dict({"text": ["Once", "upon"]}),
        processing_class=trl_tokenizer(directory),
    )
    return trl_step(trainer, {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows})


def trl_dpo(
    model: Any,
    directory: pathlib.Path,
    tokens: np.ndarray,
    prompt_length: int,
    reference: np.ndarray,
    *,
    beta: float,
    rate: float,
) -> Step:
    """Returns the step of TRL's `DPOTrainer` with log-probabilities of the reference at hand; as `dpo_in_torch`."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(tokens).long().flatten(0, 1)
    completion = torch.ones_like(rows)
    completion[:, :prompt_length] = 0
    trainer = DPOTrainer(
        model,
        args=trl_settings(DPOConfig, rate, beta=beta, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_dict({"prompt": ["Once"] * 2, "chosen": [" upon"] * 2, "rejected": [" a"] * 2}),
        processing_class=trl_tokenizer(directory),
    )
    chosen, rejected = torch.from_numpy(reference)
    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "completion_mask": completion}
    return trl_step(trainer, given | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})


def trl_reward(model: Any, directory: pathlib.Path, tokens: np.ndarray, rate: float) -> Step:
    """Returns the step of TRL's `RewardTrainer`; as `reward_in_torch`."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(tokens).long().flatten(0, 1)
    trainer = RewardTrainer(
        model,
        args=trl_settings(RewardConfig, rate),
        train_dataset=Dataset.from_dict({"chosen": ["Once upon"] * 2, "rejected": ["Once a"] * 2}),
        processing_class=trl_tokenizer(directory),
    )
    return trl_step(trainer, {"input_ids": rows, "attention_mask": torch.ones_like(rows)})


def tunix_step(trainer: Any, example: Any) -> Step:
    """Returns a trainer's compiled step on a prepared example."""
    compiled, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    return lambda: float(jax.block_until_ready(compiled(example))[0])


def tunix_supervised(model: Any, tokens: np.ndarray, rate: float) -> Step:
    """Returns the step of Tunix's `PeftTrainer`, all weights trained."""
    from tunix.rl import common  # pyright: ignore[reportMissingImports]
    from tunix.sft import peft_trainer  # pyright: ignore[reportMissingImports]

    mask = jnp.ones(tokens.shape, bool)
    example = {
        "input_tokens": jnp.asarray(tokens),
        "input_mask": mask,
        "positions": common.build_positions_from_mask(mask),
        "attention_mask": common.make_causal_attn_mask(mask),
    }
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000)
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(rate, weight_decay=0.0), settings)
    return tunix_step(trainer, example)


def tunix_dpo(
    directory: pathlib.Path, shape: DecoderConfig, tokens: np.ndarray, prompt_length: int, *, beta: float, rate: float
) -> Step:
    """Returns the step of Tunix's `DPOTrainer`; the reference's log-probabilities are found before; as `dpo_in_torch`."""
    from tunix.sft.dpo import dpo_trainer  # pyright: ignore[reportMissingImports]

    model, reference = tunix_policy(directory, shape), tunix_policy(directory, shape)
    settings = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1_000_000, beta=beta)
    trainer = dpo_trainer.DPOTrainer(model, reference, optax.adamw(rate, weight_decay=0.0), settings)
    prompts, (chosen, rejected) = tokens[0, :, :prompt_length], tokens[:, :, prompt_length:]
    ones = functools.partial(np.ones_like, dtype=bool)
    given = dpo_trainer.TrainingInput(
        prompt_ids=prompts,
        prompt_mask=ones(prompts),
        chosen_ids=chosen,
        chosen_mask=ones(chosen),
        rejected_ids=rejected,
        rejected_mask=ones(rejected),
    )
    return tunix_step(trainer, trainer._prepare_inputs(given))
