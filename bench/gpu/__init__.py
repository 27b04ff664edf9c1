"""``make gpu``: builds, checks, tests and measures the GPU backends on a machine with a GPU."""
