"""A model on several devices, and ``torch.set_default_device``: where tensors lie, nowhere else."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import alphaadam_dist
from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, kernels, parameters
from alphaadam_dist.layout import statistics_device
from alphaadam_dist.optimizer import AlphaOptimizer
from alphaadam_dist.tensors import check_places

from .. import played, threads
from .problems import gradients, memory_of, parameters_of, same_bits, step_with, tensors

KINDS: dict[str, Any] = {"adam": AlphaAdam, "lion": AlphaLion, "sgd": AlphaSGD}
OPTIONS: list[dict[str, Any]] = [
    {}, {"sync": "delayed"}, {"scope": "layer"}, {"clip_norm": 1.0}, {"clip_norm": 1.0, "threshold": 0.1},
    {"maximize": True, "alpha_warmup": 3},
]  # fmt: skip
SHAPES = ((7, 5), (13,), (2, 3), (4,))
PLACEMENTS = ("CPPC", "PCCP", "PPPP")


def trained(kind: Any, placement: str, **options: Any) -> tuple[list[Tensor], list[Any], AlphaOptimizer]:
    """Five steps of two groups over parameters on the CPU (C) and on the played device (P)."""
    places = [played.on if place == "P" else lambda tensor: tensor for place in placement]
    params = [place(tensor) for place, tensor in zip(places, tensors(0, shapes=SHAPES), strict=True)]
    named = list(zip("abcd", params, strict=True))
    groups: list[dict[str, Any]] = [{"params": named[:2]}, {"params": named[2:], "lr": 1e-2}]
    optimizer, seen = kind(groups, weight_decay=0.1, **options), []
    for grads in gradients(5, shapes=SHAPES, absent=0.2):
        for param, place, grad in zip(params, places, grads, strict=True):
            param.grad = None if grad is None else place(grad)
        optimizer.step()
        seen.append((optimizer.alpha, optimizer.agreement))
    return [played.off(param).clone() for param in params], seen, optimizer


def on_two_devices() -> None:
    """In a process of its own."""
    cpu: dict[tuple[str, str], Any] = {}
    for kind in KINDS.values():
        for options in OPTIONS:
            expected = trained(kind, "CCCC", **options)
            cpu[kind.__name__, str(options)] = expected[1], [param.tolist() for param in expected[0]]
            for placement in PLACEMENTS:
                params, seen, optimizer = trained(kind, placement, **options)
                what = kind.__name__, options, placement
                assert seen == expected[1], what
                assert all(same_bits(a, b) for a, b in zip(params, expected[0], strict=True)), what
                assert optimizer._run.layout is not None
                assert optimizer._run.layout.device.type == "played", "the counts of the CPU wait for no device"
                for param in parameters_of(optimizer):
                    assert all(optimizer.state[param][name].device == param.device for name in optimizer.moments)
    # parameters offloaded to the CPU, and ranks that can only reduce on the accelerator
    parameters.statistics_device = lambda params, group: torch.device("played", 0)
    for kind in KINDS.values():
        for options in OPTIONS:
            params, seen, optimizer = trained(kind, "CCCC", **options)
            assert optimizer._run.layout.device.type == "played"
            assert (seen, [p.tolist() for p in params]) == cpu[kind.__name__, str(options)]
    parameters.statistics_device = statistics_device
    kernels.SMALL = 1  # the part on the CPU takes its fast kernels, the other the reference, and says so once
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for kind in (AlphaLion, AlphaSGD):
            expected, seen = trained(kind, "CCCC")[:2]
            params, also, _ = trained(kind, "CPPC")
            assert also == seen
            assert all(same_bits(a, b) for a, b in zip(params, expected, strict=True))
    slower = [str(warning.message) for warning in warned if "slower kernels" in str(warning.message)]
    assert len(slower) == 1
    assert "there are no fast kernels for played" in slower[0]


@pytest.mark.slow
@pytest.mark.skipif(not played.possible(), reason="this torch takes no devices written in Python")
def test_a_model_on_two_devices_is_one_process_on_one() -> None:
    code = "from tests import played; played.register(); from tests.unit import test_devices as d; d.on_two_devices()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]


def test_parameters_without_values_beside_others_are_refused() -> None:
    """Those on meta have no counts to give."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, device="meta"))]
    optimizer = AlphaAdam([("here", params[0]), ("nowhere", params[1])])
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"parameter 'nowhere' is on meta.*to_empty"):
        optimizer.step()
    assert params[0].tolist() == [1.0] * 3


def test_a_graph_holds_the_step_of_one_device() -> None:
    named: list[Any] = [
        (name, SimpleNamespace(device=torch.device("cuda", i), is_meta=False)) for i, name in enumerate("ab")
    ]
    with pytest.raises(ValueError, match=r"capturable=True with parameters on cuda:0, cuda:1.*capturable=False"):
        check_places(named, {}, (), capturable=True)
    check_places(named, {}, (), capturable=False)
    check_places(named[:1], {}, (), capturable=True)


def test_a_device_without_float64_is_refused() -> None:
    param: Any = SimpleNamespace(device=torch.device("mps"), is_meta=False)
    with pytest.raises(ValueError, match=r"parameter 'a' is on mps.*no float64.*Train on the CPU"):
        check_places([("a", param)], {}, (), capturable=False)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [("cpu meta", "cpu"), ("meta cpu", "cpu"), ("meta meta", "meta"), ("", "cpu"), ("cpu cuda:1 cuda:0", "cuda:1")],
)
def test_statistics_lie_where_values_are(devices: str, expected: str) -> None:
    params: list[Any] = [SimpleNamespace(device=torch.device(device)) for device in devices.split()]
    assert statistics_device(params, None) == torch.device(expected)


def test_a_group_without_gradients_asks_for_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would ask for the CPU's, and compile them."""
    asked: list[str] = []
    choose = kernels.choose

    def listened(fused: bool | None, device: torch.device, elements: int) -> Any:
        asked.append(device.type)
        return choose(fused, device, elements)

    monkeypatch.setattr(kernels, "choose", listened)
    for sync in ("exact", "delayed"):
        params = [nn.Parameter(torch.ones(3, device="meta")) for _ in range(2)]
        groups: list[dict[str, Any]] = [{"params": []}, {"params": params[:1]}, {"params": params[1:]}]
        optimizer = AlphaAdam(groups, sync=sync)
        optimizer.step()
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
    assert set(asked) == {"meta"}


# ---- torch.set_default_device


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_default_device_changes_nothing(options: dict[str, Any], fused: bool) -> None:
    runs = []
    for elsewhere in (False, True):
        params, steps = [nn.Parameter(p) for p in tensors(0)], gradients(4, absent=0.2)
        with torch.device("meta") if elsewhere else contextlib.nullcontext():
            optimizer = AlphaAdam(params, fused=fused, **options)
            for grads in steps:
                step_with(optimizer, grads)
            runs.append((memory_of(optimizer), optimizer.alpha, params))
    assert runs[0][:2] == runs[1][:2]
    assert all(same_bits(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


def under_fsdp2(elsewhere: bool) -> list[float]:
    model = nn.Linear(8, 6)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.copy_(tensors(i, shapes=[tuple(param.shape)])[0])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AlphaAdam(model.named_parameters(), clip_norm=1.0, verify_every=1)
    for sign in (1, 1, -1):
        optimizer.zero_grad()
        (sign * model(torch.linspace(-1, 1, 16).view(2, 8))).square().sum().backward()
        with torch.device("meta") if elsewhere else contextlib.nullcontext():
            optimizer.step()
    return memory_of(optimizer)


def test_a_default_device_changes_nothing_under_fsdp2() -> None:
    """The layout is built of tensors of its own, and the ranks exchange them."""
    assert threads.run(2, under_fsdp2, True) == threads.run(2, under_fsdp2, False)


FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def test_the_library_names_the_device_of_every_tensor_it_makes() -> None:
    nameless = []
    for path in Path(alphaadam_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (made := ast.unparse(node.func).split(".")) and made[0] == "torch":
                named = any(keyword.arg == "device" for keyword in node.keywords)
                nameless += [f"{path.name}:{node.lineno}"] if made[-1] in FACTORIES and not named else []
    assert nameless == []
