"""Experiments on top of training: benchmarks, comparisons, the kill test, dataloader speed."""
