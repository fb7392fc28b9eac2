"""Find: what a model leans on, from the model and its labelled data alone."""
