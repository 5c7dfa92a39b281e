"""Preference learning of control tasks: the steps of PEBBLE and of its relatives as pure functions.

In the order in which a run uses them:

- `exploration`: state entropy as a reward, before any label is bought.
- `pairs`: which pairs of segments to ask about, by the disagreement or the entropy of an ensemble; recent episodes,
  scored anew by the current reward.
- `ensembles`: rewards of several members, trained on the same labels.
- `teachers`: B-Pref's semi-synthetic annotators.
- `soft_actor_critic`: the off-policy lower level, from `collection` (parallel environments), `replay` (experience and
  segments of it) and `soft_policies` (discrete and continuous actions). `pebble`: all of it together.
- `adapters`, `host`: environments of other libraries. `preference_files`: labels that exist.

`jaxrlhf.mdp` has the environments and the episodes, `jaxrlhf.algorithms` the on-policy actor-critic and the fit of a
reward.
"""
