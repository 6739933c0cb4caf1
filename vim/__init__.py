"""Vim: Vision Mamba classifiers for timm, and the state-space layers beneath them."""
