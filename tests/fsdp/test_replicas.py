"""Ranks that claim one part of a parameter must hold copies: proved when a run starts, watched by verify_every."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from alphaadam_dist import AlphaAdam, parameters, replicas
from tests.models import Given, given_gradients

from .. import threads
from ..equality import given, pieces
from ..older import before_2_7
from .test_model_ranks import alone, assert_one_process, trained


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(6, 5, generator=generator), "norm": torch.ones(5)}


def give(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator)


def refused(optimizer: AlphaAdam) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011  the caller looks at the message
        optimizer.step()
    return str(error.value)


# ---- pipeline stages and experts of equal local names


def stage(values: int, gradients: int, name: str = "{}") -> tuple[dict[str, nn.Parameter], AlphaAdam]:
    named = {name.format(n): nn.Parameter(value) for n, value in tensors(values).items()}
    give(named.items(), gradients)
    return named, AlphaAdam(named.items(), lr=1e-2, clip_norm=1.0, process_group=dist.group.WORLD)


def stages_of_equal_names() -> str:
    return refused(stage(dist.get_rank(), dist.get_rank())[1])


def test_stages_of_equal_names_are_refused_on_every_rank() -> None:
    messages = threads.run(3, stages_of_equal_names)
    assert len(set(messages)) == 1
    found = re.search(r"different values of parameter 'weight' \(one on rank 0, another on rank 1, another on rank 2; "
                      r"relative deviation 1\.\de\+00\)", messages[0])  # fmt: skip
    assert found, messages[0]
    assert "that is unique in the whole model" in messages[0]
    assert "broadcast them from one rank before the first step" in messages[0]


def stages_of_one_seed() -> None:
    stage(0, dist.get_rank())[1].step()


def test_stages_of_equal_names_that_began_from_one_seed_are_told_apart_by_their_gradients(
    said: dict[int, list[str]],
) -> None:
    """A warning, not an error: local SGD looks the same."""
    threads.run(2, stages_of_one_seed)
    assert said[0] == said[1]
    (message,) = said[0]
    assert re.search(r"equal values of one part have unrelated gradients of parameter '(weight|norm)' and 1 more \(one "
                     r"on rank 0, another on rank 1; relative deviation 1\.\de\+00\)", message)  # fmt: skip
    assert "that is unique in the whole model" in message
    assert "The run goes on; this is said once" in message


def stages_of_one_seed_later() -> None:
    named, optimizer = stage(0, dist.get_rank())
    optimizer.defaults["verify_every"] = 1
    for group in optimizer.param_groups:
        group["verify_every"] = 1
    for _ in range(2):
        optimizer.step()
        give(named.items(), dist.get_rank())


def test_a_first_warning_of_gradients_does_not_end_what_verify_every_says_of_values(said: dict[int, list[str]]) -> None:
    threads.run(2, stages_of_one_seed_later)
    assert said[0] == said[1]
    of_gradients, of_values = said[0]
    assert "unrelated gradients of parameter" in of_gradients
    assert of_values.startswith("verify_every: ranks that should hold copies of one part hold different values of")


def stages_of_unique_names() -> Any:
    rank = dist.get_rank()
    named, optimizer = stage(0, rank, f"stage{rank}.{{}}")
    optimizer.step()
    return optimizer.agreement, [param.detach() for param in named.values()]


def test_with_the_names_that_the_message_asks_for_they_are_one_model() -> None:
    whole = {f"{i}.{n}": nn.Parameter(v) for i in range(2) for n, v in tensors(0).items()}
    for i in range(2):
        give([(n, p) for n, p in whole.items() if n[0] == str(i)], i)
    one = AlphaAdam(whole.items(), lr=1e-2, clip_norm=1.0)
    one.step()
    answers = threads.run(2, stages_of_unique_names)
    assert [agreement for agreement, _ in answers] == [one.agreement] * 2
    held = [param for _, params in answers for param in params]
    for param, expected in zip(held, whole.values(), strict=True):
        torch.testing.assert_close(param, expected.detach(), rtol=1e-6, atol=0)  # the norm is summed in another order


def expert_parallel(*, same_seed: bool) -> AlphaAdam:
    """A model under FSDP2 whose experts are plain tensors, one on each rank, of one local name."""
    model = given.fsdp2(Given(), given.mesh(dp=2))
    expert = nn.Parameter(tensors(0 if same_seed else dist.get_rank())["weight"])
    optimizer = AlphaAdam([*model.named_parameters(), ("expert.weight", expert)], lr=1e-2)
    given.give(model, given_gradients(1)[0])
    give([("", expert)], dist.get_rank())
    return optimizer


def experts_of_other_seeds() -> str:
    return refused(expert_parallel(same_seed=False))


def experts_of_one_seed() -> None:
    expert_parallel(same_seed=True).step()


def test_experts_are_not_taken_for_replicas(said: dict[int, list[str]]) -> None:
    for message in threads.run(2, experts_of_other_seeds):
        assert "different values of parameter 'expert.weight' (" in message
    threads.run(2, experts_of_one_seed)
    assert set(said) == {0, 1}
    for (message,) in said.values():
        assert "unrelated gradients of parameter 'expert.weight' (" in message


def of_other_lengths() -> str:
    parts = [nn.Parameter(torch.ones(2 + dist.get_rank()))]
    return refused(AlphaAdam([("weight", parts[0])], process_group=dist.group.WORLD))


def test_one_name_of_two_lengths_is_refused_with_the_way_out() -> None:
    for message in threads.run(2, of_other_lengths):
        assert "'weight'" in message
        assert "names that are unique in the whole model" in message


def of_other_dtypes() -> str:
    param = nn.Parameter(tensors(0)["weight"].to((torch.float32, torch.float64)[dist.get_rank()]))
    return refused(AlphaAdam([("weight", param)], process_group=dist.group.WORLD))


def test_one_parameter_of_two_dtypes_is_refused() -> None:
    """The values are equal, and their deviation is 0: only the bits are not."""
    assert all("relative deviation 0.0e+00" in message for message in threads.run(2, of_other_dtypes))


# ---- replicas that never were one, or do not stay one


def hsdp(model_seed: int, gradient_seed: int = 1) -> AlphaAdam:
    model = given.fsdp2(Given(model_seed), given.mesh(replicate=2, shard=2))
    optimizer = AlphaAdam(model.named_parameters())
    given.give(model, given_gradients(1, gradient_seed)[0])
    return optimizer


def replicas_of_other_seeds() -> str:
    return refused(hsdp(dist.get_rank() // 2))


def replicas_of_other_gradients() -> None:
    hsdp(0, 1 + dist.get_rank() // 2).step()


def test_replicas_of_other_seeds_are_refused() -> None:
    messages = threads.run(4, replicas_of_other_seeds)
    assert len(set(messages)) == 1
    assert re.search(r"one on rank \d, another on rank \d; relative deviation 1\.\d", messages[0])
    assert "never made equal (other seeds?)" in messages[0]


@before_2_7("makes DTensors of what rank 0 has, so the gradients of this test would be equal")
def test_replicas_whose_gradients_were_not_averaged_are_told(said: dict[int, list[str]]) -> None:
    threads.run(4, replicas_of_other_gradients)
    assert set(said) == {0, 1, 2, 3}
    messages = [message for (message,) in said.values()]
    assert len(set(messages)) == 1
    assert "average their gradients before step()" in messages[0]


def nearly_equal(change: Callable[[Tensor], Tensor]) -> None:
    """Plain replicas, of which rank 1 gets another gradient."""
    named = {name: nn.Parameter(value) for name, value in tensors(0).items()}
    optimizer = AlphaAdam(named.items(), process_group=dist.group.WORLD)
    give(named.items(), 0)
    if dist.get_rank() == 1:
        for param in named.values():
            param.grad = change(param.grad)
    optimizer.step()


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "rounding": lambda grad: grad * (1 + 1e-6),
    "bf16": lambda grad: grad.bfloat16().float(),
    "a tenth": lambda grad: grad * 0.9,
    "nan": lambda grad: torch.full_like(grad, torch.nan),
    "none": lambda grad: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_that_a_backward_may_give_to_copies_are_let_through(change: str, said: dict[int, list[str]]) -> None:
    threads.run(2, nearly_equal, CHANGES[change])
    assert said == {}


def drifting(regime: str, options: dict[str, Any], heard: dict[int, list[str]], steps: int = 6) -> list[int]:
    """Rank 1's copies grow by a tenth after the second step. In which steps something was said."""
    _, shard, extra = given.REGIMES[regime]
    model = shard(Given())
    optimizer = AlphaAdam(model.named_parameters(), lr=1e-9, weight_decay=0.0, **options, **extra())
    when = []
    for step, gradients in enumerate(given_gradients(steps)):
        if step == 2 and dist.get_rank() == 1:
            with torch.no_grad():
                for param in model.parameters():
                    pieces.local(param).mul_(1.1)
        given.give(model, gradients)
        before = len(heard[dist.get_rank()])
        optimizer.step()
        when += [step] * (len(heard[dist.get_rank()]) - before)
        optimizer.zero_grad()
    return when


@pytest.mark.parametrize("regime", ["ddp", "hsdp", "tp"])
def test_replicas_that_drift_are_told_once_with_their_deviation(regime: str, said: dict[int, list[str]]) -> None:
    """Every part here has the same deviation, 0.1 / 1.1."""
    assert threads.run(4, drifting, regime, {"verify_every": 2}, said) == [[2]] * 4
    messages = [message for (message,) in said.values()]
    assert len(set(messages)) == 1
    assert messages[0].startswith("verify_every: ranks that should hold copies of one part hold different values of")
    found = re.search(r"one on ranks? ([\d, ]+), another on ranks? ([\d, ]+); relative deviation (\S+)\)", messages[0])
    assert found, messages[0]
    assert "1" in (found[1], found[2])
    assert float(found[3]) == pytest.approx(0.1 / 1.1, rel=0.05)
    assert "The run goes on" in messages[0]


@pytest.mark.parametrize("regime", ["fsdp2", "by-hand", "pipeline"])
def test_where_nobody_holds_a_copy_nothing_can_drift(regime: str, said: dict[int, list[str]]) -> None:
    assert threads.run(4, drifting, regime, {"verify_every": 2}, said) == [[]] * 4


def unsynchronised_replicas(verify_every: int) -> str:
    named = {name: nn.Parameter(value) for name, value in tensors(dist.get_rank()).items()}
    optimizer = AlphaAdam(named.items(), verify_every=verify_every)
    give(named.items(), 0)
    if verify_every:
        return refused(optimizer)
    optimizer.step()
    return ""


def test_replicas_without_a_group_are_compared_where_that_is_asked_for() -> None:
    """Plain tensors and no process group: nothing is sent, unless verify_every says so."""
    assert threads.run(2, unsynchronised_replicas, 0) == ["", ""]
    for message in threads.run(2, unsynchronised_replicas, 1):
        assert message.startswith("verify_every: ranks that should hold copies of one part hold different values of "
                                  "parameter 'weight' (one on rank 0, another on rank 1; ")  # fmt: skip


def of_other_names() -> str:
    optimizer = AlphaAdam([(f"weight{dist.get_rank()}", nn.Parameter(torch.ones(3)))], verify_every=1)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_ranks_without_a_group_that_hold_other_parameters_are_told_so() -> None:
    for message in threads.run(2, of_other_names):
        assert re.search(r"parameters is '1 of 3 elements, checksum of their names \w+' on rank 0 but ", message)


# ---- not at the start of a run: a warning, once, and on all ranks the same


def differing_at(moment: str) -> None:
    """Copies that differ where a layout is built: at the start, in a run that one rank resumed, or with a new group."""
    named = {name: nn.Parameter(value) for name, value in tensors(0).items()}
    late = nn.Parameter(torch.arange(4.0))
    optimizer = AlphaAdam(named.items(), process_group=dist.group.WORLD)
    if moment == "joined":
        give(named.items(), 0)
        optimizer.step()
        optimizer.add_param_group({"params": [("late", late)]})
    if moment == "resumed" and dist.get_rank() == 1:
        copies = {name: nn.Parameter(param.detach().clone()) for name, param in named.items()}
        other = AlphaAdam(copies.items())
        give(copies.items(), 0)
        other.step()
        optimizer.load_state_dict(other.state_dict())
    with torch.no_grad():
        for param in (*named.values(), late):
            param.mul_(1 + dist.get_rank())
    for _ in range(3):
        give(named.items(), 0)
        optimizer.step()


@pytest.mark.parametrize("moment", ["resumed", "joined"])
def test_a_run_that_goes_on_does_not_die_of_it(moment: str, said: dict[int, list[str]]) -> None:
    threads.run(2, differing_at, moment)
    assert set(said) == {0, 1}
    for (message,) in said.values():
        assert "hold different values of parameter" in message
        assert "The run goes on; this is said once" in message


def test_a_run_that_starts_does() -> None:
    with pytest.raises(Exception, match="hold different values of parameter"):
        threads.run(2, differing_at, "start")


# ---- copies that are told to be parts


def hybrid(original: bool, group: str) -> Any:
    """FSDP1 under HYBRID_SHARD, which keeps a copy of the model in each of two groups of ranks."""
    model = given.fsdp1(Given(), use_orig_params=original, device_mesh=given.mesh(replicate=2, shard=2),
                        sharding_strategy=ShardingStrategy.HYBRID_SHARD)  # fmt: skip
    process_group = model.process_group if group == "model" else dist.group.WORLD
    optimizer = AlphaAdam(model.named_parameters(), clip_norm=0.1, process_group=process_group)
    given.give(model, given_gradients(1)[0])
    if original and group == "world":
        return refused(optimizer)
    optimizer.step()
    return float(optimizer._adopt().clip_coefficient())


def test_hybrid_shard_over_the_world_is_refused_and_over_its_group_clips_right() -> None:
    for message in threads.run(4, hybrid, True, "world"):
        assert "ranks 0, 2 hold the very same elements of every parameter" in message
        assert "process_group= must be the group of one copy: model.process_group" in message
    norm = torch.cat([gradient.flatten() for gradient in given_gradients(1)[0].values()]).norm()
    for original, group in ((True, "model"), (False, "model"), (False, "world")):
        coefficients = threads.run(4, hybrid, original, group)
        assert coefficients == pytest.approx([float(0.1 / norm)] * 4, rel=1e-5)


def by_hand(values: list[list[float]], gradients: list[list[float]]) -> str:
    rank = dist.get_rank()
    first = nn.Parameter(torch.tensor(values[rank], dtype=torch.float32))
    params = [first, nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0))]
    optimizer = AlphaAdam(zip("abc", params, strict=True), sharding="sharded")
    first.grad = torch.tensor(gradients[rank], dtype=torch.float32)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "served"


@pytest.mark.parametrize(
    ("values", "gradients", "served"),
    [
        ([[1, 2], [1, 2]], [[1, 1], [1, 1]], False),
        ([[1, 2], [1, 3]], [[1, 1], [1, 1]], True),
        ([[1, 1], [1, 1]], [[1, 1], [1, 1]], True),  # of one value: they prove nothing
        ([[0, 0], [0, 0]], [[1, 1], [1, 1]], True),
        ([[], []], [[], []], True),
        ([[1, 2], [1, 2]], [[1, 1], [1, -1]], True),  # parts that began alike
    ],
)
def test_plain_shards_that_are_copies_are_refused(values: Any, gradients: Any, served: bool) -> None:
    for message in threads.run(2, by_hand, values, gradients):
        assert (message == "served") == served
        assert served or "ranks 0, 1 hold the very same elements" in message


# ---- what cannot be read proves nothing, and what is right is not complained of


def without_memory() -> int:
    here, nowhere = nn.Parameter(torch.ones(4)), nn.Parameter(torch.full((4,), float(dist.get_rank())))
    nowhere.untyped_storage().resize_(0)  # as where it lies on disk
    layout = parameters.current_layout(
        AlphaAdam([("here", here), ("nowhere", nowhere)], process_group=dist.group.WORLD)
    )
    return layout.replicas


def test_parameters_that_are_not_in_memory_are_not_compared() -> None:
    assert threads.run(2, without_memory) == [2, 2]


def one_process_again() -> Any:
    return trained(given.fsdp2(Given(), given.mesh(replicate=2, shard=2)).named_parameters(), verify_every=1)


def test_the_comparison_changes_nothing() -> None:
    assert_one_process(threads.run(4, one_process_again), alone())


def no_comparison(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replicas, "prove", lambda *args: None)


def test_without_the_comparison_a_stage_counts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is for: the clip coefficient of two stages would be that of one."""
    no_comparison(monkeypatch)
    with pytest.raises(Exception, match="DID NOT RAISE"):
        threads.run(2, stages_of_equal_names)
