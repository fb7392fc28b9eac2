"""Causal mediation: the weights that balance covariates, and how often intervals of effects hold the truth."""
