"""What all methods share: sites, probes, cascade, scores, edits, evaluation, data and files."""
