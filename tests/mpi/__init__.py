"""ChainerMN: programs that run under MPI, and ranks that are threads."""
