"""DeepSpeed: everything that touches it is in this folder.

``internals`` is the one place that knows its private names, ``refusals`` says what is not served, ``attach`` makes
``deepspeed.initialize`` count the whole model.
"""
