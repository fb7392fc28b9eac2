"""The passes of a model: read once, entered in the middle or run whole, with rows of one's own."""
