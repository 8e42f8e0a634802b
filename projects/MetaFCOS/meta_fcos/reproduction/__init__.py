"""The published comparison, run on the machine at hand by ``d2scale reproduce``."""
