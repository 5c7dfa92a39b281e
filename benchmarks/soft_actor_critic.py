"""Environment steps a second with learning: soft actor-critic on Pendulum, and a torch loop.

    .venv/bin/python -m benchmarks.soft_actor_critic

The torch loop is written as one usually is: Gymnasium's environment in numpy, a replay in numpy, one gradient step of
critics, policy and temperature an environment step. Both have the same networks, batch, replay and order of updates, and
before timing their critic losses and the critics after one step are compared on the same weights and batch. Rounds
alternate. Compilation is not counted. Needs the extras `control` and `benchmarks`.
"""

import argparse
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf.control import soft_policies
from jaxrlhf.control.collection import Experience
from jaxrlhf.control.replay import add, empty
from jaxrlhf.control.soft_actor_critic import first_learned, gradient_steps, soft_actor_critic, true_reward
from jaxrlhf.mdp.environments import gymnax_environment

OBSERVED, ACTIONS, BOUND, LIMIT = 3, 1, 2.0, 200
GAMMA, RATE, STEP = 0.99, 0.005, 1e-3
CAPACITY = 20_000


def first_layers(key: jax.Array, inputs: int, width: int, outputs: int) -> list:
    """Returns weights and biases of two hidden layers."""
    sizes = (inputs, width, width, outputs)
    keys = jax.random.split(key, 3)
    return [
        (jax.random.normal(keys[number], (sizes[number], sizes[number + 1])) / sizes[number] ** 0.5,
         jnp.zeros(sizes[number + 1]))
        for number in range(3)
    ]  # fmt: skip


def forward(layers: list, inputs: jax.Array) -> jax.Array:
    """Returns the outputs of a network with ReLUs."""
    for number, (weight, bias) in enumerate(layers):
        inputs = inputs @ weight + bias
        inputs = jax.nn.relu(inputs) if number < 2 else inputs
    return inputs


def make_ours(width: int, batch: int) -> tuple[Any, Any]:
    """Returns the soft policy and the algorithm."""
    import gymnax

    environment = gymnax_environment(*gymnax.make("Pendulum-v1"))
    soft = soft_policies.continuous(
        lambda policy, observations: jnp.split(forward(policy, observations), 2, axis=-1),
        lambda critic, observations, actions: forward(critic, jnp.concatenate([observations, actions], -1))[..., 0],
        environment,
    )
    algorithm = soft_actor_critic(
        environment, soft, lambda key: first_layers(key, OBSERVED + ACTIONS, width, 1), optimizer=optax.adam(STEP),
        gamma=GAMMA, target_rate=RATE, capacity=CAPACITY, batch_size=batch, random_steps=batch, episode_steps=LIMIT,
    )  # fmt: skip
    return soft, algorithm


class TorchLoop:
    """Soft actor-critic in torch, on Gymnasium's Pendulum."""

    def __init__(self, width: int, batch: int, policy: list, critics: list):
        """Takes the sizes and the weights of the networks."""
        import gymnasium
        import torch

        self.torch, self.batch = torch, batch
        self.policy, self.critics = self._network(policy), [self._network(critic) for critic in critics]
        self.targets = [self._network(critic) for critic in critics]
        self.log_temperature = torch.tensor(float(np.log(0.1)), requires_grad=True)
        critic_parameters = [parameter for critic in self.critics for parameter in critic.parameters()]
        self.critic_optimizer = torch.optim.Adam(critic_parameters, lr=STEP)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=STEP)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=STEP)
        self.environment = gymnasium.make("Pendulum-v1", max_episode_steps=LIMIT)
        self.observation, _ = self.environment.reset(seed=0)
        widths = (OBSERVED, ACTIONS, 1, OBSERVED, 1)
        self.replay = [np.zeros((CAPACITY, width), np.float32) for width in widths]
        self.added, self.draws = 0, np.random.default_rng(0)

    def _network(self, layers: list) -> Any:
        torch, modules = self.torch, []
        for number, (weight, bias) in enumerate(layers):
            module = torch.nn.Linear(*weight.shape)
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(np.array(weight).T))
                module.bias.copy_(torch.from_numpy(np.array(bias)))
            modules += [module, torch.nn.ReLU()] if number < 2 else [module]
        return torch.nn.Sequential(*modules)

    def act(self, observations: Any) -> tuple[Any, Any]:
        """Returns actions and their log-probabilities in units of the scaled action."""
        torch = self.torch
        mean, log_deviation = self.policy(observations).chunk(2, dim=-1)
        normal = torch.distributions.Normal(mean, log_deviation.clamp(-5.0, 2.0).exp())
        inner = normal.rsample()
        squash = 2.0 * (np.log(2.0) - inner - torch.nn.functional.softplus(-2.0 * inner))
        return BOUND * torch.tanh(inner), (normal.log_prob(inner) - squash).sum(-1, keepdim=True)

    def smaller(self, critics: list, observations: Any, actions: Any) -> Any:
        """Returns the smaller value of the critics."""
        inputs = self.torch.cat([observations, actions], dim=-1)
        return self.torch.minimum(*(critic(inputs) for critic in critics))

    def update(self, observations: Any, actions: Any, rewards: Any, following: Any, terminated: Any) -> float:
        """Takes one gradient step of critics, policy and temperature; returns the critics' loss."""
        torch = self.torch
        temperature = self.log_temperature.exp().detach()
        with torch.no_grad():
            next_actions, log_prob = self.act(following)
            value = self.smaller(self.targets, following, next_actions) - temperature * log_prob
            target = rewards + GAMMA * (1.0 - terminated) * value
        inputs = torch.cat([observations, actions], dim=-1)
        loss = torch.stack([(critic(inputs) - target).square().mean() / 2.0 for critic in self.critics]).sum()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        chosen, log_prob = self.act(observations)
        policy_loss = (temperature * log_prob - self.smaller(self.critics, observations, chosen)).mean()
        self.policy_optimizer.zero_grad()
        policy_loss.backward()
        self.policy_optimizer.step()
        temperature_loss = self.log_temperature.exp() * (-log_prob.mean().detach() + ACTIONS)
        self.temperature_optimizer.zero_grad()
        temperature_loss.backward()
        self.temperature_optimizer.step()
        with torch.no_grad():
            for target_net, critic in zip(self.targets, self.critics, strict=True):
                for old, new in zip(target_net.parameters(), critic.parameters(), strict=True):
                    old.lerp_(new, RATE)
        return float(loss.detach())

    def run(self, steps: int) -> None:
        """Takes environment steps, each followed by a gradient step once the replay holds a batch."""
        torch = self.torch
        for _ in range(steps):
            with torch.no_grad():
                action = self.act(torch.from_numpy(self.observation)[None])[0][0].numpy()
            following, reward, terminated, truncated, _ = self.environment.step(action)
            row = (self.observation, action, reward, following, float(terminated))
            for array, value in zip(self.replay, row, strict=True):
                array[self.added % CAPACITY] = value
            self.added += 1
            self.observation = self.environment.reset()[0] if terminated or truncated else following
            if self.added > self.batch:
                rows = self.draws.integers(0, min(self.added, CAPACITY), self.batch)
                self.update(*(torch.from_numpy(array[rows]) for array in self.replay))


def check(width: int, batch: int, soft: Any, learned: Any, torch_loop: TorchLoop) -> float:
    """Compares one step on a batch in which every step ends the task, so that no drawn action enters the targets.

    Returns:
        The largest difference of the critics' weights after it.

    Raises:
        SystemExit: losses or critics differ.
    """
    keys = jax.random.split(jax.random.key(3), 4)
    ones = jnp.ones((1, batch))
    steps = Experience(
        observations=jax.random.normal(keys[0], (1, batch, OBSERVED)),
        actions=jax.random.uniform(keys[1], (1, batch, ACTIONS), minval=-BOUND, maxval=BOUND),
        next_observations=jax.random.normal(keys[2], (1, batch, OBSERVED)),
        reward=jax.random.normal(keys[3], (1, batch)),
        terminated=ones, ended=ones, known=ones,
    )  # fmt: skip
    # One row of the replay: every draw is that row, in both.
    one = jax.tree.map(lambda leaf: leaf[:, :1], steps)
    replay = add(empty(one, capacity=1), one)
    step = gradient_steps(soft, true_reward, optax.adam(STEP), gamma=GAMMA, target_rate=RATE, batch_size=batch)
    moved, info = jax.jit(step)(jax.random.key(0), (), learned, replay)
    rows = [np.repeat(np.array(leaf)[0].reshape(1, -1), batch, axis=0) for leaf in (
        one.observations, one.actions, one.reward, one.next_observations, one.terminated)]  # fmt: skip
    loss = torch_loop.update(*map(torch_loop.torch.from_numpy, rows))
    difference = max(
        float(np.max(np.abs(np.array(leaf)[number].T - module.weight.detach().numpy())))
        for number, critic in enumerate(torch_loop.critics)
        for (leaf, _), module in zip(moved.critics, [critic[0], critic[2], critic[4]], strict=True)
    )
    if not np.isclose(loss, info.critic_loss, rtol=1e-4) or difference > 1e-4:
        raise SystemExit(f"The critics differ: losses {loss} and {info.critic_loss}, weights by up to {difference}.")
    return difference


def main(width: int, batch: int, steps: int, seeds: int, rounds: int) -> None:
    """Checks, then times rounds in turn, and prints medians."""
    soft, algorithm = make_ours(width, batch)
    policy_key, critic_key = jax.random.split(jax.random.key(0))
    policy = first_layers(policy_key, OBSERVED, width, 2 * ACTIONS)
    make_critic = lambda key: first_layers(key, OBSERVED + ACTIONS, width, 1)  # noqa: E731
    learned = first_learned(policy, critic_key, make_critic, optax.adam(STEP), temperature=0.1)
    critics = [jax.tree.map(lambda leaf, number=number: leaf[number], learned.critics) for number in range(2)]
    difference = check(width, batch, soft, learned, TorchLoop(width, batch, policy, critics))
    print(f"After one step the critics' weights differ by at most {difference:.1e}.")

    def train(key, state):
        keys = jax.random.split(key, steps)
        return jax.lax.scan(lambda state, key: algorithm.step(key, state, None, ()), state, keys)[0]

    runs, torch_loop = {}, TorchLoop(width, batch, policy, critics)
    for count in (1, seeds):
        keys = jax.random.split(jax.random.key(1), count)
        state = jax.jit(jax.vmap(lambda key: algorithm.init(key, (), policy)))(keys)
        compiled = jax.jit(jax.vmap(train)).lower(keys, state).compile()
        runs[f"ours, {count} seed{'s' * (count > 1)}"] = [compiled, keys, compiled(keys, state), count]
    torch_loop.run(batch + 10)
    measured: dict[str, list] = {name: [] for name in ("torch loop", *runs)}
    for _ in range(rounds):
        for name, times in measured.items():
            began, cpu = time.monotonic(), _cpu_seconds()
            if name == "torch loop":
                torch_loop.run(steps)
                count = 1
            else:
                compiled, keys, state, count = runs[name]
                runs[name][2] = jax.block_until_ready(compiled(keys, state))
            times.append((count * steps / (time.monotonic() - began), count * steps / (_cpu_seconds() - cpu)))
    base = np.median(measured["torch loop"], axis=0)
    print("| | steps a second | steps a CPU second | times the torch loop's |\n|---|---|---|---|")
    for name, times in measured.items():
        wall, cpu = np.median(times, axis=0)
        print(f"| {name} | {wall:,.0f} | {cpu:,.0f} | {wall / base[0]:.2f}, CPU {cpu / base[1]:.2f} |")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="Units of a hidden layer.")
    parser.add_argument("--batch", type=int, default=64, help="Steps of a gradient step.")
    parser.add_argument("--steps", type=int, default=2000, help="Environment steps of a round.")
    parser.add_argument("--seeds", type=int, default=8, help="Seeds in one program.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds; the median is printed.")
    main(**vars(parser.parse_args()))
