"""Tools for developers: versions, wheel, links, cuda_check, hub_kernel."""
