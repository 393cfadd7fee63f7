"""What differs between the versions of Transformers that are served."""

from typing import Any

import torch
import transformers

from alphaadam_dist.torch_versions import numbers

_DTYPE = "dtype" if numbers(transformers.__version__) >= (4, 56) else "torch_dtype"


def in_dtype(dtype: torch.dtype) -> dict[str, Any]:
    """The argument of ``from_pretrained`` for the dtype of the weights."""
    return {_DTYPE: dtype}


def refuse_packing() -> None:
    """Raise ValueError where examples in one row may see each other: models of 4.48 pass over where they begin."""
    if numbers(transformers.__version__) < (5,):
        raise ValueError(
            f"--packing needs Transformers 5, and this is {transformers.__version__}, in which packed examples see "
            "each other: upgrade it, or give --no-packing"
        )


def unpacked() -> dict[str, Any]:
    """The arguments with which a GGUF file's weights are unpacked, as older versions always do.

    Without them they would stay quantized where the device has a kernel for that, and could not be trained.
    """
    if not hasattr(transformers, "GgufConfig"):
        return {}
    return {"quantization_config": transformers.GgufConfig(dequantize=True)}
