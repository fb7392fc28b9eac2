"""What a model does with prompts, on disk."""
