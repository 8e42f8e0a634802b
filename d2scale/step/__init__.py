"""One optimizer step, the same for every engine, for benchmarks and for what is measured.

``OptimizerStep`` is built from ``micro_batches`` (forward and backward), ``averaging`` (gradients
over ranks), ``update``, and for out-of-memory errors ``agreement``, ``undo`` and ``guard``.
"""
