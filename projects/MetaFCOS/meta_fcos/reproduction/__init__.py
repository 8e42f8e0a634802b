"""The published comparison, run on this machine by ``d2scale reproduce``."""
