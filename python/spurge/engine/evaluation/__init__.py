"""Accuracy, groups and controls, and the report of them."""
