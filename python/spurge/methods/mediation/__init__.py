"""Causal mediation: which units carry a prompt's effect, topics accounted for."""
