"""The example of docs/fsdp.md under torchtitan itself: `make test-torchtitan`."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from alphaadam_dist import AlphaAdam, parameter_groups

from ..ranks import Ranks

pytestmark = pytest.mark.torchtitan

PAGE = Path(__file__).parents[2] / "docs" / "fsdp.md"
STEPS = 4
GROUPS = [{"match": "^0[.]weight", "lr_scale": 4.0}, {"match": "bias", "weight_decay": 0.0}]


def example() -> dict[str, Any]:
    """The names that the page's code defines."""
    begins = "from alphaadam_dist.integrations"
    (code,) = re.findall(rf"```python\n({begins}.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    exec(code, names)
    return names


def small_model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def gradients(model: nn.Module, step: int) -> None:
    batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model(batch).square().sum().backward()


def under_torchtitan() -> dict[str, Any]:
    config = example()["optimizer"]
    model = small_model()
    fully_shard(model)
    ours = config.build(model_parts=[model])
    saved: Any = None
    for step in range(STEPS):
        if step == STEPS // 2:
            saved = copy.deepcopy((model.state_dict(), ours.state_dict()))
        gradients(model, step)
        ours.step()
        ours.zero_grad()

    again = small_model()
    fully_shard(again)
    resumed = config.build(model_parts=[again])
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for step in range(STEPS // 2, STEPS):
        gradients(again, step)
        resumed.step()
        resumed.zero_grad()
    (optimizer,) = ours
    return {
        "kind": type(optimizer).__name__,
        "sync": optimizer.defaults["sync"],
        "metrics": optimizer.metrics(),
        "params": [param.full_tensor().detach() for param in model.parameters()],
        "resumed": [param.full_tensor().detach() for param in again.parameters()],
    }


def test_the_example(ranks2: Ranks) -> None:
    """Equal batches on both ranks, so one process takes the same steps; and a resumed run the same bits."""
    model = small_model()
    alone = AlphaAdam(model.named_parameters(), lr=3e-4, weight_decay=0.1, sync="delayed")
    for step in range(STEPS):
        gradients(model, step)
        alone.step()
        alone.zero_grad()
    for result in ranks2.run(under_torchtitan):
        assert (result["kind"], result["sync"]) == ("AlphaAdam", "delayed")
        assert result["metrics"] == alone.metrics()
        for ours, resumed, expected in zip(result["params"], result["resumed"], model.parameters(), strict=True):
            assert torch.equal(ours, resumed)
            assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-7)  # an average of two equal gradients


def with_groups() -> list[torch.Tensor]:
    from alphaadam_dist.integrations.torchtitan_optimizers import alphaadam

    model = small_model()
    fully_shard(model)
    ours = alphaadam(lr=3e-3, groups=GROUPS).build(model_parts=[model])
    for step in range(STEPS):
        gradients(model, step)
        ours.step()
        ours.zero_grad()
    return [param.full_tensor().detach() for param in model.parameters()]


def test_groups_by_name(ranks2: Ranks) -> None:
    model = small_model()
    alone = AlphaAdam(parameter_groups(model, GROUPS), lr=3e-3, weight_decay=0.1)
    for step in range(STEPS):
        gradients(model, step)
        alone.step()
        alone.zero_grad()
    for result in ranks2.run(with_groups):
        for ours, expected in zip(result, model.parameters(), strict=True):
            assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-7)  # an average of two equal gradients
