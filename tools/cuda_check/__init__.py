"""Compiles the GPU kernels without a GPU and checks their machine code: ``python -m tools.cuda_check``."""
