"""What others do against shortcuts, each in its shortest form: losses of fine-tuning, edits after it, other texts."""
