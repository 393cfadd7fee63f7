"""Where the config files are that come with the library."""

from pathlib import Path

import alphaadam_dist


def config_path(name: str) -> Path:
    """A file such as `ds_configs/zero2.json`: beside the package in a clone, inside it when installed from a wheel.

    Raises:
        FileNotFoundError: it is in neither.
    """
    package = Path(alphaadam_dist.__path__[0])
    for folder in (package, package.parent):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {name} in or beside {package}: reinstall alphaadam-dist")
