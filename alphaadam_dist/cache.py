"""The folder where the package keeps what it makes once: tokenizers, token blocks, compiled kernels."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """``ALPHAADAM_CACHE``, or alphaadam-dist in the user's cache folder. Made if it is not there."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphaadam-dist"
    folder = Path(os.environ.get("ALPHAADAM_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
