"""Integrated gradients, exact ablation and gated runs of all layers in one pass."""
