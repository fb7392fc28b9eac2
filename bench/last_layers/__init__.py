"""The methods of last layers: scores of all edges, medians of columns, accuracies at every rate of an edit."""
