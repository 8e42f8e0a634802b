"""The smallest project that d2scale can train: a model of one convolution, and all around it."""
