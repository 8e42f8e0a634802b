"""Drop-in configs, opened as ``d2scale://NAME.yaml``."""
