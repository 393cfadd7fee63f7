"""Small tables of numbers on the device, which kernels read: sent once and found again by what they say.

Sending waits for nothing, so it is a piece of work in the stream that is current then. A kernel in another stream
must wait for it, and a table that is dropped may not be overwritten before such a kernel has read it. A CUDA graph
reads its tables at every replay: those that a capture asks for stay for good.
"""

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Table = np.ndarray[Any, Any]
BYTES, SECONDS = 2**20, 60.0
"""Tables that nobody used for so long are dropped where all of them take more than so much. Not by the number alone: a
step of many parameter groups needs all of its own again and again."""


@dataclass
class _Kept:
    data: Tensor
    used: float = 0.0  # time.monotonic()
    sent: Any = None  # an event: the data is there
    streams: set[Any] = field(default_factory=set)  # where that is known


_kept: dict[tuple[Hashable, torch.device], _Kept] = {}  # least recently used first
_captured: dict[tuple[Hashable, torch.device], _Kept] = {}  # these are in graphs
_lock = threading.Lock()  # a model on several devices has a thread of the backward for each


def kept(name: Hashable, device: torch.device, make: Callable[[], Table]) -> Tensor:
    """The table of this name on a device, flat; equal names mean equal tables.

    Raises:
        RuntimeError: it would have to be sent inside the capture of a CUDA graph.
    """
    key, stream = (name, device), _stream(device)
    with _lock:
        held = _captured.get(key) or _kept.pop(key, None)
        capturing = _capturing(device)
        if held is None:
            if capturing:
                raise RuntimeError(
                    "a CUDA graph is being captured, and tensors lie elsewhere or numbers are others than in the steps "
                    "before it: take a step before the capture and keep the gradients, with "
                    "zero_grad(set_to_none=False)"
                )
            held = _Kept(sent(make().reshape(-1), device))
            if stream is not None:
                held.sent, held.streams = stream.record_event(), {stream}
            _drop(time.monotonic() - SECONDS)
        held.used = time.monotonic()
        if capturing:
            _captured[key] = held  # the capture began after the device had been synchronized
        elif key not in _captured:
            _kept[key] = held
        if stream is not None and not capturing and stream not in held.streams:
            stream.wait_event(held.sent)
            held.data.record_stream(stream)
            held.streams.add(stream)
    return held.data


def sent(table: Table, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    tensor = torch.from_numpy(table)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _drop(before: float) -> None:
    taken = sum(held.data.nbytes for held in _kept.values())
    for key, held in list(_kept.items()):
        if taken <= BYTES or held.used > before:
            return
        taken -= _kept.pop(key).data.nbytes


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
