"""Settings of `jaxrlhf align`."""

import dataclasses
import math
import pathlib
from typing import ClassVar, Literal

import tyro

from jaxrlhf.algorithms.methods import METHODS
from jaxrlhf.commands.adapters import AdapterConfig, configured_adapters
from jaxrlhf.commands.annotators import AnnotatorConfig, check_people
from jaxrlhf.commands.data import Format
from jaxrlhf.commands.flags import check_flags, refuse_unused
from jaxrlhf.commands.method_flags import MethodName, check_method, learns_scale
from jaxrlhf.commands.options import Groups
from jaxrlhf.commands.page_annotator import BROWSER
from jaxrlhf.commands.running import RunConfig
from jaxrlhf.training.sharding import parse_mesh

Estimator = Literal["central", "forward", "five_point", "boltzmann", "decoupled"]


@dataclasses.dataclass(frozen=True)
class Align(AnnotatorConfig, AdapterConfig, RunConfig):
    """Trains a policy, and with most methods a reward model, from labels requested during training.

    In each step the policy completes prompts, an annotator compares completions in pairs, and reward and policy are
    updated. By default the reward's gradient accounts for the policy's response to the reward; --method names others.
    """

    GROUPS: ClassVar[Groups] = {
        "main settings": (
            *("policy", "data", "annotator", "score", "reward", "method", "reuse", "steps", "batch_size", "pairs"),
            *("max_new_tokens", "kl_price", "lora_rank"),
        ),
        "data": ("format", "skip_bad", "held_out", "max_prompt", "cut_prompts"),
        "labels": ("from_preferences", "kept_labels", "labels_per_step", "choose", "mistakes", "annotator_timeout"),
        "the trade-off with KL, and the policy's response to the reward": (
            *("beta", "target_kl", "utility_weight", "estimator", "relative_sigma"),
        ),
        "a learned scale, and a mixture of rewards": (
            *("learn_scale", "scale_learning_rate"),
            *("rewards", "reward_weights", "reward_network", "weights_learning_rate"),
        ),
        "learning rates": (
            *(
                "policy_learning_rate",
                "reward_learning_rate",
                "tangent_learning_rate",
                "critic_learning_rate",
                "warmup",
            ),
        ),
        "evaluation and logging": ("evaluations", "evaluation_answers"),
        "devices and memory": ("rollout_dtype",),
    }

    policy: pathlib.Path
    """Model to align, and its reference: a Hugging Face directory, or a run's folder."""
    data: str
    """Prompts: a .jsonl, .parquet or .csv file, a folder of them, a name on a hub as org/name[@revision][:part], or
    hh-rlhf:NAME; of other records only prompts are used."""
    reward: pathlib.Path | None = None
    """Reward model to start from; by default the policy's trunk with a zero head. With --lora-rank its own weights are
    frozen, and its head and an adapter on it are trained."""
    method: MethodName = "bilevel"
    """How labels train the policy. bilevel, iterated, rloo, grpo and ppo learn a reward model from them and follow it;
    implicit-bilevel, online-dpo, online-ipo and sail have the policy's log-ratio for a reward, label-gradient has none."""
    rewards: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A score, `module:function` of (prompts, completions); the reward is then their mixture, with learned weights."""
    reward_weights: tuple[float, ...] = ()
    """Initial weights of --rewards, in reward per standard deviation of each score; by default 0."""
    reward_network: bool = False
    """Adds a reward model, that of --reward or a new one, to the mixture of --rewards."""
    format: Format = "auto"
    """Format of the data; see `jaxrlhf.data`."""
    skip_bad: bool = False
    """Skips unreadable lines and lists them in the report."""
    held_out: float = 0.1
    """Fraction of the prompts held out to compare policies on."""
    steps: int = 100
    """Number of outer steps."""
    batch_size: int = 16
    """Prompts per step, over all devices."""
    pairs: int = 4
    """Pairs of completions per prompt; each costs one label."""
    max_prompt: int = 128
    """Maximum length of a prompt in tokens; longer ones are dropped, or truncated with --cut-prompts."""
    cut_prompts: bool = False
    """Truncates long prompts at the beginning."""
    max_new_tokens: int = 48
    """Maximum length of a completion in tokens."""
    kl_price: float = 0.05
    """What a nat of KL is worth, in win rate against the reference. bilevel learns from it how far the reward is followed,
    unless --beta or --target-kl says so; others take their beta from it. Also the price in an evaluation's score."""
    beta: float | None = None
    """Weight of the KL to the reference, in units of the reward per nat, kept as it is; by default 4 times --kl-price,
    which is the price where a win is as likely as a loss (online-ipo: the price itself)."""
    target_kl: float | None = None
    """KL to the reference in nats to arrive at, over two thirds of the run; --beta is then where its weight starts.
    label-gradient has no beta: --kl-price is moved."""
    labels_per_step: int | None = None
    """Labels per step; the other pairs serve what needs no label. By default every pair has one."""
    choose: Literal["random", "disagreement"] = "random"
    """Which pairs are labelled with --labels-per-step: drawn at random, or those about which reward models that fit the
    kept labels disagree most."""
    mistakes: float | Literal["measured"] | None = None
    """Probability that a preference is a mistake, which the reward's likelihood allows for. By default 0; with --annotator
    browser it is measured, from the pairs that a person labels twice."""
    reuse: int = 0
    """Updates from kept labels per update from fresh ones: of the reward model where the method learns one, else of the
    policy, by importance weights where the method's gradient goes through the distribution of the pairs."""
    kept_labels: int = 10_000
    """Labels kept for --reuse; the oldest are overwritten."""
    from_preferences: str | None = None
    """Pairs with known preferences, as `jaxrlhf reward` reads them, that are among the kept labels from the beginning and
    are learned from once before the first step; needs --reuse."""
    estimator: Estimator | None = None
    """How the reward's gradient accounts for the policy's response to it, with --method bilevel; decoupled ignores it.
    By default boltzmann, whose response does not lag behind the policy, where the scale is learned, and else central."""
    relative_sigma: float = 0.2
    """Perturbation of the finite-difference stencils, sigma / beta."""
    utility_weight: float = 1.0
    """Weight of the coupled utility (win rate minus KL cost) beside the uncoupled likelihood."""
    learn_scale: bool = False
    """Learns the reward's scale from --kl-price although --beta is given, which is then only where it starts."""
    scale_learning_rate: float | None = None
    """Learning rate of the logarithm of a learned scale; by default 0.03."""
    weights_learning_rate: float | None = None
    """Learning rate of the weights of --rewards; by default 0.02. With 0 they stay as given."""
    policy_learning_rate: float | None = None
    """Learning rate of the policy; by default 2e-4, or 1e-3 with adapters."""
    tangent_learning_rate: float | None = None
    """Learning rate of the policy's response to the reward; by default a twentieth of the policy's."""
    reward_learning_rate: float | None = None
    """Learning rate of the reward model; by default 1e-3, or 2e-3 with adapters."""
    critic_learning_rate: float | None = None
    """Learning rate of PPO's critic; by default the reward model's."""
    warmup: int = 10
    """Steps over which the learning rates rise from 0.
    Without it Adam turns the first gradients, tiny because the reward still is, into full steps."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the reference's weights; bfloat16 needs --lora-rank."""
    rollout_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which completions are generated; log-ratios are always float32."""
    evaluations: int = 5
    """Number of evaluations on held-out prompts; the last step is always evaluated."""
    evaluation_answers: int = 64
    """Completions of held-out prompts per evaluation."""
    annotator_timeout: float = 1800.0
    """Time limit in seconds for a function to label or score the pairs of a step; an LLM judge has limits of its own."""


def estimator_of(config: Align) -> Estimator:
    """Returns the estimator of --estimator, or its default."""
    return config.estimator or ("boltzmann" if learns_scale(config) else "central")


def forecasts(config: Align) -> bool:
    """Returns whether a learned reward model alone says which completion of a pair is better, before it is labelled."""
    return METHODS[config.method].learns == "reward" and not config.rewards


def measures_mistakes(config: Align) -> bool:
    """Returns whether people's rate of mistakes is measured, for the reward's likelihood."""
    able = config.annotator == BROWSER and forecasts(config)
    return config.mistakes == "measured" or (config.mistakes is None and able and config.repeats > 0)


def _check_mistakes(config: Align) -> None:
    if config.mistakes == "measured":
        if config.annotator != BROWSER:
            refuse_unused(config, ["mistakes"], "as measured without --annotator browser, which shows pairs twice")
        if not config.repeats:
            raise ValueError("--mistakes measured needs pairs that are shown twice; give a positive --repeats.")
        if not forecasts(config):
            raise ValueError(
                "--mistakes measured needs a reward model alone as the reward; give a number with --rewards."
            )
    elif config.mistakes is not None and not 0 <= config.mistakes < 0.5:
        raise ValueError(f"--mistakes must lie in [0, 0.5), got {config.mistakes:g}.")


def _check_choice(config: Align) -> None:
    if config.choose == "random":
        return
    if config.labels_per_step is None:
        raise ValueError(
            "--choose disagreement chooses the pairs of --labels-per-step, of which there is none; give one."
        )
    if config.labels_per_step == config.batch_size * config.pairs:
        raise ValueError(
            f"--choose disagreement has nothing to choose, as --labels-per-step {config.labels_per_step} is all of a "
            "step's pairs; give fewer labels, or more --pairs."
        )
    if not config.reuse:
        raise ValueError(
            "--choose disagreement compares a step's pairs with the kept labels of --reuse; give at least 1."
        )
    if not forecasts(config):
        without = "with --rewards" if config.rewards else f"with --method {config.method}"
        raise ValueError(f"--choose disagreement needs a reward model alone as the reward; leave it out {without}.")


def check_config(config: Align) -> None:
    """Raises ValueError for settings that are out of range or do not go together."""
    check_flags(config)
    check_method(config)
    configured_adapters(config)
    estimator = estimator_of(config)
    if estimator in ("boltzmann", "decoupled"):
        unused = ["relative_sigma", "tangent_learning_rate"]
        refuse_unused(config, unused, f"with --estimator {estimator}, which unlike central has no stencil")
    split = parse_mesh(config.mesh).get("stencil", 1)
    if split != 1 and (config.method != "bilevel" or estimator in ("boltzmann", "decoupled")):
        without = f"--method {config.method}" if config.method != "bilevel" else f"--estimator {estimator}"
        remedy = " Give --estimator central." if config.method == "bilevel" else ""
        raise ValueError(
            f"--mesh stencil={split} does not apply with {without}, which has no stencil to split.{remedy}"
        )
    if config.learn_scale and estimator == "decoupled":
        raise ValueError(
            "--learn-scale follows the policy's response to the reward, which --estimator decoupled ignores."
        )
    check_people(config)
    _check_mistakes(config)
    _check_choice(config)
    if config.annotator == BROWSER:
        refuse_unused(config, ["keep_best"], "to people, who are not asked to compare policies during a run")
    _check_rewards(config)
    _check_scale(config)
    if config.annotator is not None and ":" not in config.annotator.partition("://")[0] and not config.rewards:
        refuse_unused(config, ["annotator_timeout"], "to an annotator that is no function")
    if config.warmup < 0:
        raise ValueError(f"--warmup must not be negative, got {config.warmup}.")
    pairs = config.batch_size * config.pairs
    if config.microbatches < 1 or pairs % config.microbatches:
        raise ValueError(
            f"--microbatches {config.microbatches} must divide the {pairs} pairs of a step, --batch-size times --pairs."
        )
    for name in ("steps", "batch_size", "pairs", "max_new_tokens", "evaluation_answers"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")


def _check_scale(config: Align) -> None:
    if not learns_scale(config):
        refuse_unused(config, ["scale_learning_rate"], "where no scale is learned from --kl-price")
        return
    if not config.kl_price:
        raise ValueError(
            "--learn-scale with --kl-price 0 finds no scale of the reward large enough; give a positive price."
        )
    if not config.utility_weight:
        raise ValueError("--learn-scale learns from the utility, whose --utility-weight is 0; give a positive one.")


def _check_rewards(config: Align) -> None:
    if not config.rewards:
        refuse_unused(config, ["reward_weights", "reward_network", "weights_learning_rate"], "without --rewards")
        return
    if len(set(config.rewards)) < len(config.rewards):
        raise ValueError(f"--rewards names a function twice: {', '.join(config.rewards)}; give each once.")
    if not config.reward_network:
        unused = ["reward", "reward_learning_rate"]
        refuse_unused(config, unused, "with --rewards, unless --reward-network adds a reward model to the mixture")
    if config.reward_weights and len(config.reward_weights) != len(config.rewards):
        raise ValueError(
            f"--reward-weights gives {len(config.reward_weights)} weights for {len(config.rewards)} --rewards; "
            "give one for each."
        )
    if not all(map(math.isfinite, config.reward_weights)):
        raise ValueError("--reward-weights must be finite numbers.")
    if config.weights_learning_rate == 0 and not any(config.reward_weights) and not config.reward_network:
        raise ValueError(
            "With --weights-learning-rate 0 the reward stays 0, as no weight differs from 0; give --reward-weights."
        )
