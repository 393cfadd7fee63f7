"""The folder where the package keeps what it makes once: tokenizers, token blocks, compiled kernels."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``ALPHAADAM_CACHE``, or alphaadam-dist in the user's cache folder. Made where it is not there.

    Raises:
        OSError: it is not there and cannot be made; the message says which, why, and what to set.
    """
    place = os.environ.get("ALPHAADAM_CACHE")
    try:
        folder = Path(place) if place else _of_user() / "alphaadam-dist"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)  # not as the umask would have it: a library is loaded from here
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise OSError(
            f"there is no cache folder and none can be made ({error}): set ALPHAADAM_CACHE to a folder of your own"
        ) from error
    return folder


def _of_user() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
