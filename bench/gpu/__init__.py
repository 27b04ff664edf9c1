"""``make gpu``: builds, tries, tests and measures the GPU backends on a machine with a GPU."""
