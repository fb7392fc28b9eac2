"""Labelled texts: rows from any source, examples, words."""
