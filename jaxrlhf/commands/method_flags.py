"""Which flags each method of `jaxrlhf align` reads; others are refused by name."""

from typing import Any, Literal

from jaxrlhf.commands.flags import refuse_unused

MethodName = Literal[
    "bilevel",
    "implicit-bilevel",
    "iterated",
    "rloo",
    "grpo",
    "ppo",
    "online-dpo",
    "online-ipo",
    "sail",
    "label-gradient",
]

_MIXTURE = ("rewards", "reward_network", "reward_weights", "weights_learning_rate")
_REWARD = ("beta", "from_preferences", "mistakes", "reward", "reward_learning_rate", *_MIXTURE)
READS: dict[str, tuple[str, ...]] = {
    "bilevel": (
        *_REWARD,
        "estimator",
        "learn_scale",
        "relative_sigma",
        "scale_learning_rate",
        "tangent_learning_rate",
        "utility_weight",
    ),
    "implicit-bilevel": ("beta", "utility_weight"),
    "iterated": _REWARD,
    "rloo": _REWARD,
    "grpo": _REWARD,
    "ppo": (*_REWARD, "critic_learning_rate"),
    "online-dpo": ("beta", "from_preferences"),
    "online-ipo": ("beta", "from_preferences"),
    "sail": ("beta",),
    "label-gradient": (),
}
"""Of the settings that not every method reads, those that one does. All others are read by every method: `kl_price` is
at least the price of KL in the score of an evaluation."""


def check_method(config: Any) -> None:
    """Checks the settings of methods and of kept labels, of `Align`.

    Raises:
        ValueError: a flag is given that the method, or the run without another flag, does not read; or two flags exclude
            each other.
    """
    known = {name for reads in READS.values() for name in reads}
    # In the order of the command's own flags.
    unused = [name for name in vars(config) if name in known.difference(READS[config.method])]
    refuse_unused(config, unused, f"with --method {config.method}")
    if config.method == "label-gradient" and not config.kl_price:
        raise ValueError(
            "--method label-gradient needs a positive --kl-price: nothing else holds its policy near the reference."
        )
    if not config.reuse:
        refuse_unused(config, ["kept_labels", "from_preferences"], "without --reuse")
    elif config.kept_labels < config.batch_size * config.pairs:
        raise ValueError(
            f"--kept-labels {config.kept_labels} has no room for the {config.batch_size * config.pairs} pairs of one step."
        )
    if config.rewards and config.from_preferences is not None:
        raise ValueError(
            "--from-preferences does not apply with --rewards, whose scores its pairs do not have; leave it out."
        )
    if config.learn_scale and config.target_kl is not None:
        raise ValueError("--learn-scale follows --kl-price and --target-kl a KL; give one of the two.")
    if config.labels_per_step is not None and config.labels_per_step > config.batch_size * config.pairs:
        raise ValueError(
            f"--labels-per-step {config.labels_per_step} is more than the {config.batch_size * config.pairs} pairs of a "
            "step, --batch-size times --pairs."
        )
