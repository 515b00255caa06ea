"""Measurements whose results stand in docs/benchmarks.md; a package, so that no other of this name is taken for it."""
