"""Features of a frozen encoder: computed once, kept on disk, mapped into memory."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from medxray.cache import cache_folder
from medxray.data import StudyImages
from medxray.encoders import Encoder
from medxray.types import Features


@torch.no_grad()
def compute_once(encoder: Encoder, images: StudyImages, batch_size: int, *, progress: bool = True) -> Features:
    """Tokens (n, V, N, D) and pooled (n, V, D) of every study, float32, zeros where a view is missing.

    Looked up by what they follow from: the encoder's tensors, the way images are read, and each file's name,
    size and time. Written beside their final place and renamed, so that a kill leaves nothing half.
    """
    folder = cache_folder() / "features" / features_key(encoder, images)
    if not (folder / "grid.json").is_file():
        staged = folder.with_name(f"{folder.name}.{os.getpid()}")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _compute(encoder, images, batch_size, staged, progress)
        if folder.exists():
            shutil.rmtree(staged)
        else:
            staged.rename(folder)
    grid = json.loads((folder / "grid.json").read_text())
    return Features(_mapped(folder / "tokens.npy"), tuple(grid) if grid else None, _mapped(folder / "pooled.npy"))


def _compute(encoder: Encoder, images: StudyImages, batch_size: int, folder: Path, progress: bool) -> None:
    encoder.eval()
    device = next(encoder.parameters()).device
    n, done, arrays = len(images), 0, {}
    batches = images.batches(batch_size)
    bar = tqdm(batches, total=-(-n // batch_size), desc="features", unit="batch", disable=not progress)
    for batch in bar:
        B, V = batch.view_mask.shape
        features = encoder(batch.pixels.flatten(0, 1).to(device))
        for name, flat in (("tokens", features.tokens), ("pooled", features.pooled)):
            views = flat.float().cpu().unflatten(0, (B, V))
            if name not in arrays:
                arrays[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(n, *views.shape[1:])
                )
            mask = batch.view_mask.reshape(B, V, *[1] * (views.ndim - 2))
            arrays[name][done : done + B] = (views * mask).numpy()
        done += B
    for array in arrays.values():
        array.flush()
    (folder / "grid.json").write_text(json.dumps(features.grid))


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


def _mapped(path: Path) -> Tensor:
    # Copy on write: a tensor must not be able to change the file.
    return torch.from_numpy(np.load(path, mmap_mode="c"))
