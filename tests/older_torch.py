"""What tests ask of torch that older ones have not, or have otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from alphaadam_dist.torch_versions import numbers

TORCH = numbers(torch.__version__)
# since 2.7 ranks that all have the whole tensor need not send it
_NOT_SENT = {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}

gradients_of_another_dtype = pytest.mark.skipif(
    not hasattr(Tensor, "grad_dtype"), reason="this torch gives every gradient its parameter's dtype"
)


def distributed(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A DTensor of a tensor that every rank has whole."""
    return distribute_tensor(whole, mesh, placements, **_NOT_SENT)
