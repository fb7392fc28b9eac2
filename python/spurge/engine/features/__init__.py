"""What the last layer reads: one pass over a data set, cached by content."""
