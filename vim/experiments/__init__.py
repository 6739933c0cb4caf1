"""Experiments on top of training: benchmarks, the cost of models, comparisons, the kill test, dataloader speed."""
