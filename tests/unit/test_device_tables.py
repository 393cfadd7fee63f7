"""The tables that GPU kernels read: sent once, in the order of streams, and alive as long as a graph may read them.

The streams, events and captures are played: tables lie on the CPU, and what would be said to CUDA is written down.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alphaadam_dist import AlphaAdam, AlphaLion, rule
from alphaadam_dist import kernels as choice
from alphaadam_dist import options as options_module
from alphaadam_dist.kernels import device_tables

from .kernel_cases import options_of_update

kernels = pytest.importorskip("alphaadam_dist.kernels.triton", reason="Triton is not installed")
CPU = torch.device("cpu")


class Stream:
    def __init__(self) -> None:
        self.said: list[str] = []

    def record_event(self) -> str:
        self.said.append("record")
        return "event"

    def wait_event(self, event: str) -> None:
        assert event == "event"
        self.said.append("wait")


class Idle:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class Played:
    """What the device is at now, and what it was sent."""

    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.capturing = False
        self.seconds = 0.0
        self.sent: list[Any] = []
        self.recorded: list[Stream] = []


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    now, send = Played(), device_tables.sent

    def sent(table: Any, device: torch.device) -> Tensor:
        now.sent.append(table)
        return send(table, device)

    monkeypatch.setattr(device_tables, "_kept", {})
    monkeypatch.setattr(device_tables, "_captured", {})
    monkeypatch.setattr(device_tables, "_stream", lambda device: now.stream)
    monkeypatch.setattr(device_tables, "_capturing", lambda device: now.capturing)
    monkeypatch.setattr(device_tables, "sent", sent)
    monkeypatch.setattr(device_tables.time, "monotonic", lambda: now.seconds)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: now.recorded.append(stream))
    monkeypatch.setattr(choice, "choose", lambda *args: kernels)
    monkeypatch.setattr(options_module, "CAPTURABLE", ("cpu",))
    for name in ("_count", "_update"):  # the interpreter would take a second for a thousand programs
        monkeypatch.setattr(kernels, name, Idle())
    return now


def table(name: str, words: int = 1) -> Tensor:
    return device_tables.kept(name, CPU, lambda: np.arange(words))


def test_another_stream_waits_for_the_table_once_and_keeps_its_memory(played: Played) -> None:
    first, second = Stream(), Stream()
    played.stream = first
    table("a")
    played.stream = second
    table("a")
    table("a")
    played.stream = first
    table("a")
    assert (first.said, second.said) == (["record"], ["wait"])
    assert played.recorded == [second]
    assert len(played.sent) == 1


def test_what_nobody_used_for_a_minute_goes_where_there_is_much(played: Played) -> None:
    much = device_tables.BYTES // 8
    old, used = table("old", much), table("used", much)
    played.seconds = 50.0
    assert table("used", much) is used
    table("new")
    assert table("old", much) is old, "much, but nobody has waited a minute"
    played.seconds = 115.0
    table("newer")
    assert table("used", much) is not used
    played.seconds += 61.0
    assert table("old", much) is not old


def one(kind: Any, size: int = 100, **options: Any) -> tuple[torch.nn.Parameter, Any]:
    param = torch.nn.Parameter(torch.ones(size))
    param.grad = torch.ones(size)
    return param, kind([param], **options)


def test_tables_in_a_graph_stay_whoever_steps_beside_it(played: Played) -> None:
    captured = one(AlphaAdam, capturable=True)
    captured[1].step()
    played.capturing = True
    captured[1].step()
    played.capturing = False
    tables = [weakref.ref(held.data) for held in device_tables._captured.values()]
    assert len(tables) >= 4
    monstrous = device_tables.BYTES // 8
    for step in range(3):
        played.seconds += 100.0
        table(f"of somebody else {step}", monstrous)
    gc.collect()
    assert all(held() is not None for held in tables)
    assert len(device_tables._kept) < 3


def test_a_capture_is_refused_where_a_table_would_have_to_be_sent(played: Played) -> None:
    param, optimizer = one(AlphaLion, capturable=True)
    optimizer.step()
    played.capturing = True
    optimizer.step()
    param.grad = torch.ones(100)
    with pytest.raises(RuntimeError, match="zero_grad\\(set_to_none=False\\)"):
        optimizer.step()


@pytest.mark.parametrize("groups", [3, 100])
def test_a_step_of_many_groups_finds_all_its_tables_again(groups: int, played: Played) -> None:
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(groups)]
    for param in params:
        param.grad = torch.ones(8)
    optimizer = AlphaLion([{"params": [param], "lr": 1e-3 * 0.9**i} for i, param in enumerate(params)])
    optimizer.step()
    optimizer.step()
    played.sent.clear()
    optimizer.step()
    assert played.sent == []


def test_a_gradient_elsewhere_sends_addresses_and_no_more(played: Played) -> None:
    """Where gradients are freed between steps: some words a tensor, and not a row for each program."""
    param, optimizer = one(AlphaLion, size=2**20)
    optimizer.step()
    optimizer.step()
    played.sent.clear()
    kept = param.grad
    param.grad = torch.ones(2**20)
    optimizer.step()
    assert [table.size for table in played.sent] == [2, 3]  # for count, and for update
    assert kept is not None


def test_small_models_are_many_programs_and_large_ones_no_more_than_needed() -> None:
    """A device of 132 multiprocessors has work for all of them, and no bit depends on which device that is."""
    for mebi, programs in ((1, 1024), (8, 2048), (128, 2048), (1024, 16384)):
        sizes = mebi * 2**20
        assert sizes // kernels._chunk(sizes) == programs, mebi
    for elements in (0, 1, 5000, 3 * 2**20 + 7, 10**10):
        assert kernels._chunk(elements) % kernels.BLOCK == 0
        assert kernels._chunk(elements) % kernels.ROUNDED_BLOCK == 0


def test_every_element_has_one_program(played: Played) -> None:
    sizes = [5, 0, 4_000_000, 513, 512, 70_001]
    aligned = [torch.empty(size) for size in sizes]
    moved = [torch.empty(size + 1)[1:] for size in sizes]
    for own in (aligned, moved):
        work, _, programs_of = kernels._tables([aligned, own])
        assert programs_of.tolist() == [int((work[:, 0] == i).sum()) for i in range(len(sizes))]
        for i, size in enumerate(sizes):
            rows = work[work[:, 0] == i].tolist()
            assert [row[1] for row in rows] == [0, *(row[3] for row in rows[:-1])][: len(rows)]
            assert (rows[-1][3] if rows else 0) == size
            for _, start, whole, stop in rows:
                full = start + (stop - start) // kernels.BLOCK * kernels.BLOCK
                assert whole == (full if own is aligned else start)
                assert start % kernels.BLOCK == whole % kernels.BLOCK == 0


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: a model on cuda:1 would be read from cuda:0."""
    entered: list[torch.device] = []
    launched: list[list[torch.device]] = []

    class Guard:
        def __init__(self, tensor: Tensor) -> None:
            self.device = tensor.device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: Any) -> None:
            entered.pop()

    class Watched(Idle):
        def __getitem__(self, grid: Any) -> Any:
            launched.append(list(entered))
            return super().__getitem__(grid)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for name in ("_count", "_update", "_update_rounded"):
        monkeypatch.setattr(kernels, name, Watched())
    grads, params, momenta = [torch.ones(3)], [torch.ones(3)], [torch.ones(3)]
    kernels.count(grads, momenta, threshold=0.0, scale=None)
    kernels.update(rule.lion_, params, grads, [momenta], **options_of_update("lion", 1, 0.0, None))
    _, optimizer = one(AlphaLion, state_dtype="bfloat16")
    monkeypatch.setattr(choice, "choose", lambda *args: kernels)
    optimizer.step()
    assert launched == [[CPU]] * 4


def test_a_scale_of_any_dtype_is_the_same_number(played: Played) -> None:
    """The kernels are compiled for float64, whatever a scaler or DeepSpeed gives."""
    for scale in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.5).double()):
        held = kernels._scalar(scale, CPU)
        assert (held.dtype, held.shape, float(held)) == (torch.float64, (), 0.5)
    assert len(played.sent) == 1
