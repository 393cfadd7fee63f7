"""The parts of benchmarks/gpu.py. Each prints what it sees and returns what is written, with ``passed``."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from benchmarks.turns import BYTES, CLIPPED, FUSED, Row, Shared, Steps, compare, take_turns

ROOT = Path(__file__).parents[1]
ELEMENTS = 10**9
ROUNDS = 15
DEVICE = torch.device("cuda", 0)
KINDS: dict[str, Any] = {"AlphaAdam": AlphaAdam, "AlphaLion": AlphaLion, "AlphaSGD": AlphaSGD}
SHAPES = ((1024, 512), (512,), (333, 7), (1,))

TESTS = ("tests/unit/test_triton.py", "tests/unit/test_device_tables.py", "tests/unit/test_ptx.py")
MODES: dict[str, dict[str, Any]] = {"delayed": {"sync": "delayed"}, "exact": {}, "clip_norm": {"clip_norm": 1.0}}
BARS = {"delayed": (FUSED, 1.05), "exact": (FUSED, 1.35), "clip_norm": (CLIPPED, 0.95)}
SHARE_OF_COPY = 0.85
BF16_BAR = 0.75
BF16_BYTES = 14  # an element of a delayed step: p, g, m, v are read and p, m, v written, 2 bytes each


def tests() -> dict[str, Any]:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *TESTS]
    done = subprocess.run(line, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    last = next((text for text in reversed(done.stdout.splitlines()) if text.strip()), "")
    return {"passed": done.returncode == 0, "said": last}


def bars() -> dict[str, Any]:
    shared = Shared(ELEMENTS, DEVICE)
    steps = shared.peers()
    for name, options in MODES.items():
        steps[name] = shared.step_of(AlphaAdam([shared.param], fused=True, **options))
    traffic = {FUSED: 28, **{name: BYTES[name] for name in MODES}}
    return _timed(steps, BARS, traffic, ELEMENTS)


def bf16() -> dict[str, Any]:
    shared = Shared(ELEMENTS, DEVICE)
    param = nn.Parameter(shared.param.detach().bfloat16())
    assert shared.param.grad is not None
    param.grad = shared.param.grad.bfloat16()
    ours = AlphaAdam([param], fused=True, sync="delayed", state_dtype="bfloat16")
    steps = {FUSED: shared.peers()[FUSED], "delayed, bf16": ours.step}
    traffic = {FUSED: 28, "delayed, bf16": BF16_BYTES}
    # no bar on the bandwidth: the random bits are arithmetic that an AdamW does not have
    return _timed(steps, {"delayed, bf16": (FUSED, BF16_BAR)}, traffic, ELEMENTS, share=None)


def _timed(
    steps: Steps, limits: dict[str, tuple[str, float]], traffic: dict[str, int], elements: int,
    share: float | None = SHARE_OF_COPY,
) -> dict[str, Any]:  # fmt: skip
    source = torch.empty(elements, device=DEVICE)
    target = torch.empty_like(source)
    steps = {**steps, "copy": lambda: target.copy_(source)}
    seconds = take_turns(steps, ROUNDS, DEVICE)
    copied = 8 * elements / statistics.median(seconds["copy"])
    rows, passed = [], True
    for name in traffic:
        against, bar = limits.get(name, (FUSED, None))
        row = compare(f"{elements:.0e} parameters", name, seconds, against, bar)
        speed = traffic[name] * elements / (row.milliseconds / 1e3)
        row = Row(**{**asdict(row), "gigabytes_per_second": speed / 1e9, "share_of_copy": speed / copied})
        rows.append(asdict(row))
        met = bar is None or (row.ratio <= bar and (share is None or speed / copied >= share))
        passed = passed and met
        print(f"{name}: {row.milliseconds:.2f} ms, {row.ratio:.3f} of {against}, bar {bar}, {speed / 1e9:.0f} GB/s, "
              f"{speed / copied:.0%} of a copy{'' if met else ' MISSED'}")  # fmt: skip
    return {"passed": passed, "rows": rows, "copy_gigabytes_per_second": copied / 1e9, "least_share_of_copy": share}


def _model(kind: str, **options: Any) -> tuple[list[nn.Parameter], Any, list[list[Tensor]]]:
    """Parameters, an optimizer over them, and the gradients of eight steps."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    made = [torch.randn(shape, generator=generator, device=DEVICE) for shape in SHAPES]
    params = [nn.Parameter(one) for one in made]
    gradients = [[torch.randn(s, generator=generator, device=DEVICE) for s in SHAPES] for _ in range(8)]
    for param in params:
        param.grad = torch.zeros_like(param)
    named = [(str(i), param) for i, param in enumerate(params)]
    return params, KINDS[kind](named, weight_decay=0.1, **options), gradients


def _take(params: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        assert param.grad is not None
        param.grad.copy_(gradient)


def _bits(params: list[nn.Parameter], optimizer: Any) -> tuple[list[Tensor], Any]:
    return [param.detach().clone() for param in params], optimizer.state_dict()["param_groups"][0]["alphaadam_state"]


def _same(a: tuple[list[Tensor], Any], b: tuple[list[Tensor], Any]) -> bool:
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def graphs() -> dict[str, Any]:
    same = {}
    modes: dict[str, dict[str, Any]] = {
        "exact": {}, "clip_norm": {"clip_norm": 1.0}, "threshold, clip_norm": {"threshold": 0.1, "clip_norm": 1.0},
        "layer": {"scope": "layer"}, "tensor lr": {"lr": torch.tensor(1e-2, device=DEVICE)},
    }  # fmt: skip
    for kind in KINDS:
        for name, options in modes.items():
            ended = []
            for graphed in (False, True):
                params, optimizer, gradients = _model(kind, capturable=True, **{"lr": 1e-2, **options})
                for step, given in enumerate(gradients):
                    _take(params, given)
                    if graphed and step == 3:
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):
                            optimizer.step()
                    if graphed and step >= 3:
                        graph.replay()
                    else:
                        optimizer.step()
                ended.append(_bits(params, optimizer))
            same[f"{kind}, {name}"] = _same(*ended)
            print(f"{kind}, {name}: {'the same bits' if same[f'{kind}, {name}'] else 'OTHER BITS'}")
    return {"passed": all(same.values()), "same_bits": same}


def _alone(backend: str, act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``act`` in a process group of one rank."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            return act()
        finally:
            dist.destroy_process_group()


def nccl() -> dict[str, Any]:
    torch.cuda.set_device(DEVICE)
    return _alone("nccl", _fsdp2_beside_plain)


def _fsdp2_beside_plain() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, same = init_device_mesh(DEVICE.type, (1,)), {}
    for kind in KINDS:
        for name, options in {**MODES, "in backward": {"sync": "delayed"}}.items():
            ended = []
            for sharded in (False, True):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).to(DEVICE)
                if sharded:
                    for layer in (model[0], model[2], model):
                        fully_shard(layer, mesh=mesh)
                optimizer = KINDS[kind](model.named_parameters(), lr=1e-3, fused=True, **options)
                if name == "in backward" and sharded:
                    optimizer.step_in_backward(model)
                for step in range(6):
                    torch.manual_seed(step)
                    model(torch.randn(32, 512, device=DEVICE)).square().sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                params: list[Any] = [getattr(p, "_local_tensor", p) for p in model.parameters()]
                ended.append(_bits(params, optimizer))
            same[f"{kind}, {name}"] = _same(*ended)
            print(f"{kind}, {name}: {'the same bits' if same[f'{kind}, {name}'] else 'OTHER BITS'}")
    return {"passed": all(same.values()), "same_bits": same}


WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def trace() -> dict[str, Any]:
    """Launches and waits of a step, and the trace for a browser (chrome://tracing)."""
    found, path = {}, ROOT / "benchmarks" / "results" / "gpu-trace.json"
    for kind in KINDS:
        for name, options in MODES.items():
            params, optimizer, gradients = _model(kind, fused=True, **options)
            for given in gradients[:4]:
                _take(params, given)
                optimizer.step()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                optimizer.step()
            names = [event.name for event in profiled.events()]
            found[f"{kind}, {name}"] = {
                "launches": sum("LaunchKernel" in event for event in names),
                "of_ours": sum(event in ("_count", "_update") for event in names),
                "copies": sum("Memcpy" in event and not event.startswith("cuda") for event in names),
                "waits": sum(event in WAITS for event in names),
            }
            print(f"{kind}, {name}: {found[f'{kind}, {name}']}")
            if (kind, name) == ("AlphaAdam", "clip_norm"):
                profiled.export_chrome_trace(str(path))
    print(f"wrote {path}")
    ours = {name: 1 if "delayed" in name else 2 for name in found}
    passed = all(one["of_ours"] == ours[name] and one["waits"] == 0 for name, one in found.items())
    return {"passed": passed, "steps": found}


def deepspeed() -> dict[str, Any]:
    if importlib.util.find_spec("deepspeed") is None:
        print("DeepSpeed is not installed: left out")
        return {"passed": True, "left_out": "DeepSpeed is not installed"}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    torch.cuda.set_device(DEVICE)
    return _alone("nccl", _zero_beside_plain)


def _zero_beside_plain() -> dict[str, Any]:
    """Counts and alpha, exact numbers of both; parameters to rounding: ZeRO's flat is another list of tensors."""
    import deepspeed as ds

    ended: list[Any] = []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).to(DEVICE)
        config = {
            "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AlphaAdam", "params": {"lr": 1e-3, "fused": True}},
        }  # fmt: skip
        engine: Any = None
        if sharded:
            engine = ds.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
        optimizer = engine.basic_optimizer if sharded else AlphaAdam(model.named_parameters(), lr=1e-3, fused=True)
        for step in range(6):
            torch.manual_seed(step)
            loss = (engine or model)(torch.randn(32, 512, device=DEVICE)).square().sum()
            if engine is None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                engine.backward(loss)
                engine.step()
        ended.append(([p.detach().clone() for p in model.parameters()], optimizer.agreement, optimizer.alpha))
    same = ended[0][1:] == ended[1][1:]
    far = max(float((a - b).abs().max()) for a, b in zip(ended[0][0], ended[1][0], strict=True))
    print(f"counts and alpha {'equal' if same else 'DIFFER'}, parameters at most {far:.1e} apart")
    return {"passed": same and far <= 1e-6, "counts_equal": same, "parameters_apart": far}


def main() -> None:
    part: Callable[[], dict[str, Any]] = globals()[sys.argv[1]]
    try:
        result = part()
    except Exception:
        traceback.print_exc()
        result = {"passed": False, "error": traceback.format_exc(limit=-3)}
    sys.stdout.flush()
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
