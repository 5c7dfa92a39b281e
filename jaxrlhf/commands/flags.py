"""Checks of a command's flags before anything is read: ranges, paths that are no local ones, flags that do not apply."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxrlhf.training.paths import check_local

AT_LEAST = {
    "best_of": 1,
    "checkpoint_steps": 1,
    "completions": 1,
    "evaluation_answers": 1,
    "evaluations": 0,
    "heads": 1,
    "judge_tokens": 1,
    "keep_best": 0,
    "layers": 1,
    "kept_labels": 1,
    "labels_per_step": 1,
    "lora_rank": 0,
    "max_length": 2,
    "max_new_tokens": 1,
    "max_prompt": 1,
    "number": 1,
    "pairs": 1,
    "patience": 1,
    "prompts": 1,
    "reuse": 0,
    "seed": 0,
    "steps": 1,
    "width": 1,
}
"""Smallest values of flags that are whole numbers."""
NOT_NEGATIVE = (
    "centre",
    "critic_learning_rate",
    "expert_balance",
    "gamma",
    "judge_temperature",
    "kl_price",
    "learning_rate",
    "policy_learning_rate",
    "reward_learning_rate",
    "scale_learning_rate",
    "tangent_learning_rate",
    "temperature",
    "ties",
    "utility_weight",
    "weight_decay",
    "weights_learning_rate",
)
POSITIVE = (
    "annotator_timeout",
    "beta",
    "checkpoint_minutes",
    "epochs",
    "largest_gradient",
    "lora_alpha",
    "relative_sigma",
    "target_kl",
)
LARGEST_SEED, LARGEST = 2**32 - 1, 2**31 - 1
"""Largest seed, and largest value of other whole numbers: arrays hold 32 bits."""


def flag(name: str) -> str:
    """Returns the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def check_flags(config: Any) -> None:
    """Checks each setting of a command for itself.

    Raises:
        ValueError: a number is out of range or not finite, or a path is an address such as `gs://bucket/run`.
    """
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, pathlib.PurePath) or (name in ("data", "from_preferences") and isinstance(part, str)):
                check_local(part, flag(name))
                _check_name(part, name)
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"{flag(name)} must be a finite number, got {value:g}.")
        if name in AT_LEAST and value < AT_LEAST[name]:
            raise ValueError(f"{flag(name)} must be at least {AT_LEAST[name]}, got {value}.")
        if name in NOT_NEGATIVE and value < 0:
            raise ValueError(f"{flag(name)} must not be negative, got {value:g}.")
        if name in POSITIVE and not value > 0:
            raise ValueError(f"{flag(name)} must be positive, got {value:g}.")
        if name == "held_out" and not 0 <= value < 1:
            raise ValueError(f"--held-out must lie in [0, 1), got {value:g}.")
        if name == "top_p" and not 0 < value <= 1:
            raise ValueError(f"--top-p must lie in (0, 1], got {value:g}.")
        largest = LARGEST_SEED if name == "seed" else LARGEST
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{flag(name)} must be at most {largest}, got {value}.")


def refuse_unused(config: Any, names: Sequence[str], reason: str) -> None:
    """Refuses settings that differ from their defaults and would be ignored.

    Args:
        config: of the command.
        names: of settings.
        reason: when they are ignored, such as "with --reward".

    Raises:
        ValueError: naming the flags.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [flag(name) for name in names if getattr(config, name) != defaults[name]]
    if given:
        verb = "does" if len(given) == 1 else "do"
        raise ValueError(
            f"{' and '.join(given)} {verb} not apply {reason}; leave {'it' if len(given) == 1 else 'them'} out."
        )


def _check_name(path: str | pathlib.PurePath, name: str) -> None:
    first = pathlib.PurePath(path).parts[:1]
    if first and first[0].startswith("~") and not pathlib.Path(first[0]).exists():
        raise ValueError(f"{flag(name)} {path} begins with ~, which the shell has not replaced; write the folder out.")
    # Libraries that read tokenizers and records take names in UTF-8 only.
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{flag(name)} {str(path)!r} is a name that is not UTF-8; give another.") from None
    if "\0" in str(path):
        raise ValueError(f"{flag(name)} {str(path)!r} holds a zero byte, which no name may; give another.")
