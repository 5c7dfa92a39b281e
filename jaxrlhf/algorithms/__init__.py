"""Algorithms beside bilevel descent, and parts of it, each with the same four functions.

- Without a reward model: `policy_gradient` on labels, `direct_preference` (DPO, IPO, SimPO, SAIL's gradient).
- Estimators of the policy's gradient for the lower solver: `actor_critic` (PPO), `group_relative` (GRPO).
- The reward by itself: `reward_learning`. Around an algorithm: `replay` of labelled pairs, a controller (`target_kl`).
"""
