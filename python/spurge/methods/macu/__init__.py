"""MacU: neurons located by proximity, edited by a swarm."""
