"""Microbenchmarks of the data plane: each figure beside its physical limit, and beside released peers."""
