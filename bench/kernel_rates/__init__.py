"""Rates of the kernels: GB/s beside a copy, eager torch and torch.compile, and nanoseconds an element of the swarm."""
