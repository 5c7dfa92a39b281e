"""Evaluation on the host, in numpy: `statistics`, how well rewards predict `preferences`, and the reward-KL `frontier`."""
