"""What a step of masked auto-encoding costs at 1,280 px beside transformers' ViTMAE, on this machine.

    python benchmarks/pretrain.py              # float32 and bfloat16, some ten minutes on two cores
    python benchmarks/pretrain.py --size 640   # a quarter of the pixels
    python benchmarks/pretrain.py --specs      # one whole step of the specs of 1,280 px, beside what medxray show says
    python benchmarks/pretrain.py --masks      # what a mask costs of a step
    python benchmarks/pretrain.py --gpu        # images a second and memory of the same cases on CUDA, bfloat16

ViT-B, patches of 16, one gray image, three quarters masked, forward and backward. Every case runs in a process of its own,
so that its peak of memory is its own, and takes turns with the others: each time is the least of its rounds. Memory is what is
held beyond the libraries, and, in the last column, beyond the weights as well.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import medxray
from medxray.summary import summarise
from medxray.training import checkpoint_activations
from ratios import record

PEER = "transformers' ViTMAE"
CASES: dict[str, dict[str, Any]] = {
    PEER: {},
    "self-attention, every masked patch": {"name": "self-attention"},
    "cross-attention, every masked patch": {"name": "cross-attention"},
    "cross-attention, a quarter of the patches": {"name": "cross-attention", "predicted": 0.25},
    "the same, MLPs recomputed": {"name": "cross-attention", "predicted": 0.25, "recompute": "mlp"},
}
SPECS = ("hd-mae-release", "hd-mae-1280")
DECODER = {"dim": 512, "depth": 8, "heads": 16, "normalize_patches": True}


def theirs(size: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(image_size=size, num_channels=1, norm_pix_loss=True, attn_implementation="sdpa")
    model = ViTMAEForPreTraining(config).to(dtype).train()
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (DECODER["dim"], DECODER["depth"])
    return lambda images: model(pixel_values=images).loss


def ours(size: int, dtype: torch.dtype, decoder: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    decoder = {**DECODER, **decoder}
    recompute = decoder.pop("recompute", False)
    spec = {
        "task": "pretrain",
        "data": {"reader": {"name": "phantom", "root": "data"}, "image_size": size},
        "encoder": {"name": "vit", "size": "base"},
        "masker": {"name": "random", "ratio": 0.75},
        "pixel_decoder": decoder,
        "training": {"steps": 1},
    }
    task = medxray.build(spec).task
    checkpoint_activations(task, recompute)
    model = task.model.to(dtype).train()
    return lambda images: model(images).loss.mean()


def held(what: str) -> int:
    """Bytes that this process holds, VmRSS, or has held at most, VmHWM."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))


def measure(case: str, size: int, dtype: torch.dtype) -> None:
    """Prints seconds of a step, and bytes beyond what the process held before the model was built, and after it was."""
    # Libraries are not what is measured.
    from transformers import ViTMAEForPreTraining  # noqa: F401

    torch.manual_seed(0)
    before = held("VmRSS")
    step = theirs(size, dtype) if case == PEER else ours(size, dtype, CASES[case])
    built = held("VmRSS")
    images = torch.randn(1, 1, size, size, dtype=dtype)
    started = time.perf_counter()
    step(images).backward()
    print(json.dumps([time.perf_counter() - started, held("VmHWM") - before, held("VmHWM") - built]))


def measure_spec(name: str) -> None:
    """One image forward, backward and through AdamW in float32: what is kept for the backward pass, and the peak."""
    pipeline = medxray.build(name)
    shown, model = summarise(pipeline)["step activations an image"], pipeline.task.model.train()
    image = torch.randn(1, 1, 1280, 1280)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for measured in (False, True):
        # The first step fills what is kept from then on: gradients, moments, tables.
        before, started = held("VmRSS"), time.perf_counter()
        loss = model(image).loss.mean()
        kept = held("VmRSS") - before
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        del loss
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        if measured:
            seconds, most = time.perf_counter() - started, held("VmHWM") / 2**30
            print(f"| {name} | {seconds:.1f} | {shown} | {kept / 2**20:,.1f} MiB | {most:.1f} GiB |", flush=True)


def gpu(size: int, batch: int, steps: int = 10) -> None:
    """Images a second and peak of memory, weights in float32 and arithmetic in bfloat16 by autocast."""
    print("| case | images a second | of the peer | GiB | of the peer |\n| --- | --- | --- | --- | --- |", flush=True)
    peer: tuple[float, float] | None = None
    for case, settings in CASES.items():
        torch.manual_seed(0)
        with torch.device("cuda"):
            step = theirs(size, torch.float32) if case == PEER else ours(size, torch.float32, settings)
            images = torch.randn(batch, 1, size, size)
        torch.cuda.reset_peak_memory_stats()
        for i in range(3 + steps):
            if i == 3:
                torch.cuda.synchronize()
                started = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                loss = step(images)
            loss.backward()
        torch.cuda.synchronize()
        speed = steps * batch / (time.perf_counter() - started)
        memory = torch.cuda.max_memory_allocated() / 2**30
        peer = peer or (speed, memory)
        print(f"| {case} | {speed:.1f} | {speed / peer[0]:.2f} | {memory:.1f} | 1 / {peer[1] / memory:.2f} |", flush=True)
        del step, loss
        torch.cuda.empty_cache()


def masks(size: int) -> None:
    """Seconds of each masker for a batch of 8, beside those of a step of `hd-mae-1280` for one image."""
    grid, seeds = (size // 16, size // 16), torch.arange(8)
    regions = torch.rand(8, *grid)
    step = ours(size, torch.float32, CASES["cross-attention, a quarter of the patches"])
    images = torch.randn(1, 1, size, size)
    started = time.perf_counter()
    step(images).backward()
    whole = time.perf_counter() - started
    print(f"a step for one image: {whole:.1f} s\n\n| masker | ms an image | of a step |\n| --- | --- | --- |")
    for name in medxray.maskers.names():
        masker, taken = medxray.maskers.get(name)(), []
        for _ in range(9):
            started = time.perf_counter()
            masker(regions, 8, grid, seeds)
            taken.append((time.perf_counter() - started) / 8)
        print(f"| {name} | {1e3 * min(taken):.2f} | {min(taken) / whole:.4%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1280, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--specs", action="store_true", help="one step of each spec of 1,280 px")
    parser.add_argument("--masks", action="store_true", help="what the maskers take")
    parser.add_argument("--gpu", action="store_true", help="the cases on CUDA")
    parser.add_argument("--batch", type=int, default=2, help="images of a step on CUDA")
    parser.add_argument("--measure", choices=(*CASES, *SPECS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure in SPECS:
        measure_spec(chosen.measure)
        return
    if chosen.measure:
        measure(chosen.measure, chosen.size, getattr(torch, chosen.dtype[0]))
        return
    if chosen.gpu:
        if not torch.cuda.is_available():
            sys.exit("--gpu: torch sees no CUDA device here; leave it out to measure on the CPU")
        gpu(chosen.size, chosen.batch)
        return
    if chosen.masks:
        masks(chosen.size)
        return
    if not sys.platform.startswith("linux"):
        sys.exit("memory is measured by Linux's own count; run this on Linux")
    if chosen.specs:
        print("| spec | seconds of a step | activations by medxray show | measured | peak |", flush=True)
        print("| --- | --- | --- | --- | --- |", flush=True)
        for name in SPECS:
            # Blocks of memory go back to the system as soon as they are free, so that what is held is what is used.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            subprocess.run([sys.executable, __file__, "--measure", name], check=True, env=environment)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {chosen.size} px\n")
    columns = ("case", "seconds", "of the peer", "MiB", "of the peer", "beyond the weights", "of the peer")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
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
            seconds, held_in_all, beyond = (min(column) for column in zip(*rounds, strict=True))
            cells = [f"{seconds:.1f}", f"{held_in_all / 2**20:,.0f}", f"{beyond / 2**20:,.0f}"]
            if case != PEER:
                what = f"{case}, {dtype}, {chosen.size} px"
                record(f"time of a step: {what}", peer[0] / seconds, "transformers ViTMAE")
                record(f"memory of a step: {what}", peer[1] / held_in_all, "transformers ViTMAE")
            ratios = [f"1 / {theirs / own:.2f}" for theirs, own in zip(peer, (seconds, held_in_all, beyond), strict=True)]
            print(f"| {case}, {dtype} |", *(f"{cell} | {ratio} |" for cell, ratio in zip(cells, ratios, strict=True)), flush=True)


if __name__ == "__main__":
    main()
