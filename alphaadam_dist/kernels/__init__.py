"""The two passes over memory, as kernels: ``count`` reads (g, m), ``update`` writes the parameters and moments.

``reference.py`` is the rule over lists of tensors in torch operations, for any device and dtype.
"""

from .reference import count, squared_norms, update

__all__ = ["count", "squared_norms", "update"]
