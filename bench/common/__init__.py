"""What all benchmarks share: how they time, count and compare, the machine's limits, models to measure on."""
