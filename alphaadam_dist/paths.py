"""Where files of the package are: its cache folder, and the configs that come with it."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for what the package makes once: tokenizers, token blocks, compiled kernels.

    ``ALPHAADAM_CACHE``, or alphaadam-dist in the user's cache folder. It is made if it does not exist.

    Raises:
        OSError: it does not exist and cannot be made; the message says which folder, why, and what to set.
    """
    place = os.environ.get("ALPHAADAM_CACHE")
    try:
        folder = Path(place) if place else _of_user() / "alphaadam-dist"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)  # others may not write: a library is loaded from here
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise OSError(
            f"there is no cache folder and none can be made ({error}): set ALPHAADAM_CACHE to a folder of your own"
        ) from error
    return folder


def _of_user() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def config_path(name: str) -> Path:
    """A config file such as `ds_configs/zero2.json`: beside the package in a clone, inside it in a wheel.

    Raises:
        FileNotFoundError: it is in neither.
    """
    package = Path(__file__).parent
    for folder in (package, package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {name} in or beside {package}: reinstall alphaadam-dist")
