"""The DeepSpeed config of a run: a file of `ds_configs/`, with the optimizer it asks for."""

import json
from pathlib import Path
from typing import Any

import alphaadam_dist


def ds_config_path(zero: int, offload: bool) -> Path:
    """The file in `ds_configs/`: beside the package in a clone, inside it when installed from a wheel."""
    package = Path(alphaadam_dist.__path__[0])
    for folder in (package / "ds_configs", package.parent / "ds_configs"):
        if folder.is_dir():
            return folder / f"zero{zero}{'_offload' if offload else ''}.json"
    raise FileNotFoundError(f"no ds_configs folder in or beside {package}: reinstall alphaadam-dist")


def load_ds_config(zero: int, offload: bool, optimizer: str) -> dict[str, Any]:
    """The config as a dictionary; for AdamW only the optimizer's name differs.

    `torch_adam` keeps AdamW the one of torch: DeepSpeed would put its own implementation in its place.
    """
    config: dict[str, Any] = json.loads(ds_config_path(zero, offload).read_text())
    if optimizer == "AdamW":
        config["optimizer"]["type"] = "AdamW"
        config["optimizer"]["params"]["torch_adam"] = True
    return config
