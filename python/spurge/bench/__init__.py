"""How fast the kernels are on this machine, beside a copy of as many bytes and eager torch."""
