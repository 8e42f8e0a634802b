"""One optimizer step, the same for every engine, for benchmarks and for what is measured.

``optimizer_step.OptimizerStep`` is built from ``micro_batches`` (forward and backward),
``averaging`` (gradients over ranks), ``update`` (unscale, clip, optimizer), ``agreement``, ``undo``
and ``guard`` (surviving out-of-memory errors).
"""
