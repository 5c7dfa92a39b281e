"""Which flags each method of `jaxrlhf align` reads, others being refused by name, and what its defaults come to."""

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

LOGITS_PER_WIN = 4.0
"""What a small gain in win rate is in the log-odds of labels, the unit of learned rewards: 1 / sigmoid'(0)."""


def learns_scale(config: Any) -> bool:
    """Returns whether the reward's scale is learned from --kl-price: by `bilevel`, where no beta and no KL is given.

    The sum of --rewards with weights set by hand keeps its scale.
    """
    set_by_hand = config.weights_learning_rate == 0 and not config.reward_network
    follows = config.estimator != "decoupled" and config.utility_weight > 0 and not set_by_hand
    stated = config.beta is not None or config.target_kl is not None
    return config.learn_scale or (config.method == "bilevel" and follows and not stated)


def beta_of(config: Any) -> float:
    """Returns the weight of the KL that a run starts with: without --beta, what --kl-price is in the method's units.

    For rewards in the log-odds of labels it is 4 kl_price: along R / beta the win rate gains Var(R) / (4 beta), while it
    is near a half, and the KL Var(R) / beta^2, so that they balance there. IPO's beta is itself in win rate a nat.
    """
    if config.beta is not None:
        return config.beta
    return config.kl_price * (1.0 if config.method == "online-ipo" else LOGITS_PER_WIN)


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
    if "beta" in READS[config.method] and config.beta is None and not config.kl_price:
        raise ValueError(
            "--kl-price 0 says that KL costs nothing, and nothing else holds the policy near the reference; "
            "give a positive price, or a --beta."
        )
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
