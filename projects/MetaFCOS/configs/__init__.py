"""MetaFCOS recipes, opened as ``d2scale://MetaFCOS/NAME.yaml``."""
