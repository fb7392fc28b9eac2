"""What users pick today, written as they would write it, or better."""
