"""GPU kernels compiled without a GPU, their machine code checked: ``python -m tools.cuda_check``."""
