"""Experiments above training: benchmarks, comparisons, the kill test, the speed of the loader."""
