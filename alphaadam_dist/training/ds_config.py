"""The DeepSpeed config of a run: a file of `ds_configs/`, with the optimizer it asks for."""

import json
from pathlib import Path
from typing import Any

from alphaadam_dist.configs import config_path


def ds_config_path(zero: int, offload: bool) -> Path:
    """The file in `ds_configs/` in which Hugging Face fills in the values."""
    return config_path(f"ds_configs/zero{zero}{'_offload' if offload else ''}.json")


def load_ds_config(zero: int, offload: bool, optimizer: str) -> dict[str, Any]:
    """The config as a dictionary; for AdamW only the optimizer's name differs.

    `torch_adam` keeps AdamW the one of torch: DeepSpeed would put its own implementation in its place.
    """
    config: dict[str, Any] = json.loads(ds_config_path(zero, offload).read_text())
    if optimizer == "AdamW":
        config["optimizer"]["type"] = "AdamW"
        config["optimizer"]["params"]["torch_adam"] = True
    return config
