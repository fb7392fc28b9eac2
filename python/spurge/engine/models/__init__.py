"""Where a model's own modules keep neurons, heads and attention; how it is called and hooked."""
