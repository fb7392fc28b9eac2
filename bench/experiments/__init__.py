"""What FCR, NeuronTune and mediation find on real data, beside their controls."""
