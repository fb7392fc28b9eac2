"""Confounders, and the weights that balance them."""
