"""MacU: neurons located by proximity, edited by a swarm or by gradient; repairs by training on swapped texts."""
