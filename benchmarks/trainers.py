"""One training step of other libraries: TRL's trainers, Tunix's trainers, and a plain torch loop. Each returns the loss.

For TRL and Tunix it is the step that `train` takes, without the data loader, schedule, logging and checkpoints; metrics
that a trainer computes inside its step are included. AdamW runs without weight decay and without clipping everywhere.
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

from benchmarks.libraries import torch_log_probs, tunix_policy
from jaxrlhf.lm.transformer.config import DecoderConfig

Step = Callable[[], float]
"""Takes one step, always on the same batch, and returns the loss before it."""


def torch_loop(model: Any, loss: Callable[[Any], Any], learning_rate: float) -> Step:
    """Returns the step of a plain torch loop: forward, backward, fused AdamW.

    Args:
        model: to train.
        loss: `(model) -> []`.
        learning_rate: of AdamW.
    """
    import torch

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)

    def step():
        value = loss(model)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def supervised_in_torch(tokens: np.ndarray) -> Callable[[Any], Any]:
    """Returns the mean cross-entropy of every token but the first of each row, for rows `[N, T]`."""
    import torch

    rows = torch.from_numpy(tokens).long()
    return lambda model: -torch_log_probs(model, rows, 1).mean()


def dpo_in_torch(tokens: np.ndarray, prompt_length: int, reference: np.ndarray, beta: float) -> Callable[[Any], Any]:
    """Returns the DPO loss.

    Args:
        tokens: `[2, B, T]`, chosen texts first.
        prompt_length: tokens of each prompt.
        reference: `[2, B]`, the reference's log-probabilities of the completions.
        beta: KL weight of DPO.
    """
    import torch

    rows, reference_log_prob = torch.from_numpy(tokens).long().flatten(0, 1), torch.from_numpy(reference)

    def loss(model):
        log_prob = torch_log_probs(model, rows, prompt_length).sum(dim=-1).view(2, -1)
        chosen, rejected = log_prob - reference_log_prob
        return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()

    return loss


def reward_in_torch(tokens: np.ndarray) -> Callable[[Any], Any]:
    """Returns the Bradley-Terry loss of texts `[2, B, T]`, chosen texts first."""
    import torch

    rows = torch.from_numpy(tokens).long().flatten(0, 1)

    def loss(model):
        chosen, rejected = model(input_ids=rows, use_cache=False).logits.view(2, -1)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    return loss


def trl_settings(config_class: Any, learning_rate: float, **settings: Any) -> Any:
    """Returns a TRL configuration with everything turned off that our step does not do.

    Args:
        config_class: of TRL, such as `DPOConfig`.
        learning_rate: of AdamW, constant.
        settings: further fields of that class.
    """
    import datasets  # pyright: ignore[reportMissingImports]

    datasets.disable_progress_bars()
    return config_class(
        tempfile.mkdtemp(prefix="trl-"),
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def trl_step(trainer: Any, batch: Any) -> Step:
    """Returns a trainer's step on a collated batch."""
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step():
        inputs = dict(batch) if isinstance(batch, dict) else batch  # the step removes keys
        loss = trainer.training_step(trainer.model, inputs, None)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return step


def trl_tokenizer(directory: pathlib.Path) -> Any:
    """Loads the tokenizer that TRL requires, with a padding token."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def trl_supervised(model: Any, directory: pathlib.Path, tokens: np.ndarray, learning_rate: float) -> Step:
    """Returns the step of TRL's `SFTTrainer`."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(tokens).long()
    trainer = SFTTrainer(
        model,
        args=trl_settings(SFTConfig, learning_rate),
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
    learning_rate: float,
) -> Step:
    """Returns the step of TRL's `DPOTrainer` with precomputed reference log-probabilities; arguments as `dpo_in_torch`."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(tokens).long().flatten(0, 1)
    completion = torch.ones_like(rows)
    completion[:, :prompt_length] = 0
    trainer = DPOTrainer(
        model,
        args=trl_settings(DPOConfig, learning_rate, beta=beta, precompute_ref_log_probs=True),
        train_dataset=Dataset.from_dict({"prompt": ["Once"] * 2, "chosen": [" upon"] * 2, "rejected": [" a"] * 2}),
        processing_class=trl_tokenizer(directory),
    )
    chosen, rejected = torch.from_numpy(reference)
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "completion_mask": completion}
    return trl_step(trainer, batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})


def trl_reward(model: Any, directory: pathlib.Path, tokens: np.ndarray, learning_rate: float) -> Step:
    """Returns the step of TRL's `RewardTrainer`; arguments as `reward_in_torch`."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportMissingImports]

    rows = torch.from_numpy(tokens).long().flatten(0, 1)
    trainer = RewardTrainer(
        model,
        args=trl_settings(RewardConfig, learning_rate),
        train_dataset=Dataset.from_dict({"chosen": ["Once upon"] * 2, "rejected": ["Once a"] * 2}),
        processing_class=trl_tokenizer(directory),
    )
    return trl_step(trainer, {"input_ids": rows, "attention_mask": torch.ones_like(rows)})


def tunix_step(trainer: Any, example: Any) -> Step:
    """Returns a Tunix trainer's compiled step on a prepared example."""
    compiled, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
    return lambda: float(jax.block_until_ready(compiled(example))[0])


def tunix_supervised(model: Any, tokens: np.ndarray, learning_rate: float) -> Step:
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
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(learning_rate, weight_decay=0.0), settings)
    return tunix_step(trainer, example)


def tunix_dpo(
    directory: pathlib.Path,
    config: DecoderConfig,
    tokens: np.ndarray,
    prompt_length: int,
    *,
    beta: float,
    learning_rate: float,
) -> Step:
    """Returns the step of Tunix's `DPOTrainer`, reference log-probabilities computed beforehand; as `dpo_in_torch`."""
    from tunix.sft.dpo import dpo_trainer  # pyright: ignore[reportMissingImports]

    model, reference = tunix_policy(directory, config), tunix_policy(directory, config)
    settings = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1_000_000, beta=beta)
    trainer = dpo_trainer.DPOTrainer(model, reference, optax.adamw(learning_rate, weight_decay=0.0), settings)
    prompts, (chosen, rejected) = tokens[0, :, :prompt_length], tokens[:, :, prompt_length:]
    ones = functools.partial(np.ones_like, dtype=bool)
    batch = dpo_trainer.TrainingInput(
        prompt_ids=prompts,
        prompt_mask=ones(prompts),
        chosen_ids=chosen,
        chosen_mask=ones(chosen),
        rejected_ids=rejected,
        rejected_mask=ones(rejected),
    )
    return tunix_step(trainer, trainer._prepare_inputs(batch))
