"""Both levels on one batch: the tilted losses that the lower solver minimises, and the hypergradient.

`objectives` (G and J of one policy on one labelled sample), `shared_sample` and `own_samples` (the hypergradient from
either way of sampling), `two_losses` (problems without samples), `report` (the diagnostics they share).
"""
