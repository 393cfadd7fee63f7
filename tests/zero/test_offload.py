"""States on NVMe (`make test-nvme`), and ZeRO++'s hierarchical partitions: the same bits as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from alphaadam_dist import AlphaAdam, AlphaLion, AlphaSGD
from alphaadam_dist.optimizer import AlphaOptimizer
from tests.ranks import Ranks
from tests.zero import engine
from tests.zero.test_equality import OPTIONS, assert_equal, dtype_of


@pytest.fixture(scope="module")
def async_io() -> None:
    """DeepSpeed's disk I/O, compiled before the ranks need it."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's NVMe offload needs libaio: apt-get install libaio-dev")
    AsyncIOBuilder().load(verbose=False)


@pytest.mark.nvme
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("async_io")
@pytest.mark.parametrize(
    ("kind", "dtype"), [(AlphaAdam, "fp32"), (AlphaAdam, "bf16"), (AlphaLion, "fp32"), (AlphaSGD, "bf16")]
)
def test_nvme_delayed(ranks2: Ranks, tmp_path: Path, kind: type[AlphaOptimizer], dtype: str) -> None:
    config = engine.config(3, dtype, offload=True, sub_group_size=200)
    config["zero_optimization"]["offload_optimizer"] |= {"device": "nvme", "nvme_path": str(tmp_path)}
    options = OPTIONS["delayed"]
    alone = engine.given_alone(options, optimizer=kind, dtype=dtype_of(dtype))
    assert_equal(ranks2.run(engine.given, config, options, optimizer=kind.__name__), alone)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hpz(ranks2: Ranks, options: dict[str, Any]) -> None:
    config = engine.config(3, zero_hpz_partition_size=2, sub_group_size=200)
    assert_equal(ranks2.run(engine.given, config, options), engine.given_alone(options))
