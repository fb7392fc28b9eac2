"""Edits of neurons and of weights as data: applied, undone, folded, saved."""
