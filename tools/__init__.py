"""What developers run besides: versions, cuda_check."""
