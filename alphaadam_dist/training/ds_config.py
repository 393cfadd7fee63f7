"""The DeepSpeed config of a run: a file, of `ds_configs/` or the user's own, with the optimizer the run asks for."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphaadam_dist.files import read_object
from alphaadam_dist.paths import config_path
from alphaadam_dist.training.settings import OPTIONS

_ADAMWS = ("lr", "betas", "eps", "weight_decay")


def ds_config_path(zero: int, offload: bool) -> Path:
    """The file in `ds_configs/` in which Hugging Face fills in the values."""
    return config_path(f"ds_configs/zero{zero}{'_offload' if offload else ''}.json")


def load_ds_config(
    zero: int, offload: bool, optimizer: str, groups: Sequence[Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The file of `ds_configs/` for this stage as a dictionary, with this optimizer, as `read_ds_config` does."""
    return read_ds_config(ds_config_path(zero, offload), optimizer, groups)


@contextmanager
def naming_config(path: Path | None) -> Iterator[None]:
    """Turn what DeepSpeed and Transformers find wrong with a config into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        places = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
        if path is None or isinstance(error, OSError) or not any(map(_reads_configs, places)):
            raise
        raise ValueError(f"--deepspeed {path}: {error} ({type(error).__name__})") from error


def _reads_configs(place: tuple[str, ...]) -> bool:
    """Whether a source file, by the parts of its path, is one of those that read DeepSpeed's configs."""
    of_deepspeed = "deepspeed" in place[-4:-1] and "config" in place[-1] and "runtime" in place[-4:-1]
    return of_deepspeed or place[-3:] in (
        ("transformers", "integrations", "deepspeed.py"),
        ("accelerate", "utils", "deepspeed.py"),
    )


def read_ds_config(path: Path, optimizer: str, groups: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """A config file as a dictionary, with an optimizer of `settings.OPTIMIZERS`; one without an optimizer stays so.

    With `groups`, entries of parameter_groups, AlphaAdam gets them among its params. AdamW is left out: it would get
    one group there, and the Trainer makes it with these.

    Raises:
        ValueError: the file is not a JSON object, or names an optimizer of another kind, whose options mean nothing
            here.
        OSError: it cannot be read.
    """
    config = read_object(path, "give a DeepSpeed config, such as ds_configs/zero2.json")
    own = OPTIONS.get(optimizer)
    if groups is not None and own is None and "scheduler" in config:
        raise ValueError(
            f"{path} has a scheduler, which writes one learning rate into all of AdamW's groups: leave it out, and the "
            "Trainer's keeps those of --groups"
        )
    named = config.get("optimizer")
    if named is None:
        return config
    if not isinstance(named, dict) or not isinstance(named.get("params", {}), dict):
        raise ValueError(
            f"{path} has the optimizer {named!r}: write it as "
            '{"type": "AlphaAdam", "params": {"lr": 1e-4}}, or leave the optimizer out'
        )
    if named.get("type") not in ("AlphaAdam", "Adam", "AdamW"):
        raise ValueError(
            f"{path} has the optimizer {named.get('type')}: name AlphaAdam or AdamW there, or leave the optimizer out"
        )
    params = named.get("params", {})
    if own is None:
        for name in ("no_decay", "groups"):
            if name in params:
                raise ValueError(
                    f"{path} has {name}={params[name]!r}, which only AlphaAdam knows: leave it out of the config to "
                    "compare the two, and give both the same groups with --groups"
                )
        if groups is not None:
            return {key: value for key, value in config.items() if key != "optimizer"}
        # torch_adam keeps AdamW the one of torch: DeepSpeed would put its own implementation in its place.
        adamws = {name: value for name, value in params.items() if name in _ADAMWS}
        return {**config, "optimizer": {"type": "AdamW", "params": {**adamws, "torch_adam": True}}}
    if groups is not None:
        if "groups" in params:
            raise ValueError(f"{path} has groups={params['groups']!r} and --groups is given too: give one of them")
        params = {**params, "groups": list(groups)}
    return {**config, "optimizer": {"type": "AlphaAdam", "params": {**params, **own}}}


def in_bf16(config: dict[str, Any], *, parameters: bool) -> dict[str, Any]:
    """A config with AlphaAdam's moments in bf16, and with ``parameters`` masters and gradients too."""
    changed = dict(config)
    if "optimizer" in config:
        params = {**config["optimizer"].get("params", {}), "state_dtype": "bfloat16"}
        changed["optimizer"] = {**config["optimizer"], "params": params}
    if parameters:
        changed["bf16"] = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return changed
