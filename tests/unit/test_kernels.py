"""The CPU kernels against the rule: equal counts, and bits that differ only where torch's own sqrt rounds otherwise."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD, kernels, rule
from alphaadam_dist.kernels import build, cpu, reference

from .kernel_cases import DIRECTIONS, SIZES, assert_norms, case, options_of_update, placed, same, with_odd_ones

sizes = st.lists(st.sampled_from(SIZES), max_size=5)


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    cpu.load()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    direction=st.sampled_from(sorted(DIRECTIONS)), sizes=sizes, seed=st.integers(0, 10**6),
    dtype=st.sampled_from(cpu.DTYPES), special=st.sampled_from([0.0, 0.05, 0.6]), offset=st.integers(0, 5),
    threshold=st.sampled_from([0.0, 0.1, 1.0]), scale=st.sampled_from([None, -1.0, 0.37, torch.tensor(0.37)]),
)  # fmt: skip
def test_update(
    direction: str, sizes: list[int], seed: int, dtype: torch.dtype, special: float, offset: int, threshold: float,
    scale: Any,
) -> None:  # fmt: skip
    function, *_ = DIRECTIONS[direction]
    params, grads, moments = case(direction, sizes, seed, dtype, special, offset)
    params_before = [p.clone() for p in params]
    expected_params, expected_moments = [p.clone() for p in params], [[m.clone() for m in ms] for ms in moments]
    options = options_of_update(direction, len(sizes), threshold, scale)
    expected, expected_norms = reference.update(function, expected_params, grads, expected_moments, **options)
    counts, norms = cpu.update(function, params, grads, moments, **options)
    assert counts is not None
    assert torch.equal(counts, expected)
    assert_norms(norms, grads, params_before, params, dtype)
    assert_norms(expected_norms, grads, params_before, expected_params, dtype)
    for ours, theirs in zip([m for ms in moments for m in ms], [m for ms in expected_moments for m in ms], strict=True):
        assert same(ours, theirs).all()
    for before, ours, theirs in zip(params_before, params, expected_params, strict=True):
        if "adam" not in direction:
            assert same(ours, theirs).all()
        else:
            # torch's sqrt may be off by a unit in the last place, and with it the quotient that is added
            rounding = 4 * torch.finfo(dtype).eps * (before.abs() + theirs.abs())
            assert (same(ours, theirs) | ((ours - theirs).abs() <= rounding)).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sizes=sizes, seed=st.integers(0, 10**6), dtype=st.sampled_from(cpu.DTYPES),
    grad_dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    special=st.sampled_from([0.0, 0.05, 0.6]), offset=st.integers(0, 5), threshold=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([None, -1.0, 2.0**-16, torch.tensor(0.37)]),
)  # fmt: skip
def test_count(
    sizes: list[int], seed: int, dtype: torch.dtype, grad_dtype: torch.dtype, special: float, offset: int,
    threshold: float, scale: Any,
) -> None:  # fmt: skip
    _, grads, moments = case("lion", sizes, seed, dtype, special, offset)
    grads = [placed(grad.to(grad_dtype), offset) for grad in grads]
    expected, expected_norms = reference.count(grads, moments[0], threshold=threshold, scale=scale, norms=True)
    counts, norms = cpu.count(grads, moments[0], threshold=threshold, scale=scale, norms=True)
    assert torch.equal(counts, expected)
    assert norms is not None
    torch.testing.assert_close(norms, expected_norms, rtol=1e-12, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_bit_depends_on_the_place_or_the_threads(direction: str, threads: int) -> None:
    """A tensor, and the same cut into pieces that start anywhere."""
    function, _, hyperparameters = DIRECTIONS[direction]
    whole = case(direction, [100_003], 3, torch.float32, 0.05, 0)
    bounds = [0, 1, 18, 5000, 5017, 60_001, 100_003]

    def cut(tensor: Tensor) -> list[Tensor]:
        return [placed(tensor[a:b].clone(), a % 7) for a, b in itertools.pairwise(bounds)]

    pieces = [cut(whole[0][0]), cut(whole[1][0]), [cut(ms[0]) for ms in whole[2]]]
    before = torch.get_num_threads()
    counts = []
    for params, grads, moments, used in ((*whole, 1), (*pieces, threads)):
        torch.set_num_threads(used)
        strengths = torch.tensor([[1.9, 0.1]], dtype=torch.float64).expand(len(params), 2)
        steps = [7.0] * len(params) if "adam" in direction else None
        counted, _ = cpu.update(
            function, params, grads, moments, strengths=strengths, threshold=0.1, scale=0.7, counting=True,
            steps=steps, hyperparameters=hyperparameters,
        )  # fmt: skip
        counts.append(counted)
    torch.set_num_threads(before)
    assert torch.equal(counts[0].sum(0), counts[1].sum(0))
    assert same(whole[0][0], torch.cat(pieces[0])).all()
    for ours, theirs in zip(whole[2], pieces[2], strict=True):
        assert same(ours[0], torch.cat(theirs)).all()


def test_norms_do_not_depend_on_the_threads() -> None:
    grads = [torch.randn(50_000, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        counted = cpu.count(grads, grads, threshold=0.0, scale=None, norms=True)[1]
        lists = [[grad.clone() for grad in grads] for _ in range(2)]
        updated = cpu.update(rule.lion_, lists[0], grads, lists[1:], **options_of_update("lion", 3, 0.0, None))[1]
        seen.append((counted.tolist(), updated.tolist()))
    torch.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]


def test_dense_strides_are_flat_memory_and_others_go_to_the_reference() -> None:
    """A transposed matrix is one run of memory; a slice of columns is not."""
    for build_tensor in (lambda: torch.randn(6, 5).t(), lambda: torch.randn(5, 9)[:, :6]):
        torch.manual_seed(0)
        params, grads, momenta = ([build_tensor()] for _ in range(3))
        expected = [[t.clone(memory_format=torch.preserve_format) for t in ts] for ts in (params, momenta)]
        options: dict[str, Any] = {
            "strengths": torch.tensor([[2.0, 0.0]], dtype=torch.float64), "threshold": 0.0, "scale": None,
            "counting": True, "steps": None, "hyperparameters": DIRECTIONS["lion"][2],
        }  # fmt: skip
        reference.update(rule.lion_, expected[0], grads, [expected[1]], **options)
        cpu.update(rule.lion_, params, grads, [momenta], **options)
        assert torch.equal(params[0], expected[0][0])
        assert torch.equal(momenta[0], expected[1][0])


def test_fake_tensors_get_shapes() -> None:
    with FakeTensorMode():
        tensors = [torch.empty(3), torch.empty(5)]
        counts, norms, odd = torch.ops.alphaadam.count(tensors, tensors, 0.0, 1.0, True)
        assert counts.shape == (2, 2)
        assert norms.shape == (2,)
        strengths = torch.empty((2, 2), dtype=torch.float64)
        assert odd == []
        for asked, rows in (({}, 0), ({"norms": True}, 2)):
            counts, norms, odd = torch.ops.alphaadam.lion_(
                tensors, tensors, tensors, strengths, 0.0, 1.0, 1.0, -0.1, 0.9, 0.9, **asked
            )
            assert counts.shape == (2, 2)
            assert norms.shape == (rows, 2)
            assert odd == []


def test_torch_compile_sees_the_operators() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def counted(grad: Tensor, momentum: Tensor) -> Tensor:
        return torch.ops.alphaadam.count([grad * 2], [momentum], 0.0, 1.0, False)[0].sum(0)

    grad = torch.tensor([1.0, -1.0, 0.0, 2.0])
    assert counted(grad, torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist() == [2, 1]


def test_a_changed_parameter_cannot_be_used_backwards() -> None:
    """autograd must see that the kernel wrote to what it had saved."""
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    AlphaAdam([weight], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- the optimizers on them


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"scope": "layer", "gamma": 0.2}, {"threshold": 0.1},
                                     {"clip_norm": 1.0}, {"clip_norm": 1.0, "threshold": 0.1},
                                     {"maximize": True, "alpha_warmup": 3}], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD])
def test_the_optimizers_step_as_on_the_reference(kind: type, options: dict[str, Any]) -> None:
    runs = []
    for fused in (True, False):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((67, 8), (9,), (1,))]
        named = [(str(i), param) for i, param in enumerate(params)]
        optimizer = kind(named, lr=1e-2, weight_decay=0.1, fused=fused, **options)
        seen = []
        for step in range(8):
            for i, param in enumerate(params):
                param.grad = None if (step + i) % 5 == 4 else torch.randn(param.shape, generator=generator)
            optimizer.step()
            seen.append((optimizer.alpha, optimizer.agreement))
        runs.append((seen, params))
    assert runs[0][0] == runs[1][0]
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_param", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [AlphaAdam, AlphaLion, AlphaSGD])
def test_a_tensor_rate_is_one_number_on_all_kernels(kind: type, of_param: torch.dtype, dtype: torch.dtype) -> None:
    """Also the decay's, which is lost where it is computed in 16 bits; and torch's own where torch computes in more."""
    lr = torch.tensor(0.01, dtype=dtype)
    ended = []
    for fused, rate in ((False, lr), (True, lr), *([(True, float(lr))] if dtype.itemsize == 2 else [])):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(50, generator=generator, dtype=of_param)) for _ in range(2)]
        optimizer = kind(params, lr=rate, weight_decay=0.1, fused=fused)
        for _ in range(5):
            params[0].grad = torch.zeros(50, dtype=of_param)  # decays, and that is all
            params[1].grad = torch.randn(50, generator=generator, dtype=of_param)
            optimizer.step()
        ended.append(params)
    for decayed, stepped in ended[1:]:
        assert torch.equal(decayed, ended[0][0])
        if kind is AlphaAdam:  # but for torch's sqrt
            rounding = 8 * torch.finfo(of_param).eps
            torch.testing.assert_close(stepped, ended[0][1], rtol=rounding, atol=rounding)
        else:
            assert torch.equal(stepped, ended[0][1])


# ---- which kernels, and where they come from


def test_who_steps_what() -> None:
    device = torch.device("cpu")
    assert kernels.choose(False, device, 10**9) is reference
    assert kernels.choose(None, device, kernels.SMALL - 1) is reference
    assert kernels.choose(None, device, kernels.SMALL) is cpu
    assert kernels.choose(True, device, 1) is cpu


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    for function in (kernels._problem, cpu._load, build.load):
        function.cache_clear()
    yield
    kernels._problem.cache_clear()


def test_without_a_compiler_the_reference_goes_on_after_one_warning(
    forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALPHAADAM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler 'no-such-compiler': install g\\+\\+, or set CXX") as seen:
        assert kernels.choose(None, torch.device("cpu"), kernels.SMALL) is reference
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose(None, torch.device("cpu"), kernels.SMALL) is reference
    with pytest.raises(ValueError, match=r"fused=True, but there is no C\+\+ compiler"):
        kernels.choose(True, torch.device("cpu"), 1)


def test_a_failed_compilation_says_what_the_compiler_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAADAM_CACHE", str(tmp_path))
    with pytest.raises(build.Unavailable, match="-march=nothing"):
        build.library(["-march=nothing"])
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["lock"], "a failed build leaves nothing behind"


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAADAM_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    with pytest.raises(build.Unavailable, match="writable by others: chmod go-w"):
        build.library(build.MACHINE_FLAGS)
    (tmp_path / "kernels").chmod(0o700)
    tmp_path.chmod(0o770)
    with pytest.raises(build.Unavailable, match="ALPHAADAM_CACHE"):
        build.library(build.MACHINE_FLAGS)


_BITS = """
import sys, torch
torch.ops.load_library(sys.argv[1])
generator = torch.Generator().manual_seed(0)
p, g, m, v = (torch.randn(40_003, generator=generator) for _ in range(4))
v = v.abs()
strengths = torch.tensor([[1.9, 0.1]], dtype=torch.float64)
made = torch.ops.alphaadam.adam_([p], [g], [m], [v], strengths, 0.1, 0.7, 0.999, [-0.037], [3.0], 0.9, 0.999, 1e-8)
print(made[0].tolist(), *(int(t.view(torch.int32).long().sum()) for t in (p, m, v)))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86-64 processors")
def test_processors_of_several_kinds_give_the_same_bits() -> None:
    """Nodes of a cluster need not be alike: AVX2 and what this processor has, each compiled as if it were all."""
    printed = set()
    for flags in (build.MACHINE_FLAGS, ["-march=haswell"]):
        line = [sys.executable, "-c", _BITS, str(build.library(flags))]
        printed.add(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert len(printed) == 1


# ---- one odd tensor in a list ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"clip_norm": 0.1}, {"clip_norm": 0.1, "threshold": 0.1}])
def test_an_odd_tensor_goes_to_the_reference_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' step is the kernels', and a gradient in another order than its parameter is put in order."""
    seen: list[torch.Size] = []

    def noted(direction: Any, params: list[Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        seen.extend(param.shape for param in params)
        return update(direction, params, *args, **kwargs)

    def build() -> dict[str, torch.nn.Parameter]:
        return {name: torch.nn.Parameter(param) for name, param in with_odd_ones().items()}

    update, ours, expected = reference.update, build(), build()
    monkeypatch.setattr(kernels, "SMALL", 0)
    fast, slow = AlphaAdam(ours.items(), **options), AlphaAdam(expected.items(), fused=False, **options)
    for step in range(3):
        for name, param in ours.items():
            grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            expected[name].grad = grad.to(param.dtype)
            param.grad = grad.mT.contiguous().mT if name == "transposed gradient" else grad.to(param.dtype)
        slow.step()
        with monkeypatch.context() as patch:
            patch.setattr(reference, "update", noted)
            fast.step()
        assert fast.agreement == slow.agreement
    assert seen == 3 * [ours["bf16"].shape, ours["gaps"].shape]
    for name, param in ours.items():
        torch.testing.assert_close(param, expected[name], rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(param, expected[name]) or name not in ("bf16", "gaps")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bf16", {}, r"'bf16' has dtype torch.bfloat16, .* or give state_dtype='bfloat16'. Or leave fused=None"),
        ("gaps", {}, r"'gaps' has strides \(.*\), with gaps in its memory: give the module param.contiguous\(\)"),
        ("transposed", {"state_dtype": "bfloat16"}, r"'transposed' has strides \(80, 1, 10\), and with state_dtype="),
    ],
)
def test_fused_names_the_parameter_that_it_does_not_take(name: str, options: dict[str, Any], says: str) -> None:
    held = with_odd_ones()
    params = [("plain", torch.nn.Parameter(held["plain"])), (name, torch.nn.Parameter(held[name]))]
    for _, param in params:
        param.grad = torch.ones_like(param)
    before = params[0][1].clone()
    with pytest.raises(ValueError, match=f"fused=True, but parameter {says}"):
        AlphaAdam(params, fused=True, **options).step()
    assert torch.equal(params[0][1], before)
