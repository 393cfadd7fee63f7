"""The GPU kernels against the rule: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, rule
from alphaadam_dist import kernels as choice
from alphaadam_dist import options as options_module
from alphaadam_dist.kernels import cpu, device_tables, reference
from alphaadam_dist.rounding import Positions, Rounding

from .kernel_cases import DIRECTIONS, SIZES, assert_norms, case, options_of_update, placed, same, with_odd_ones
from .problems import Cast, same_bits

kernels = pytest.importorskip("alphaadam_dist.kernels.triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def here(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the device that lie there as unaligned as they did."""
    return [placed(tensor.to(DEVICE), tensor.storage_offset()) for tensor in tensors]


def drawn(seed: int) -> tuple[random.Random, dict[str, Any]]:
    """What test_update and test_count vary, and a generator for more."""
    draw = random.Random(seed)
    return draw, {
        "sizes": draw.choices(SIZES, k=draw.randrange(6)), "dtype": draw.choice(cpu.DTYPES),
        "special": draw.choice([0.0, 0.05, 0.6]), "offset": draw.choice([0, 0, 1, 3]),
        "threshold": draw.choice([0.0, 0.1]), "scale": draw.choice([None, -1.0, 2.0**-16, torch.tensor(0.37)]),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_update(seed: int) -> None:
    draw, drew = drawn(seed)
    direction = draw.choice(sorted(DIRECTIONS))
    sizes, dtype, special, threshold, scale = (drew[k] for k in ("sizes", "dtype", "special", "threshold", "scale"))
    function, *_ = DIRECTIONS[direction]
    params, grads, moments = case(direction, sizes, seed, dtype, special, drew["offset"])
    ours_params, ours_grads, ours_moments = here(params), here(grads), [here(each) for each in moments]
    before = [p.clone() for p in params]
    options = options_of_update(direction, len(sizes), threshold, scale)
    expected, _ = reference.update(function, params, grads, moments, **options)
    counts, norms = kernels.update(function, ours_params, ours_grads, ours_moments, **options)
    assert counts is not None
    assert torch.equal(counts.cpu(), expected)
    assert_norms(norms, grads, before, [p.cpu() for p in ours_params], dtype)
    if special:  # the interpreter's fused multiply-add is not fused, so these may overflow in another place
        return
    rounding = 4 * torch.finfo(dtype).eps
    for ours, theirs in zip([m for ms in ours_moments for m in ms], [m for ms in moments for m in ms], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=rounding, atol=rounding)
    for start, ours, theirs in zip(before, ours_params, params, strict=True):
        near = (ours.cpu() - theirs).abs() <= rounding * (start.abs() + theirs.abs() + 0.02)
        assert (same(ours.cpu(), theirs) | near).all()


@pytest.mark.parametrize("rounds", [False, True], ids=["fp32 state", "bf16 state"])
def test_an_odd_tensor_goes_to_the_reference_alone(rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of two dtypes is two launches, and a gradient in another order than its parameter is put in order."""
    odd = ["channels_last", "transposed", "gaps"] if rounds else ["bf16", "gaps"]
    held = with_odd_ones()
    generator = torch.Generator().manual_seed(1)
    lists = [[param.to(DEVICE) for param in with_odd_ones().values()] for _ in range(2)]
    grads = [torch.randn(param.shape, generator=generator).to(DEVICE, param.dtype) for param in held.values()]
    grads[1] = grads[1].mT.contiguous().mT
    state = torch.bfloat16 if rounds else None
    momenta = [[torch.zeros_like(param, dtype=state) for param in params] for params in lists]
    _, _, hyperparameters = DIRECTIONS["sgd"]
    rounding = Rounding(1, list(range(len(held))), [Positions(0, 2**20, 2**20)] * len(held)) if rounds else None
    seen: list[torch.Size] = []

    def noted(direction: Any, params: list[Tensor], *args: Any, **options: Any) -> Any:
        seen.extend(param.shape for param in params)
        return update(direction, params, *args, **options)

    update = reference.update
    options: dict[str, Any] = {
        "strengths": torch.tensor([[1.5, 0.5]], dtype=torch.float64).expand(len(held), 2), "threshold": 0.0,
        "scale": None, "counting": True, "steps": None, "hyperparameters": hyperparameters, "rounding": rounding,
        "norms": True,
    }  # fmt: skip
    before = [param.clone() for param in lists[1]]
    expected, _ = update(rule.sgd_, lists[0], grads, [momenta[0]], **options)
    monkeypatch.setattr(reference, "update", noted)
    counts, norms = kernels.update(rule.sgd_, lists[1], list(grads), [momenta[1]], **options)
    assert counts is not None
    assert torch.equal(counts, expected)
    assert_norms(norms, grads, before, lists[1], torch.float32)
    assert seen == [held[name].shape for name in odd]
    for i, name in enumerate(held):
        for theirs, ours in ((lists[0][i], lists[1][i]), (momenta[0][i], momenta[1][i])):
            # the interpreter's fused multiply-add is not fused
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=1e-6)
            assert name not in odd or same_bits(theirs, ours)
    expected_counts, expected_norms = reference.count(
        grads, momenta[0], threshold=0.0, scale=None, norms=True, wide=rounds
    )
    counts, norms = kernels.count(list(grads), momenta[0], threshold=0.0, scale=None, norms=True, wide=rounds)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-12, atol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_count(seed: int) -> None:
    draw, drew = drawn(seed)
    threshold, scale = drew["threshold"], drew["scale"]
    _, grads, (momenta,) = case("lion", drew["sizes"], seed, drew["dtype"], drew["special"], drew["offset"])
    of_grads = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    grads = [grad.to(of_grads) for grad in grads]
    expected, expected_norms = reference.count(grads, momenta, threshold=threshold, scale=scale, norms=True)
    counts, norms = kernels.count(here(grads), here(momenta), threshold=threshold, scale=scale, norms=True)
    assert torch.equal(counts.cpu(), expected)
    assert norms is not None
    torch.testing.assert_close(norms.cpu(), expected_norms, rtol=1e-12, atol=0.0, equal_nan=True)


def test_a_list_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 small tensors cost what one does."""
    launches = []
    kernel = kernels._update

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "_update", Counted())
    params, grads, momenta = ([torch.ones(5, device=DEVICE) for _ in range(300)] for _ in range(3))
    strengths = torch.ones((300, 2), dtype=torch.float64, device=DEVICE)
    kernels.update(
        rule.lion_, params, grads, [momenta], strengths=strengths, threshold=0.0, scale=None, counting=False,
        steps=None, hyperparameters=DIRECTIONS["lion"][2],
    )  # fmt: skip
    assert launches == [(300,)]
    assert all(param[0] < 1 for param in params)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_numbers_of_a_tensor_rate_are_the_rules(direction: str, dtype: torch.dtype, capturable: bool) -> None:
    function, _, own = DIRECTIONS[direction]
    lr = torch.tensor(0.0123, dtype=dtype)
    steps = [1.0, 7.0] if "adam" in direction else None
    given: Any = torch.tensor(steps, dtype=torch.float32) if steps and capturable else steps
    columns = kernels._KERNELS[function][1](given, {**own, "lr": lr})
    table = kernels._columns(columns, 2, torch.device("cpu"))
    ahead = own.get("lookahead", 0.0)
    sizes = [rule.size_of(lr)] * 2 if steps is None else rule.sizes_of(lr, own["betas"][0], steps, ahead)
    assert table[:, 0].tolist() == [rule.decay_of(lr, own["weight_decay"])] * 2
    assert table[:, 1].tolist() == sizes


@pytest.mark.parametrize("odd", [Cast, lambda held: torch._neg_view(-held)], ids=["subclass", "lazy negation"])
def test_a_gradient_whose_values_lie_elsewhere_goes_to_the_reference(odd: Any) -> None:
    """A subclass may have no address, and the memory of a lazy negation has the other sign."""
    ended = []
    for update, wrap in ((reference.update, lambda held: held), (kernels.update, odd)):
        params, grads, momenta = ([torch.randn(40, generator=torch.Generator().manual_seed(i))] for i in range(3))
        options = options_of_update("lion", 1, 0.0, None)
        counts, _ = update(rule.lion_, params, [wrap(grads[0])], [momenta], **options)
        assert counts is not None
        ended.append((counts.tolist(), params[0], momenta[0]))
    assert ended[0][0] == ended[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ended[0][1:], ended[1][1:], strict=True))


KINDS: dict[str, Any] = {"adam": AlphaAdam, "lion": AlphaLion, "sgd": AlphaSGD}


def run(
    kind: str, options: dict[str, Any], lr: float | Tensor, sent: list[Any]
) -> tuple[list[Tensor], list[float], Any, set[str]]:
    """Six steps. Last: the names of the operators of the sixth, also those that operators call; ``sent`` is of it."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in ((33, 5), (7,))]
    optimizer = KINDS[kind]([("a", params[0]), ("b", params[1])], lr=lr, weight_decay=0.1, **options)
    for param in params:
        param.grad = torch.zeros_like(param)
    for step in range(6):
        for param in params:
            param.grad.copy_(torch.randn(param.shape, generator=generator))
        if step < 5:
            optimizer.step()
        else:
            sent.clear()
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                optimizer.step()
    names = {event.key for event in profiled.key_averages()}
    return params, optimizer.state_dict()["param_groups"][0]["alphaadam_state"], optimizer, names


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "options",
    [{"alpha_warmup": 9}, {"scope": "layer"}, {"clip_norm": 1.0}, {"threshold": 0.1, "maximize": True},
     {"clip_norm": 1.0, "threshold": 0.1}, {"telemetry": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_capturable_step_waits_for_nothing_and_sends_nothing(
    kind: str, options: dict[str, Any], rate: float | Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside torch's own operators, where a TorchDispatchMode does not look."""
    monkeypatch.setattr(options_module, "CAPTURABLE", (DEVICE.type,))
    monkeypatch.setattr(choice, "choose", lambda fused, device, elements: kernels if fused else reference)
    sent: list[Any] = []
    send = device_tables.sent
    monkeypatch.setattr(device_tables, "sent", lambda table, device: sent.append(table) or send(table, device))
    expected, state, other, names = run(kind, {**options, "fused": False}, 1e-2, sent)
    assert "aten::item" in names or kind != "adam"  # the profiler does see it
    params, ours, optimizer, names = run(
        kind, {**options, "capturable": True}, rate.to(DEVICE) if isinstance(rate, Tensor) else rate, sent
    )
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::pin_memory"} & names
    assert sent == []
    assert ours == pytest.approx(state, rel=1e-12)
    assert optimizer.metrics() == pytest.approx(other.metrics(), rel=1e-5)
    for param, theirs in zip(params, expected, strict=True):
        torch.testing.assert_close(param, theirs, rtol=1e-6, atol=1e-7)
        if kind == "adam":
            held = optimizer.state[param]["step"]
            assert (held.device.type, float(held)) == (DEVICE.type, 6)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="only a GPU has CUDA graphs")
def test_a_cuda_graph_replays_the_step() -> None:
    runs = []
    for graphed in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in ((33, 5), (7,))]
        gradients = [[torch.randn(p.shape, generator=generator).to(DEVICE) for p in params] for _ in range(8)]
        optimizer = AlphaAdam(params, lr=1e-2, alpha_warmup=20, capturable=True)
        graph = torch.cuda.CUDAGraph()
        for param in params:
            param.grad = torch.zeros_like(param)
        for step, given_now in enumerate(gradients):
            for param, gradient in zip(params, given_now, strict=True):
                param.grad.copy_(gradient)
            if graphed and step == 3:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if graphed and step >= 3:
                graph.replay()
            else:
                optimizer.step()
        runs.append((params, optimizer.state_dict()["param_groups"][0]["alphaadam_state"]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))


# ---- bf16 state


PLACES = [Positions(0, 10**9, 10**9), Positions(2**40 + 77, 10**9, 10**9), Positions(3, 170, 700)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 127, 1300])
def test_random_bits_and_roundings_are_the_references_to_the_bit(size: int, dtype: torch.dtype) -> None:
    """By updates whose results in fp32 are exact: m = g, v = g^2 and p = -g."""
    generator = torch.Generator().manual_seed(size)
    g = torch.cat([torch.randn(size, generator=generator) * 1e5, torch.tensor([3.4e38, 1e-42, 0.0, -3.39e38])])
    rounding = Rounding(2**31 + 5, [2**63 + 17] * len(PLACES), PLACES)
    n = len(g)
    options: dict[str, Any] = {
        "strengths": torch.ones((len(PLACES), 2), dtype=torch.float64), "threshold": 0.0, "scale": None,
        "counting": True, "rounding": rounding,
    }  # fmt: skip
    sgd = {"lr": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    adam = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    for direction, hyper, moments, steps in ((rule.sgd_, sgd, 1, None), (rule.adam_, adam, 2, [1.0] * len(PLACES))):
        ended = []
        for update in (reference.update, kernels.update):
            lists = [[torch.zeros(n, dtype=t) for _ in PLACES] for t in (dtype, *[torch.bfloat16] * moments)]
            lists = [here(tensors) for tensors in lists]
            grads = here([g.clamp(-1e18, 1e18) if moments == 2 else g for _ in PLACES])
            counts, _ = update(direction, lists[0], grads, lists[1:], steps=steps, hyperparameters=hyper, **options)
            ended.append((counts.tolist(), [tensor.cpu() for tensors in lists for tensor in tensors]))
        assert ended[0][0] == ended[1][0]
        for ours, theirs in zip(ended[1][1], ended[0][1], strict=True):
            assert same_bits(ours, theirs)
        assert any(float(tensor.abs().max()) > 0 for tensor in ended[0][1][len(PLACES) :])


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize("direction", sorted(DIRECTIONS))
def test_an_update_that_rounds(direction: str, threshold: float) -> None:
    """The interpreter's multiply-add is not fused, so a few elements round to the neighbour."""
    function, _, _ = DIRECTIONS[direction]
    params, grads, moments = case(direction, [2500, 40], 3, torch.float32, 0.0, 0)
    params, moments = [p.bfloat16() for p in params], [[m.bfloat16() for m in ms] for ms in moments]
    ours_params, ours_grads, ours_moments = here(params), here(grads), [here(ms) for ms in moments]
    options = {**options_of_update(direction, 2, threshold, 0.37), "rounding": Rounding(3, [5, 6], PLACES[1:])}
    before = [p.clone() for p in params]
    expected, _ = reference.update(function, params, grads, moments, **options)
    counts, norms = kernels.update(function, ours_params, ours_grads, ours_moments, **options)
    assert torch.equal(counts.cpu(), expected)
    assert_norms(norms, grads, before, [p.cpu() for p in ours_params], torch.float32)
    kept = [*ours_params, *(m for ms in ours_moments for m in ms)]
    for ours, theirs in zip(kept, [*params, *(m for ms in moments for m in ms)], strict=True):
        assert (ours.cpu() == theirs).float().mean() > 0.97
        torch.testing.assert_close(ours.cpu().float(), theirs.float(), rtol=2**-7, atol=1e-3)


def test_a_count_of_bf16_moments() -> None:
    _, grads, (momenta,) = case("lion", [0, 40, 2500], 3, torch.float32, 0.3, 1)
    momenta = [momentum.bfloat16() for momentum in momenta]
    options: dict[str, Any] = {"threshold": 0.1, "scale": -1.0, "norms": True, "wide": True}
    expected, expected_norms = reference.count(grads, momenta, **options)
    counts, norms = kernels.count(here(grads), here(momenta), **options)
    assert torch.equal(counts.cpu(), expected)
    torch.testing.assert_close(norms.cpu(), expected_norms, rtol=1e-12, atol=0.0, equal_nan=True)
