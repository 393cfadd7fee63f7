"""ZeRO-3 with states on NVMe: gradients and momenta are read for the count by themselves.

DeepSpeed swaps one sub-group after the other into its pinned buffers, updates it and writes it back. The count comes
before the first of them: it reads each gradient and momentum once more, 8 bytes a parameter beside the 16 that the
update reads and the 12 that it writes, through two of DeepSpeed's buffers. A sub-group below DeepSpeed's smallest read
(1 MB) stays in memory.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.swap_tensor.utils import swap_in_tensors
from torch import Tensor

ALIGNMENT = 512
"""Bytes. A disk is read past the system's cache, into memory that begins at a multiple of this, or nothing comes."""

CLASS_NAMES = {
    "deepspeed.runtime.swap_tensor.optimizer_utils.OptimizerStateSwapInfo": (
        "get_compute_tensors", "get_swap_paths", "get_swap_gradient_buffers", "get_swap_gradient_paths",
        "add_state_tensors", "read_unswapped_gradients",
    ),
    "deepspeed.runtime.swap_tensor.optimizer_utils.OptimizerSwapper": ("_io_aligned_numel",),
    "deepspeed.runtime.swap_tensor.utils": ("SwapBufferManager", "swap_in_tensors"),
}  # fmt: skip
"""What this module uses of DeepSpeed, for the table of internals.py."""


class Swapped:
    """The flats of a ZeRO-3 optimizer that lie on disk.

    Raises ValueError where DeepSpeed would read a gradient from disk to a place where none arrives.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._flats = [i for i in range(len(zero.fp32_partitioned_groups_flat)) if self.holds(i)]
        self._let_the_first_wait = False
        self._waiting: Callable[[], None] | None = None
        if self._flats:
            for index in self._flats:
                self._refuse_unaligned(index)
            self._watch_swaps()

    def __bool__(self) -> bool:
        return bool(self._flats)

    def count_first(self) -> None:
        """The first swap of each step waits for ``go_on`` where there are several, for then the buffers are free."""
        self._let_the_first_wait = len(self._flats) > 1

    def holds(self, flat: int) -> bool:
        """Whether this flat is swapped."""
        return bool(self._zero._swappable_optimizer_subgroup(flat))

    @contextmanager
    def read(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Gradient and momentum of a flat, in buffers that are others' afterwards."""
        flat, swapper = self._zero.fp32_partitioned_groups_flat[index], self._zero.optimizer_swapper
        swapper.flush_gradients()  # they are on their way to the disk, from the same buffers
        info, numel = swapper.swap_params_info[flat.ds_id], self._zero.fp16_partitioned_groups_flat_numel[index]
        buffers = swapper.swap_buffer_manager.allocate(
            num_elems=swapper._io_aligned_numel(numel), count=2, dtype=flat.dtype
        )
        gradient, momentum = (buffer[:numel].zero_() for buffer in buffers)  # padding has no gradient on disk
        held = self._zero.optimizer.state.get(flat, {}).get(self._zero.optimizer.moments[0])
        paths = [
            path
            for tensor, path in zip(info.get_compute_tensors(), info.get_swap_paths(), strict=True)
            if tensor is held
        ]
        into = [*info.get_swap_gradient_buffers(gradient), *(buffers[1] for _ in paths)]
        swap_in_tensors(swapper.aio_handle, into, [*info.get_swap_gradient_paths(), *paths])
        if into:
            swapper.aio_handle.wait()
        info.read_unswapped_gradients(gradient)
        try:
            yield gradient, momentum
        finally:
            swapper.swap_buffer_manager.free(buffers)

    def go_on(self) -> None:
        """All gradients are read: swap the first flat in, if that waits."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()

    def _watch_swaps(self) -> None:
        zero, waits = self._zero, False
        step, prepare = zero.step, zero._prepare_sub_group

        def prepare_or_wait(index: int, *args: Any) -> None:
            nonlocal waits
            if waits:
                waits, self._waiting = False, functools.partial(prepare_or_wait, index, *args)
                return
            prepare(index, *args)
            grad = zero.fp32_partitioned_groups_flat[index].grad
            for padding in self._padding(index) if self.holds(index) and grad is not None else ():
                grad[padding] = 0.0  # it is not on disk: what the buffer held before would be counted

        @functools.wraps(step)
        def step_in_which_it_waits(*args: Any, **kwargs: Any) -> Any:
            nonlocal waits
            waits = self._let_the_first_wait
            try:
                return step(*args, **kwargs)
            finally:
                waits = False  # it waits still where the step was skipped

        zero._prepare_sub_group, zero.step = prepare_or_wait, step_in_which_it_waits

    def _padding(self, index: int) -> Iterator[slice]:
        """Where a flat has no element of the model."""
        for param, offset in self._params(index):
            padded = param.partition_numel()
            numel = max(0, min(padded, param.ds_numel - dist.get_rank(param.ds_process_group) * padded))
            if numel < padded:
                yield slice(offset + numel, offset + padded)

    def _params(self, index: int) -> Iterator[tuple[Any, int]]:
        """The parameters of a flat, and where each begins in it."""
        offset = 0
        for param in self._zero.fp16_groups[index]:
            yield param, offset
            offset += param.partition_numel()

    def _refuse_unaligned(self, index: int) -> None:
        size = self._zero.fp32_partitioned_groups_flat[index].element_size()
        for param, offset in self._params(index):
            on_disk = param.partition_numel() * size >= self._zero.optimizer_swapper.min_aio_bytes
            if on_disk and offset * size % ALIGNMENT:
                raise ValueError(
                    "zero_optimization.sub_group_size with offload_optimizer.device='nvme': the gradient of a "
                    f"parameter of shape {tuple(param.ds_shape)} begins at byte {offset * size} of its sub-group, "
                    f"which is no multiple of {ALIGNMENT}, and there DeepSpeed reads none from disk and says nothing. "
                    "Set sub_group_size to 1, so that each parameter is a sub-group of its own"
                )

    def load_all(self, engine: Any) -> None:
        """Make ``load_checkpoint`` load the states: DeepSpeed copies their files back, and forgets that it has them."""
        load = engine.load_checkpoint
        signature = inspect.signature(load)

        @functools.wraps(load)
        def load_states_too(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            asked = given.arguments
            result = load(*args, **kwargs)
            if result[0] is not None and asked["load_optimizer_states"] and not asked["load_module_only"]:
                engine._load_zero_checkpoint(asked["load_dir"], Path(result[0]).parent.name)
                self._find_moments()
            return result

        engine.load_checkpoint = load_states_too

    def _find_moments(self) -> None:
        """Tell DeepSpeed that the moments of its flats are on disk."""
        optimizer, swapper = self._zero.optimizer, self._zero.optimizer_swapper
        for index in self._flats:
            flat = self._zero.fp32_partitioned_groups_flat[index]
            if flat in optimizer.state:
                moments = [optimizer.state[flat][name] for name in optimizer.moments]
                for name, moment in zip(optimizer.moments, moments, strict=True):
                    moment.ds_id = f"{name}-{flat.ds_id}"  # as DeepSpeed names them, and their files
                info = swapper.swap_params_info[flat.ds_id]
                info.add_state_tensors(moments)
                missing = [path for path in info.get_swap_paths() if not Path(path).is_file()]
                if missing:
                    raise ValueError(
                        f"load_checkpoint with offload_optimizer.device='nvme': {missing[0]} is not among the files of "
                        "the checkpoint. DeepSpeed names them by numbers that count all parameters of a process: "
                        "load into the first engine of a fresh process, as the one that saved was"
                    )
