"""Arrays: matrices, power iterations and kernels, on the host or a device."""
