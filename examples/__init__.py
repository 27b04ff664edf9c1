"""Complete programs with attn_kernels."""
