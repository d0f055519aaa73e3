"""What a step of masked auto-encoding costs at 1,280 px beside transformers' ViTMAE, on this machine.

    python benchmarks/pretrain.py              # float32 and bfloat16, some eight minutes on two cores
    python benchmarks/pretrain.py --size 640   # a quarter of the pixels

ViT-B, patches of 16, one gray image, three quarters masked, forward and backward. Every case runs in a process of its own,
so that its peak of memory is its own, and takes turns with the others: each time is the least of its rounds.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PEER = "transformers' ViTMAE"
CASES: dict[str, dict[str, Any]] = {
    PEER: {},
    "self-attention, every masked patch": {"name": "self-attention"},
    "cross-attention, every masked patch": {"name": "cross-attention"},
    "cross-attention, a quarter of the patches": {"name": "cross-attention", "predicted": 0.25},
}
DECODER = {"dim": 512, "depth": 8, "heads": 16, "normalize_patches": True}


def theirs(size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(image_size=size, num_channels=1, norm_pix_loss=True, attn_implementation="sdpa")
    model = ViTMAEForPreTraining(config).to(dtype).train()
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (DECODER["dim"], DECODER["depth"])
    return lambda images: model(pixel_values=images).loss


def ours(size: int, dtype: torch.dtype, decoder: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    from medxray import build

    spec = {
        "task": "pretrain",
        "data": {"reader": {"name": "phantom", "root": "data"}, "image_size": size},
        "encoder": {"name": "vit", "size": "base"},
        "masker": {"name": "random", "ratio": 0.75},
        "pixel_decoder": {**DECODER, **decoder},
        "training": {"steps": 1},
    }
    model = build(spec).task.model.to(dtype).train()
    return lambda images: model(images).loss.mean()


def peak() -> int:
    """Most bytes that this process has held."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def measure(case: str, size: int, dtype: torch.dtype) -> None:
    """Prints seconds of a step and bytes beyond what the process held before the model was built."""
    import medxray  # noqa: F401  # makes what transformers imports importable beside a CPU torch

    torch.manual_seed(0)
    before = peak()
    step = theirs(size, dtype) if case == PEER else ours(size, dtype, CASES[case])
    images = torch.randn(1, 1, size, size, dtype=dtype)
    started = time.perf_counter()
    step(images).backward()
    print(json.dumps([time.perf_counter() - started, peak() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1280, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.measure, chosen.size, getattr(torch, chosen.dtype[0]))
        return
    if not sys.platform.startswith("linux"):
        sys.exit("memory is measured by Linux's own count; run this on Linux")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {chosen.size} px\n")
    print("| case | seconds | of the peer | MiB | of the peer |\n| --- | --- | --- | --- | --- |", flush=True)
    for dtype in chosen.dtype:
        found: dict[str, list[list[float]]] = {case: [] for case in CASES}
        for _ in range(chosen.rounds):
            for case, rounds in found.items():
                command = [sys.executable, __file__, "--measure", case, "--size", str(chosen.size), "--dtype", dtype]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{case}, {dtype}: {done.stderr.strip()[-2000:]}")
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
        peer = [min(column) for column in zip(*found[PEER], strict=True)]
        for case, rounds in found.items():
            seconds, held = (min(column) for column in zip(*rounds, strict=True))
            shares = "| 1 |" if case == PEER else f"| 1 / {peer[0] / seconds:.2f} |"
            memory = "| 1 |" if case == PEER else f"| 1 / {peer[1] / held:.2f} |"
            print(f"| {case}, {dtype} | {seconds:.1f} {shares} {held / 2**20:,.0f} {memory}", flush=True)


if __name__ == "__main__":
    main()
