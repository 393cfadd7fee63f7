"""What the callbacks add to a log entry, and where they find the optimizer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam
from alphaadam_dist.integrations.hf_trainer import find_alpha_optimizer
from alphaadam_dist.training.callbacks import AlphaMetrics


class _Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def _stepped(**options: Any) -> AlphaAdam:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = AlphaAdam([("weight", weight)], **options)
    for gradient in (torch.ones(4), torch.tensor([1.0, 1.0, 1.0, -1.0])):
        weight.grad = gradient
        optimizer.step()
    return optimizer


def _log(optimizer: Any, logs: dict[str, float]) -> dict[str, float]:
    state = SimpleNamespace(log_history=[dict(logs)])
    AlphaMetrics().on_log(SimpleNamespace(), state, SimpleNamespace(), logs=logs, optimizer=optimizer)
    assert state.log_history[-1] == logs
    return logs


def test_the_optimizer_is_found_inside_its_wrappers():
    optimizer = _stepped()
    assert find_alpha_optimizer(optimizer) is optimizer
    assert find_alpha_optimizer(_Wrapper(_Wrapper(optimizer))) is optimizer
    assert find_alpha_optimizer(_Wrapper(torch.optim.AdamW([torch.ones(1)]))) is None
    assert find_alpha_optimizer(None) is None


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_alpha_and_agreement_reach_the_log(scope: str):
    logs = _log(_Wrapper(_stepped(scope=scope)), {"loss": 1.0})
    assert logs["agreement"] == 3 / 4
    assert logs["alpha"] == pytest.approx(1 + 1 / 3)


def test_without_masks_there_is_no_agreement_to_log():
    assert _log(_stepped(gamma=1.0), {"loss": 1.0}) == {"loss": 1.0, "alpha": 1.0, "steps": 2.0}


def test_the_trainers_own_norm_stays():
    logs = _log(_stepped(clip_norm=1.0), {"loss": 1.0, "grad_norm": 7.0})
    assert logs["grad_norm"] == 7.0
    assert _log(_stepped(clip_norm=1.0), {"loss": 1.0})["grad_norm"] == 2.0


def test_the_norm_of_the_update_is_beside_the_trainers_own_norm():
    logs = _log(_stepped(telemetry=True), {"loss": 1.0, "grad_norm": 7.0})
    assert logs["grad_norm"] == 7.0
    assert logs["update_norm"] == pytest.approx(0.002 * 1.01, rel=0.02)  # a rate of 0.001 on four ones, and its decay
    assert _log(_stepped(telemetry=True), {"loss": 1.0})["grad_norm"] == 2.0


def test_only_entries_with_a_training_loss_get_them():
    assert _log(_stepped(), {"eval_loss": 1.0}) == {"eval_loss": 1.0}


def test_other_optimizers_leave_the_log_alone():
    assert _log(torch.optim.AdamW([torch.ones(1)]), {"loss": 1.0}) == {"loss": 1.0}
