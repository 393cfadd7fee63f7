"""A Lightning module that returns AlphaAdam: `with_lightning.py OUT ddp|fsdp2 [SYNC [in-backward]]`.

Writes alpha after each step to OUT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from alphaadam_dist import AlphaAdam


class Regression(lightning.LightningModule):
    """Two layers that learn a product."""

    def __init__(self, sync: str = "exact", in_backward: str = "") -> None:
        super().__init__()
        self.sync, self.in_backward = sync, in_backward
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
        self.alphas: list[float] = []

    def configure_model(self) -> None:
        """Shard, where the strategy has a mesh."""
        if self.device_mesh is not None:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> AlphaAdam:
        """The line to change."""
        return AlphaAdam(self.named_parameters(), lr=1e-2, sync=self.sync, telemetry=True)

    def on_train_start(self) -> None:
        """Behind all that wraps the model and the optimizer."""
        if self.in_backward:
            self.optimizers().step_in_backward(self.trainer.model)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Mean squared error."""
        given, wanted = batch
        return (self.layers(given) - wanted).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        """Log as docs/your-tool.md says, and keep alpha."""
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            numbers = self.trainer.optimizers[0].metrics()
            self.log_dict({name: value for name, value in numbers.items() if value is not None})
        self.alphas.append(self.trainer.optimizers[0].alpha)


if __name__ == "__main__":
    out, strategy, *options = sys.argv[1:]
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, 5, generator=generator)
    data = torch.utils.data.TensorDataset(given, given[:, :3] * given[:, 2:5])
    chosen = DDPStrategy(process_group_backend="gloo") if strategy == "ddp" else ModelParallelStrategy(2, 1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=chosen, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=Path(out).parent, log_every_n_steps=5,
    )  # fmt: skip
    model = Regression(*options)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    assert min(float(trainer.callback_metrics[name]) for name in ("grad_norm", "update_norm")) > 0
    if trainer.is_global_zero:
        Path(out).write_text(json.dumps(model.alphas))
