"""What a model costs: parameters, bytes, FLOPs, and time on this machine."""
