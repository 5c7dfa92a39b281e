"""The method by hand: three policies, one penalty gradient, a Python loop (python examples/bilevel_by_hand.py).

A bandit of 5 arms; phi are the rewards of the arms. The upper level wants to win against the reference, by an annotator's
hidden scores, at a price of 0.1 a nat of KL; the lower level maximises E R - beta KL over the policy's logits.
"""

import jax
import jax.numpy as jnp

BETA, PRICE, SIGMA = 0.5, 0.1, 0.05
REFERENCE, GOLD = jax.nn.log_softmax(jnp.array([0.0, 1.0, -1.0, 0.5, 0.0])), jnp.array([1.0, 0.0, 1.5, -1.0, 0.5])
WIN_RATE = jax.nn.sigmoid(GOLD[:, None] - GOLD[None, :]) @ jnp.exp(REFERENCE)  # of each arm, against the reference


def kl(logits):
    """KL(policy || reference) in nats."""
    return jax.nn.softmax(logits) @ (jax.nn.log_softmax(logits) - REFERENCE)


def G(phi, logits):  # noqa: N802
    """Upper objective, minimised: minus the win rate, plus the price of the KL. phi matters through the policy only."""
    return -jax.nn.softmax(logits) @ WIN_RATE + PRICE * kl(logits)


def J(phi, logits):  # noqa: N802
    """Lower objective, maximised: reward less beta KL."""
    return jax.nn.softmax(logits) @ phi - BETA * kl(logits)


def h(phi, logits, tilt):
    """The tilted loss. Phi is the derivative of its minimum over the logits at tilt 0."""
    return tilt * G(phi, logits) - J(phi, logits)


@jax.jit
def penalty_gradient(phi, policies):
    """Grad Phi by a central difference in the tilt, every policy held fixed: first-order gradients only."""
    plus, minus = (jax.grad(h)(phi, policies[tilt], tilt) for tilt in (SIGMA, -SIGMA))
    return (plus - minus) / (2 * SIGMA)


if __name__ == "__main__":
    descend = jax.jit(lambda phi, logits, tilt: logits - jax.grad(h, argnums=1)(phi, logits, tilt))
    phi, policies = jnp.zeros(5), dict.fromkeys((0.0, SIGMA, -SIGMA), REFERENCE)  # tilt 0 is deployed
    for step in range(501):
        policies = {tilt: descend(phi, logits, tilt) for tilt, logits in policies.items()}
        phi = phi - 0.5 * penalty_gradient(phi, policies)
        if step % 100 == 0:
            print(f"step {step:3d}   G {G(phi, policies[0.0]):.4f}   KL {kl(policies[0.0]):.3f} nats")
    print(f"optimum    G {-PRICE * jax.nn.logsumexp(REFERENCE + WIN_RATE / PRICE):.4f}")
