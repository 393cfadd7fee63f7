"""The two passes over memory, as kernels: ``count`` reads (g, m), ``update`` writes (p, m, v).

``reference.py`` is the rule over lists of tensors in torch operations, for any device and dtype.
"""
