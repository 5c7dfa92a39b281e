"""Evaluation on the host, in numpy: `statistics`, how rewards predict `preferences`, and the reward-KL `frontier`."""
