"""AlphaAdam for some parameters and another optimizer for the rest, in one training: docs/recipes.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from alphaadam_dist import AlphaAdam
from tests.models import Given, given_gradients

from .. import threads
from ..equality import given, pieces

Muon = getattr(torch.optim, "Muon", None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(Muon is None, reason="this torch has no Muon")]


def trained(regime: str, folder: str, *, load: bool = False, **options: Any) -> dict[str, Any]:
    """Six steps with given gradients, saved after three; or what was saved, loaded over other numbers, and the rest."""
    model = given.REGIMES[regime][1](Given(seed=int(load)))
    named = dict(model.named_parameters())
    matrix = named.pop("weight")
    ours = AlphaAdam(named.items(), lr=given.LR, **options)
    theirs = Muon([("weight", matrix)], lr=given.LR)
    both, seen = [ours, theirs], []
    for i, gradients in enumerate(given_gradients(6)):
        if i < 3 and load:
            continue
        if i == 3 and folder:
            held = dict(zip(("model", "optimizers"), get_state_dict(model, both), strict=True))
            (dcp.load if load else dcp.save)(held, checkpoint_id=folder)
            if load:
                set_state_dict(model, both, model_state_dict=held["model"], optim_state_dict=held["optimizers"])
        given.give(model, gradients)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        seen.append(given.observe(ours))
    return {"seen": seen, "params": pieces.of_model(model, given.SHAPES)}


def alone_without_the_matrix(**options: Any) -> list[Any]:
    """What AlphaAdam reports that has never heard of the matrix."""
    named = [(name, param) for name, param in Given().named_parameters() if name != "weight"]
    optimizer, seen = AlphaAdam(named, lr=given.LR, **options), []
    for gradients in given_gradients(6):
        for name, param in named:
            param.grad = gradients.get(name)
        optimizer.step()
        seen.append(given.observe(optimizer))
    return seen


@pytest.mark.parametrize("options", [{}, {"sync": "delayed"}, {"scope": "layer"}], ids=["exact", "delayed", "layer"])
def test_muon_for_a_matrix_and_alphaadam_for_the_rest(tmp_path: Path, options: dict[str, Any]) -> None:
    """alpha is that of the parameters that AlphaAdam holds, under any sharding; one checkpoint goes on as both."""
    (plain,) = threads.run(1, trained, "plain", "", **options)
    sharded = threads.run(4, trained, "fsdp2", str(tmp_path), **options)
    resumed = threads.run(4, trained, "fsdp2", str(tmp_path), load=True, **options)
    for rank, again in zip(sharded, resumed, strict=True):
        assert rank["seen"] == plain["seen"] == alone_without_the_matrix(**options)
        assert again["seen"] == plain["seen"][3:]
    whole, expected, after = (
        pieces.assemble([rank["params"] for rank in ranks], given.SHAPES) for ranks in (sharded, [plain], resumed)
    )
    for name in given.SHAPES:
        assert torch.equal(after[name], whole[name]), name
        if name == "weight":  # Muon multiplies matrices, whose sums a sharding splits
            torch.testing.assert_close(whole[name], expected[name], rtol=1e-2, atol=1e-4)
        else:
            assert torch.equal(whole[name], expected[name]), name
