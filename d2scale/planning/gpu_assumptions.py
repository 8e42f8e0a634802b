"""What is assumed of a GPU until it is measured: the constants that a measurement corrects.

None of them has been measured by this project yet: no GPU was at hand.
"""

from __future__ import annotations

MIB = 2**20

# What a CUDA context takes with the kernels of torch, cuBLAS and cuDNN loaded, from a GPU
# generation (first number of the compute capability) on. Newer ones load more: reports of Hopper
# and later reach from 550 to 800 MiB.
CONTEXT_BYTES = {0: 450 * MIB, 9: 800 * MIB}

# cuBLAS keeps this from the first matrix product on (8 MiB and 128 KiB; 32 MiB on Hopper).
LIBRARY_BYTES = 32 * MIB

# A convolution's workspace, as a part of the bytes of its input, weight and output. cuDNN chooses
# its kernel, and so the workspace, by the shapes: it may be nothing, and as much as the operands.
WORKSPACE_PART = 0.5


def context_bytes(capability: int = 0) -> int:
    """Return the context of a GPU of this generation; 0: one that is not at hand."""
    return CONTEXT_BYTES[max(first for first in CONTEXT_BYTES if first <= capability)]
