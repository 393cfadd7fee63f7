"""Under offload Accelerate puts DeepSpeedCPUAdam in place of an optimizer object: right or an error, never silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hf import trainer
from tests.hf.test_trainer import check
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


class NoKernel:
    """Stands in for the C++ of DeepSpeedCPUAdam, which takes minutes to compile and never gets to run."""

    def load(self) -> NoKernel:
        return self

    def create_adam(self, *args: Any) -> None:
        pass

    def destroy_adam(self, *args: Any) -> None:
        pass


def swapped(folder: str, ds_config: dict[str, Any]) -> dict[str, Any]:
    from deepspeed.ops.adam import cpu_adam

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_adam, "CPUAdamBuilder", NoKernel)
        return trainer.train(folder, ds_config, client=trainer.ADAM)


@pytest.mark.parametrize(("stage", "force"), [(2, None), (3, True)], ids=["zero2-unset", "zero3-true"])
def test_a_swap_is_refused(ranks2: Ranks, tmp_path: Path, stage: int, force: bool | None) -> None:
    config = trainer.client_config(stage, **OFFLOAD)
    if force is not None:
        config["zero_force_ds_cpu_optimizer"] = force
    with pytest.raises(Exception, match="rank 1") as error:
        ranks2.run(swapped, str(tmp_path), config)
    lines = [line for line in str(error.value).splitlines() if line.startswith("ValueError: ")]
    assert len(lines) == 2, f"each rank refuses, with its reason last:\n{error.value}"
    for line in lines:
        assert "the optimizer was replaced by DeepSpeedCPUAdam" in line
        assert '"zero_force_ds_cpu_optimizer": false' in line
        assert '"optimizer": {"type": "AlphaAdam"' in line


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_first_way_out(ranks2: Ranks, tmp_path: Path, stage: int) -> None:
    config = {**trainer.client_config(stage, **OFFLOAD), "zero_force_ds_cpu_optimizer": False}
    ranks = ranks2.run(trainer.train, str(tmp_path), config, client=trainer.ADAM)
    check(ranks, trainer.alone(trainer.hf_groups), f"zero_force_ds_cpu_optimizer false, stage {stage}")


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_second_way_out(ranks2: Ranks, tmp_path: Path, stage: int) -> None:
    config = {**trainer.auto_config(stage), "zero_force_ds_cpu_optimizer": True}
    config["zero_optimization"] |= OFFLOAD
    ranks = ranks2.run(trainer.train, str(tmp_path), config)
    check(ranks, trainer.alone(trainer.one_group), f"named in the JSON, offloaded, stage {stage}")
