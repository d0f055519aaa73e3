"""Features of a frozen encoder: computed once, kept on disk, mapped into memory."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medxray import disk, processes
from medxray.cache import cache_folder
from medxray.data import StudyImages
from medxray.encoders import Encoder
from medxray.progress import progress_bar
from medxray.types import Features, RunError


@torch.no_grad()
def compute_once(encoder: Encoder, images: StudyImages, batch_size: int, *, progress: bool = True) -> Features:
    """Tokens (n, V, N, D) and pooled (n, V, D) of every study, float32, zeros where a view is missing.

    Looked up by what they follow from: the encoder's tensors, the way images are read, and each file's name,
    size and time. Written beside their final place and renamed, so that a kill leaves nothing half; what is damaged is
    computed anew.
    """
    folder = cache_folder() / "features" / features_key(encoder, images)
    kept = _kept(folder)
    # All processes learn whether any lacks them, since the next steps are taken together.
    places = processes.union([(processes.rank(), (kept is None, f"{folder}.{os.getpid()}"))], processes.world())
    if not any(lacking for lacking, _ in places):
        assert kept is not None
        return kept
    own, _ = processes.local()
    staged = Path(places[processes.rank() - own][1])
    if kept is None and own == 0:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    processes.wait()
    if kept is None:
        try:
            _compute(encoder, images, batch_size, staged, progress)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise RunError(
                f"features of the encoder cannot be kept in {folder.parent}: {error.strerror or error}; free some space, or name "
                "another folder by MEDXRAY_CACHE"
            ) from error
    else:
        processes.wait()
    processes.wait()
    if kept is None and own == 0:
        if _kept(folder) is not None:  # another job was first
            shutil.rmtree(staged)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            staged.rename(folder)
    processes.wait()
    kept = _kept(folder)
    assert kept is not None
    return kept


def _compute(encoder: Encoder, images: StudyImages, batch_size: int, folder: Path, progress: bool) -> None:
    """Each process of a machine writes its part of the studies into files that they share; the first makes them."""
    encoder.eval()
    device = next(encoder.parameters()).device
    n, first = len(images), processes.local()[0] == 0
    arrays: dict[str, NDArray[np.float32]] = {}
    batches = processes.own_batches(range(n), batch_size, processes.local())
    bar = progress_bar(batches, desc="features", unit="batch", disable=not progress)
    for number, rows in bar:
        batch = images.of(rows)
        B, V = batch.view_mask.shape
        features = encoder(batch.pixels.flatten(0, 1).to(device))
        parts = {"tokens": features.tokens, "pooled": features.pooled}
        views = {name: flat.float().cpu().unflatten(0, (B, V)) for name, flat in parts.items()}
        if not arrays:
            if first:
                for name, part in views.items():
                    shape = (n, *part.shape[1:])
                    np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)
                    disk.reserve(folder / f"{name}.npy")
                (folder / "grid.json").write_text(json.dumps(features.grid))
            processes.wait()
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in views}
        for name, part in views.items():
            mask = batch.view_mask.reshape(B, V, *[1] * (part.ndim - 2))
            arrays[name][number * batch_size :][:B] = (part * mask).numpy()
    if not batches:
        processes.wait()
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 of an encoder's class and tensors."""
    return _digest(encoder).hexdigest()


def _digest(encoder: Encoder) -> "hashlib._Hash":
    digest = hashlib.sha256(type(encoder).__qualname__.encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest


def features_key(encoder: Encoder, images: StudyImages) -> str:
    """What the features of images follow from, as a name."""
    digest, spec = _digest(encoder), images.spec
    digest.update(repr((spec.image_size, spec.fit, images.max_views, encoder.mean, encoder.std)).encode())
    if spec.decode != "full":
        digest.update(spec.decode.encode())
    for views in images.images:
        for view in views:
            digest.update(images.stamp(view).encode())
    return digest.hexdigest()[:24]


def _kept(folder: Path) -> Features | None:
    """What is kept, mapped into memory; None where there is nothing, or it is damaged."""

    def mapped(name: str) -> Tensor:
        # Copy on write: a tensor must not be able to change the file.
        return torch.from_numpy(np.load(folder / name, mmap_mode="c"))

    try:
        grid = json.loads((folder / "grid.json").read_text())
        return Features(mapped("tokens.npy"), tuple(grid) if grid else None, mapped("pooled.npy"))
    except (OSError, ValueError, TypeError, EOFError):
        return None
