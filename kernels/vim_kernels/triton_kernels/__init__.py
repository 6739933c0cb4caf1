"""The Triton kernels, a file for each operator or part of one. Imported only where Triton runs."""
