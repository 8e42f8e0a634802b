"""What one GPU can prove, in slices of under ten minutes: see ``benchmarks/gpu.py``."""
