"""What metrics that run a network have in common: files that lie at hand, and texts that are read once and in batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from medxray.progress import progress_bar
from medxray.types import WeightsError

Read = TypeVar("Read")

_MANY = 200
"""From so many texts on, a bar tells how far the reading is."""


def folder_with(setting: str, folder: str, needed: Mapping[str, str]) -> Path:
    """A folder, when it holds all files that a metric needs; nothing is ever downloaded.

    Args:
        setting: its name in a message, such as metrics.chexbert.weights.
        folder: its path.
        needed: files, "a or b" where one of two is enough, and where they come from.

    Raises:
        WeightsError: with every file that is missing and where it comes from.
    """
    path = Path(folder).expanduser()
    missing = [names for names in needed if not any(any(path.glob(name)) for name in names.split(" or "))]
    if not missing:
        return path
    sources = "; ".join(f"{names} is {needed[names]}" for names in missing)
    found = f"{path} lacks {' and '.join(missing)}" if path.is_dir() else f"no folder {path}"
    raise WeightsError(f"{setting}: {found}; fetch by hand what is missing: {sources}")


def device() -> torch.device:
    """Where networks of metrics run: the first GPU, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_once(
    texts: Sequence[str],
    known: dict[str, Read],
    read: Callable[[list[str]], Sequence[Read]],
    batch_size: int,
    what: str,
) -> list[Read]:
    """What a network reads in each text. Equal texts, and those of former calls, are read once.

    Args:
        texts: as many as one likes.
        known: what was read before; it grows.
        read: reads a batch.
        batch_size: texts at a time. They are taken by length, so that little is padded.
        what: the name of the bar.
    """
    new = sorted(dict.fromkeys(text for text in texts if text not in known), key=len)
    with progress_bar(total=len(new), desc=what, unit="text", disable=len(new) <= _MANY) as bar:
        for start in range(0, len(new), batch_size):
            batch = new[start : start + batch_size]
            known.update(zip(batch, read(batch), strict=True))
            bar.update(len(batch))
    return [known[text] for text in texts]
