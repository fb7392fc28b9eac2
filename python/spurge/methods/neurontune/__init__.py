"""NeuronTune: misleading dimensions of the last layer, suppressed or retrained."""
