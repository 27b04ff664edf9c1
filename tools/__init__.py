"""What developers run besides: versions, wheel, links, cuda_check, hub_kernel."""
