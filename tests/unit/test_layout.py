"""Cutting flats, padding, layouts and the proof that each element counts once, without the optimizer."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from alphaadam_dist import AlphaAdam
from alphaadam_dist.layout import Layout, Segment, _with_padding, build_layout
from alphaadam_dist.shards import Shard, clean_name, clean_names, cut

from ..ranks import Ranks

CPU = torch.device("cpu")

# ---- cut


def cut_to_lists(pieces: list[Tensor], runs: list[tuple[int, int, str]]) -> list[tuple[str, int, list[float]]]:
    return [(label, start, view.tolist()) for label, start, view in cut(pieces, runs)]


@pytest.mark.parametrize(
    ("pieces", "runs", "expected"),
    [
        ([[0, 1, 2]], [(0, 3, "a")], [("a", 0, [0, 1, 2])]),
        ([[0, 1, 2]], [(1, 1, "a")], [("a", 1, [1])]),
        ([[0, 1, 2]], [(0, 1, "a"), (2, 1, "b")], [("a", 0, [0]), ("b", 2, [2])]),
        ([[0, 1], [2, 3, 4]], [(1, 3, "a")], [("a", 1, [1]), ("a", 2, [2, 3])]),
        ([[0], [1], [2]], [(0, 3, "a")], [("a", 0, [0]), ("a", 1, [1]), ("a", 2, [2])]),
        ([[0, 1], [2, 3]], [(0, 2, "a"), (2, 2, "b")], [("a", 0, [0, 1]), ("b", 2, [2, 3])]),
        ([[0, 1], [], [2]], [(0, 3, "a")], [("a", 0, [0, 1]), ("a", 2, [2])]),
        ([[], [0, 1]], [(0, 2, "a")], [("a", 0, [0, 1])]),
        ([[0, 1, 2]], [(0, 2, "a"), (2, 0, "empty"), (2, 1, "b")], [("a", 0, [0, 1]), ("b", 2, [2])]),
        ([[0, 1]], [(0, 5, "a")], [("a", 0, [0, 1])]),  # the pieces end before the run: what there is
        ([[0, 1]], [(4, 2, "a")], []),
        ([[0, 1, 2, 3]], [], []),
        ([], [(0, 2, "a")], []),
        ([[]], [(0, 0, "a")], []),
        ([[0, 1, 2, 3], [4, 5]], [(0, 1, "a"), (3, 2, "b"), (5, 1, "c")],
         [("a", 0, [0]), ("b", 3, [3]), ("b", 4, [4]), ("c", 5, [5])]),
    ],
)  # fmt: skip
def test_cut(pieces: list[list[float]], runs: list[Any], expected: list[Any]) -> None:
    assert cut_to_lists([torch.tensor(p, dtype=torch.float64) for p in pieces], runs) == expected


def test_cut_gives_views_and_flattens_pieces() -> None:
    flat = torch.arange(6.0)
    views = list(cut([flat.view(2, 3)], [(1, 4, "a")]))
    assert views[0][2].tolist() == [1, 2, 3, 4]
    views[0][2].zero_()
    assert flat.tolist() == [0, 0, 0, 0, 0, 5]


def test_cut_covers_every_element_of_every_run_for_any_cutting() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(0, 5, (6,), generator=generator).tolist()
        flat = torch.arange(float(sum(lengths)))
        edges = sorted(torch.randint(0, len(flat) + 1, (6,), generator=generator).tolist())
        runs = [(a, b - a, str(i)) for i, (a, b) in enumerate(zip(edges[::2], edges[1::2], strict=True))]
        got: dict[str, list[float]] = {label: [] for _, _, label in runs}
        for label, start, view in cut(list(flat.split(lengths)), runs):
            assert view.tolist() == flat[start : start + len(view)].tolist()
            assert len(view) > 0
            got[label] += view.tolist()
        assert got == {label: flat[start : start + n].tolist() for start, n, label in runs}


# ---- padding and names


@pytest.mark.parametrize(
    ("runs", "numel", "expected"),
    [
        ([(0, 4, 7, True)], 4, [(0, 4, 7, True)]),
        ([(0, 4, 7, False)], 4, [(0, 4, 7, False)]),
        ([(0, 4, 7, True)], 6, [(0, 4, 7, True), (4, 2, 7, False)]),
        ([(2, 2, 7, True)], 4, [(0, 2, 7, False), (2, 2, 7, True)]),
        ([(0, 1, 3, True), (3, 1, 5, True)], 5, [(0, 1, 3, True), (1, 2, 5, False), (3, 1, 5, True), (4, 1, 5, False)]),
        ([(0, 2, 3, True), (2, 2, 5, True)], 4, [(0, 2, 3, True), (2, 2, 5, True)]),
        ([(0, 0, 3, True)], 0, [(0, 0, 3, True)]),
        ([(0, 0, 3, True)], 2, [(0, 0, 3, True), (0, 2, 3, False)]),
        ([], 3, [(0, 3, 0, False)]),
        ([], 0, []),
    ],
)
def test_padding_fills_every_gap_and_is_owned_by_nobody(runs: list[Any], numel: int, expected: list[Any]) -> None:
    own = [Segment(start, count, row, mine, whole=count == numel) for start, count, row, mine in runs]
    segments = list(_with_padding(own, numel))
    full = [(segment.start, segment.numel, segment.row, segment.owned) for segment in segments]
    assert full == expected
    assert all(segment.whole == (segment.numel == numel) for segment in segments)
    position = 0
    for start, count, _, _ in full:
        assert start == position
        position += count
    assert position == numel


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("a.b", "a.b"),
        ("_orig_mod.a", "a"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c", "a.b.c"),
        ("module.a", "module.a"),  # of one name nobody can tell whether it is DDP's
        ("my_orig_mod.a", "my_orig_mod.a"),
        ("a._orig_mod_.b", "a._orig_mod_.b"),
    ],
)
def test_clean_name(name: str, clean: str) -> None:
    assert clean_name(name) == clean


@pytest.mark.parametrize(
    ("names", "clean"),
    [
        (["a.w", "b.w"], ["a.w", "b.w"]),
        (["module.a.w", "module.b.w"], ["a.w", "b.w"]),  # DDP
        (["_orig_mod.module.a.w", "_orig_mod.module.b.w"], ["a.w", "b.w"]),
        (["module._orig_mod.a.w", "module._orig_mod.b.w"], ["a.w", "b.w"]),
        (["a.module.w", "submodule.w"], ["a.module.w", "submodule.w"]),
        # a model that calls a part of itself "module", bare and under DDP: its names are the same
        (["head.w", "module.head.w"], ["head.w", "module.head.w"]),
        (["module.head.w", "module.module.head.w"], ["head.w", "module.head.w"]),
        (["module.head.w"], ["head.w"]),
        (["module.module.head.w"], ["head.w"]),
        # names that only wrappers tell apart
        (["a._orig_mod.w", "a.w"], ["a._orig_mod.w", "a.w"]),
        (["module.a._orig_mod.w", "module.a.w", "module.module.a.w"],) * 2,
    ],
)
def test_clean_names(names: list[str], clean: list[str]) -> None:
    assert list(clean_names(names).values()) == clean


class HeadAndModule(nn.Module):
    """A legal model whose parameters' names differ only by what DDP would put into them."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"head": nn.Linear(2, 2)})
        self.head = nn.Linear(2, 2)


def test_a_part_called_module_is_no_wrapper() -> None:
    model = HeadAndModule()
    optimizer = AlphaAdam(model.named_parameters(), scope="layer")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert set(optimizer.alpha) == {name for name, _ in model.named_parameters()}


# ---- layouts without a group


def made(shards: list[list[Shard]], extents: list[int], **options: Any) -> Layout:
    params = [torch.zeros(n) for n in extents]
    given: dict[str, Any] = {"scope": "global", "group": None, "device": CPU, **options}
    return build_layout(params, shards, extents, **given)


def test_without_a_group_everything_is_owned_here() -> None:
    built = made([[Shard("a", (), 0, 4, 4)], [Shard("b", (), 0, 3, 3)]], [4, 3])
    assert (built.rows, built.numel, built.group, built.keys) == (1, 7, None, {})
    for param, numel in zip(built.params, (4, 3), strict=True):
        (segment,) = built.segments[param]
        assert (segment.start, segment.numel, segment.row, segment.owned, segment.whole) == (0, numel, 0, True, True)


def test_layer_scope_has_a_row_for_each_parameter_and_its_name() -> None:
    held = [[Shard("a", (), 0, 4, 4), Shard("b", (), 4, 2, 2)], [Shard("c", (), 0, 3, 3)]]
    built = made(held, [8, 3], scope="layer", names=["a", "b", "c", "elsewhere"])
    assert built.rows == 3
    assert set(built.keys.values()) == {"a", "b", "c"}
    flat = [(built.keys[s.row], s.start, s.numel, s.owned, s.whole) for p in built.params for s in built.segments[p]]
    assert flat == [
        ("a", 0, 4, True, False),
        ("b", 4, 2, True, False),
        ("b", 6, 2, False, False),  # padding lies in some row, and adds nothing to it
        ("c", 0, 3, True, True),
    ]
    again = made(held[::-1], [3, 8], scope="layer")
    assert again.keys == built.keys  # rows follow the names, not the order in which a rank lists its parameters


def test_merge_makes_one_run_of_what_is_all_owned() -> None:
    held = [[Shard("a", (), 0, 4, 4), Shard("b", (), 4, 2, 2)]]
    built = made(held, [8], merge=True)
    (segment,) = built.segments[built.params[0]]
    assert (segment.start, segment.numel, segment.owned, segment.whole) == (0, 8, True, True)
    assert built.numel == 6
    assert len(made(held, [8], merge=True, scope="layer").segments) == 1
    by_layer = made(held, [8], merge=True, scope="layer")
    assert len(by_layer.segments[by_layer.params[0]]) == 3


def test_an_empty_shard_is_whole() -> None:
    built = made([[Shard("a", (), 0, 0, 0)]], [0])
    assert [(s.numel, s.whole) for s in built.segments[built.params[0]]] == [(0, True)]


def test_indices_are_rows_and_ownership() -> None:
    built = made([[Shard("a", (), 0, 4, 4), Shard("b", (), 6, 2, 2)]], [9], scope="layer")
    segments = built.segments[built.params[0]]
    rows, owned = built.indices(segments)
    assert [built.keys[r] for r in rows.tolist()] == ["a", "b", "b", "b"]
    assert owned.tolist() == [1, 0, 1, 0]
    assert owned.dtype == torch.float64
    assert built.indices(segments)[0] is rows


def test_a_layout_of_other_segments_answers_for_itself() -> None:
    """DeepSpeed's flats stay the same tensors where a step leaves some of their parameters out."""
    built = made([[Shard("a", (), 0, 4, 4), Shard("b", (), 4, 2, 2)]], [6], merge=False)
    (flat,) = built.params
    first, second = built.cut_of([flat]).segments
    assert (first.numel, second.numel) == (4, 2)
    without = dataclasses.replace(built, segments={flat: (second,)})
    assert without.cut_of([flat]).segments == (second,)
    assert built.cut_of([flat]).segments == (first, second)


@pytest.mark.parametrize("where", ["one parameter", "two parameters"])
def test_two_parameters_of_one_key_are_refused(where: str) -> None:
    a, b = Shard("twice", (), 0, 2, 2), Shard("twice", (), 2, 2, 2)
    held = [[a, b]] if where == "one parameter" else [[a], [Shard("twice", (), 0, 2, 2)]]
    with pytest.raises(ValueError, match=r"two parameters are named 'twice'.*name of its own"):
        made(held, [4] if where == "one parameter" else [2, 2])


# ---- owners and coverage over a group


def owned_by_each(table: list[list[tuple[str, Any, int, int | None]]]) -> Any:
    """On a rank: build a layout of its line of the table; what it owns, or the error."""
    rank = dist.get_rank()
    held = [[Shard(key, part, 0, n, whole)] for key, part, n, whole in table[rank]]
    group = dist.group.WORLD
    try:
        built = made(held, [shards[0].numel for shards in held], group=group, scope="layer")
    except ValueError as error:
        return str(error)
    segments = [built.segments[param][0] for param in built.params]
    return [s.owned for s in segments], built.numel, built.rows, [built.keys[s.row] for s in segments]


def test_the_lowest_rank_that_holds_a_part_owns_it(ranks4: Ranks) -> None:
    """a: four parts; b: two parts, each twice (HSDP); c: whole everywhere; d: on a submesh of ranks 1 and 3 only."""
    table = [
        [("a", (r,), 3, 12), ("b", (r % 2,), 5, 10), ("c", (), 7, 7)] + ([("d", (r,), 2, 4)] if r % 2 else [])
        for r in range(4)
    ]
    answers = ranks4.run(owned_by_each, table)
    assert [a[0] for a in answers] == [
        [True, True, True],
        [True, True, False, True],
        [True, False, False],
        [True, False, False, True],
    ]
    assert {a[1] for a in answers} == {12 + 10 + 7 + 4}
    assert {a[2] for a in answers} == {4}
    assert answers[1][3] == ["a", "b", "c", "d"]


def test_a_rank_may_hold_nothing(ranks4: Ranks) -> None:
    table: list[Any] = [[("a", (0,), 3, 3)], [("a", (1,), 0, 3)], [], []]
    answers = ranks4.run(owned_by_each, table)
    assert [a[0] for a in answers] == [[True], [True], [], []]
    assert {a[1] for a in answers} == {3}


@pytest.mark.parametrize(
    ("numels", "held"), [((3, 3, 3, 2), 11), ((4, 4, 3, 3), 14), ((12, 12, 12, 12), 48), ((0, 0, 0, 0), 0)]
)
def test_parts_that_miss_or_overlap_are_refused_on_every_rank(
    ranks4: Ranks, numels: tuple[int, ...], held: int
) -> None:
    table = [[("right", (r,), 1, 4), ("wrong", (r,), n, 12)] for r, n in enumerate(numels)]
    for rank, message in enumerate(ranks4.run(owned_by_each, table)):
        assert isinstance(message, str)
        assert "'wrong' has 12 elements" in message
        assert f"hold {held} different ones" in message
        assert f"{numels[rank]} elements" in message
        assert "process_group" in message


def test_what_one_rank_finds_stops_all_and_all_name_it(ranks4: Ranks) -> None:
    """Plain tensors that differ in size: rank 0, their owner, sees nothing wrong with its own."""
    table = [[("w", (), 5 if r == 0 else 3, 5 if r == 0 else 3)] for r in range(4)]
    messages = ranks4.run(owned_by_each, table)
    assert all(isinstance(message, str) for message in messages), messages
    assert "'w' has 3 elements" in messages[1]
    assert "hold 5 different ones" in messages[1]
    assert "'w'" in messages[0]


def duplicated_on_rank_one() -> str:
    group = dist.new_group(timeout=timedelta(seconds=2))
    keys = ["a", "twice", "twice"] if dist.get_rank() == 1 else ["a", "b", "c"]
    try:
        made([[Shard(key, (), 0, 2, 2)] for key in keys], [2, 2, 2], group=group)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_one_key_twice_on_one_rank_stops_all_and_none_waits(ranks2: Ranks) -> None:
    first, second = ranks2.run(duplicated_on_rank_one)
    assert second.startswith("ValueError: two parameters are named 'twice'")
    assert first.startswith("ValueError")


def test_the_numel_of_the_model_counts_replicas_once(ranks2: Ranks) -> None:
    table = [[("a", (), 7, 7), ("b", (r,), 2 + r, 5), ("unknown whole", (r,), 4, None)] for r in range(2)]
    answers = ranks2.run(owned_by_each, table)
    assert [a[1] for a in answers] == [7 + 5 + 8] * 2
    assert [a[0] for a in answers] == [[True, True, True], [False, True, True]]
