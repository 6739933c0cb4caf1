"""The compiled kernels of the CPU: the library built from csrc/, and a file an operator, which passes it tensors."""
