"""How well one GPU is used: training as a fraction of its peak FLOP/s, decoding as a fraction of its bandwidth."""
