"""DeepSpeed: everything that touches it is in this folder.

``registration`` waits for DeepSpeed to be imported; ``internals``, ``parallel`` and ``nvme`` alone know its private
names; ``refusals`` says what is not served, ``attach`` makes ``deepspeed.initialize`` count the whole model.
"""

from .registration import register

__all__ = ["register"]
