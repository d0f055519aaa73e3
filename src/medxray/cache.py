"""Where things that can be made again are kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`MEDXRAY_CACHE`, else medxray/ in `XDG_CACHE_HOME` or ~/.cache."""
    named = os.environ.get("MEDXRAY_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "medxray"
