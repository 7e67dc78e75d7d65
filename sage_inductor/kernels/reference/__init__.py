"""The oracle: quantised attention in plain PyTorch, by which every other kernel is judged."""

from sage_inductor.kernels.reference.kernel import ReferenceKernel

__all__ = ["ReferenceKernel"]
