"""What the encoders' selective scan costs, beside what people use, on this machine.

    pip install 'medxray[bench]'
    python benchmarks/encoders.py              # everything that runs here, some eight minutes on two cores
    python benchmarks/encoders.py scan memory  # one part or some
    python benchmarks/encoders.py growth --plot docs/encoders.svg

Parts: scan, length, memory, models, growth, start (CPU); gpu (CUDA). Every ratio is of two times from this run, each the
least of rounds in which both took turns: what else the machine does only ever adds.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medxray.encoders.scan import backends, scan_map, selective_scan
from medxray.encoders.vit import ViT
from medxray.encoders.vmamba import SS2D, VMamba
from ratios import record

Row = tuple[str, str]
ROUNDS = 5


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
    """The plain loop: slices by unbind, so that its backward pass is linear in L."""
    delta = F.softplus(delta + bias[:, None])
    decay = torch.exp(delta[:, :, None] * A[:, :, None])
    driven = (delta * u)[:, :, None] * B
    h, out = torch.zeros_like(decay[..., 0]), []
    for keep, enter, read in zip(decay.unbind(-1), driven.unbind(-1), C.unbind(-1), strict=True):
        h = keep * h + enter
        out.append((h * read).sum(-1))
    return torch.stack(out, -1) + D[:, None] * u


def ours(*given: Tensor, backend: str = "auto") -> Tensor:
    return selective_scan(*given, delta_softplus=True, backend=backend)


def arguments(D: int, L: int, N: int) -> list[Tensor]:
    """u, delta, A, B, C, D and bias for one group."""
    draw = torch.randn
    given = [draw(1, D, L), draw(1, D, L), -torch.rand(D, N) * 4, *draw(2, 1, 1, N, L), draw(D), draw(D) - 3]
    return [tensor.requires_grad_() for tensor in given]


def both_passes(function: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        y = function(*given)
        return torch.autograd.grad(y, given, torch.ones_like(y))

    return run


def least(*functions: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
    """Milliseconds of each, which take turns; what is quick is repeated within a turn until it can be measured."""
    taken: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, times in zip(functions, taken, strict=True):
            repeats, started = 0, time.perf_counter()
            while repeats == 0 or time.perf_counter() - started < 0.05:
                function()
                repeats += 1
            times.append((time.perf_counter() - started) / repeats * 1e3)
    return [min(times) for times in taken]


def without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return function()

    return run


def scan() -> list[Row]:
    """One scan of the size of a ViT-B's tokens at 896 px, forward and backward, beside its peers."""
    rows = []
    big, place = torch.randn(2, 1 << 25)
    for N in (1, 16):
        given = arguments(768, 3136, N)
        mine, slow, plain, copied = least(
            both_passes(ours, given),
            both_passes(loop, given),
            both_passes(lambda *g: ours(*g, backend="torch"), given),
            lambda: place.copy_(big),
        )
        # Forward reads two and writes one, backward reads three and writes two tensors of D x L.
        record(f"selective scan, N {N}, forward and backward", slow / mine, "the plain loop")
        record(f"selective scan, N {N}, forward and backward, back-end", plain / mine, "torch operations")
        streamed = 8 * given[0].numel() * 4 / (2 * big.numel() * 4 / copied)
        rows += [
            (f"(1, 768, 3136), N {N}: forward and backward", f"{mine:.1f} ms"),
            ("  the plain loop", f"{slow:.0f} ms, {slow / mine:.1f} times as long"),
            ("  back-end torch", f"{plain:.0f} ms, {plain / mine:.1f} times as long"),
            ("  streaming the bytes that are needed", f"{streamed:.1f} ms: the scan takes {mine / streamed:.1f} times that"),
        ]
    return rows + peers()


def peers() -> list[Row]:
    """The scans of transformers (its path without CUDA kernels) and of mambapy, on the tensors that ours gets."""
    import transformers
    from mambapy.mamba import MambaBlock, MambaConfig
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    transformers.logging.set_verbosity_error()
    u, delta, A, B, C, D, bias = (tensor.detach() for tensor in arguments(768, 3136, 16))

    def theirs_forward() -> Any:
        return mamba_selective_scan(u, delta, A, B[:, 0], C[:, 0], D, None, bias, True)

    torch.testing.assert_close(ours(u, delta, A, B, C, D, bias), theirs_forward(), rtol=1e-3, atol=1e-3)
    mine, theirs = least(*(without_gradient(f) for f in (lambda: ours(u, delta, A, B, C, D, bias), theirs_forward)))
    record("selective scan, N 16, forward", theirs / mine, "transformers on a CPU")
    rows = [
        ("transformers' scan without CUDA kernels, (1, 768, 3136), N 16, forward", f"{theirs:.0f} ms"),
        ("  ours on the same tensors", f"{mine:.1f} ms: {theirs / mine:.1f} times as fast"),
    ]
    block = MambaBlock(MambaConfig(d_model=384, n_layers=1))
    sequences = [t.mT.contiguous().requires_grad_() for t in (u, F.softplus(delta - 3))]
    maps = [t[:, 0].mT.contiguous().requires_grad_() for t in (B, C)]
    leaves = [*sequences, A.clone().requires_grad_(), *maps, D.clone().requires_grad_()]

    def theirs_scan() -> Any:
        y = block.selective_scan(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    def our_scan() -> Any:
        x, step, A, B, C, D = leaves
        y = selective_scan(x.mT, step.mT, A, B.mT, C.mT, D).mT
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    for a, b in zip(our_scan(), theirs_scan(), strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()
    mine, other = least(our_scan, theirs_scan)
    record("selective scan, N 16, both passes", other / mine, "mambapy")
    return [
        *rows,
        ("mambapy's scan, (1, 768, 3136), N 16, forward and backward", f"{other:.0f} ms"),
        ("  ours on the same tensors", f"{mine:.1f} ms: {other / mine:.1f} times as fast"),
    ]


def length() -> list[Row]:
    """Time a step, from a map of 14 x 14 to one of 160 x 160."""
    rows = []
    for N in (1, 16):
        per_step = []
        lengths = (196, 784, 3136, 6400, 25_600)
        for L in lengths:
            (took,) = least(both_passes(ours, arguments(256, L, N)))
            per_step.append(took / L * 1e6)
        said = ", ".join(f"{L:,}: {ns:.0f}" for L, ns in zip(lengths, per_step, strict=True))
        rows.append((f"nanoseconds a step of 256 channels, N {N}, by L", said))
    return rows


PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
from encoders import arguments, both_passes, loop, ours
torch.manual_seed(0)
given = arguments(768, 6400, 16)
both_passes(ours, arguments(16, 32, 16))()
def now(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = now("VmRSS")
both_passes({name}, given)()
print(now("VmHWM") - before)
"""


def memory() -> list[Row]:
    """Peak beyond the arguments, each in a process of its own."""
    if not sys.platform.startswith("linux"):
        return [("memory", "left out: measured by Linux's own count")]
    peak = {}
    for name in ("ours", "loop"):
        code = PEAK.format(folder=str(Path(__file__).parent), name=name)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peak[name] = int(done.stdout) / 1024
    record("peak memory of a scan of 6,400 steps", peak["loop"] / peak["ours"], "the plain loop")
    said = f"{peak['ours']:.0f} MiB; the plain loop {peak['loop']:.0f} MiB, {peak['loop'] / peak['ours']:.0f} times as much"
    return [("peak of forward and backward, L 6,400, D 768, N 16", said)]


def set_backend(model: nn.Module, name: str) -> None:
    for layer in model.modules():
        if isinstance(layer, SS2D):
            layer.scan = name


def training_step(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    def run() -> None:
        model(images).pooled.sum().backward()
        model.zero_grad(set_to_none=True)

    return run


class HubViT(nn.Module):
    """ViT-B as transformers has it, with attention by torch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        self.model = ViTModel(ViTConfig(num_channels=1, attn_implementation="sdpa"), add_pooling_layer=False)

    def forward(self, images: Tensor) -> Any:
        from medxray.encoders.adapt import features_from

        return features_from(self.model(images, interpolate_pos_encoding=True).last_hidden_state)


def models() -> list[Row]:
    """VMamba-B at 224 px, one image, beside itself on the torch back-end and a ViT-B of transformers."""
    torch.manual_seed(0)
    images = torch.randn(1, 1, 224, 224)
    vmamba, plain, vit = VMamba("base", drop_path=0.0), VMamba("base", drop_path=0.0, scan="torch"), HubViT()
    rows, together = [], (vmamba, plain, vit)
    for name, times in (
        ("forward", least(*(without_gradient(functools.partial(m, images)) for m in together), rounds=3)),
        ("training step", least(*(training_step(m, images) for m in together), rounds=3)),
    ):
        mine, torchs, hub = times
        record(f"VMamba-B, {name}", torchs / mine, "torch operations")
        record(f"VMamba-B, {name}, a model of its size", hub / mine, "transformers ViT-B")
        rows.append((f"VMamba-B, 224 px, one image, {name}", f"{mine:.0f} ms"))
        rows.append(("  on the torch back-end", f"{torchs:.0f} ms, {torchs / mine:.2f} times as long"))
        rows.append(("  ViT-B of transformers", f"{hub:.0f} ms, {hub / mine:.2f} times as long"))
    step = training_step(vmamba, images)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    totals = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    share = sum(us for key, us in totals.items() if key.startswith("medxray::scan")) / sum(totals.values())
    rows.append(("share of the scan in VMamba-B's training step: the most that a faster scan could save", f"{share:.0%}"))
    return rows


def growth(plot: Path | None) -> list[Row]:
    """Forward time of one image by its size: VMamba-B and ViT-B of patches of 16."""
    torch.manual_seed(0)
    sides = (224, 384, 512, 768, 1024, 1280)
    vmamba, vit = VMamba("base", drop_path=0.0).eval(), ViT("base").eval()
    seconds: dict[str, list[float]] = {"VMamba-B": [], "ViT-B, patch 16": []}
    for side in sides:
        images = torch.randn(1, 1, side, side)
        took = least(*(without_gradient(functools.partial(m, images)) for m in (vmamba, vit)), rounds=2)
        for line, ms in zip(seconds.values(), took, strict=True):
            line.append(ms / 1e3)
    if plot is not None:
        draw(sides, seconds, plot)
    rows = []
    for name, line in seconds.items():
        each = ", ".join(f"{side}: {s:.2f}" for side, s in zip(sides, line, strict=True))
        pixels = (sides[-1] / sides[0]) ** 2
        rows.append((f"{name}: seconds an image by pixels a side", each))
        rows.append(("  time per pixel at 1,280 over that at 224", f"{line[-1] / line[0] / pixels:.2f}"))
    return rows


def draw(sides: tuple[int, ...], seconds: dict[str, list[float]], path: Path) -> None:
    """Seconds over the number of pixels, so that a straight line is linear growth."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "medxray"
    figure, axes = plt.subplots(figsize=(6.4, 3.8), constrained_layout=True)
    megapixels = [side * side / 1e6 for side in sides]
    for (name, line), colour in zip(seconds.items(), ("#0b6e99", "#c4622d"), strict=True):
        axes.plot(megapixels, line, "o-", color=colour, linewidth=2, markersize=5)
        axes.annotate(name, (megapixels[-1], line[-1]), xytext=(-8, 8), textcoords="offset points", ha="right", color=colour)
    axes.set_xticks(megapixels, [f"{side}²" for side in sides], fontsize=8)
    highest = 1.1 * max(max(line) for line in seconds.values())
    axes.set(xlabel="image, pixels", ylabel="forward pass, seconds", xlim=(0, None), ylim=(0, highest))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


START = """
import time, torch
from medxray.encoders.scan import selective_scan
u = torch.ones(1, 64, 50, requires_grad=True)
started = time.perf_counter()
selective_scan(u, u, -torch.ones(64, 2), u[:, :2], u[:, :2]).sum().backward()
print(time.perf_counter() - started)
"""


def start() -> list[Row]:
    """The first call of a machine and of a later process."""
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            done = subprocess.run(
                [sys.executable, "-c", START], capture_output=True, text=True, check=True, env=environment
            )
            took.append(float(done.stdout))
    return [("first scan with gradients on a machine", f"{took[0]:.1f} s; in later processes {min(took[1:]):.2f} s")]


STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 7))
"""Channels inside a block and tokens a side of VMamba-B's stages at 224 px."""


def gpu() -> list[Row]:
    """The fused scan at VMamba-B's four stages, 32 images, beside the time to stream its bytes."""
    if not torch.cuda.is_available():
        return [("gpu", "left out: no CUDA device")]
    rows, device = [], "cuda"
    big = torch.empty(1 << 28, device=device)

    def timed(function: Callable[[], Any]) -> float:
        for _ in range(3):
            function()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 20

    per_byte = timed(big.clone) / (2 * big.numel() * 4)
    for dtype in (torch.float32, torch.bfloat16):
        for D, side in STAGES:
            draw = lambda *shape, d=dtype: torch.randn(*shape, device=device, dtype=d)  # noqa: E731
            given = [
                draw(32, D, side, side), draw(32, 4, D, side, side), -torch.rand(4 * D, 1, device=device),
                draw(32, 4, 1, side, side), draw(32, 4, 1, side, side), draw(4 * D).float(), draw(4 * D).float() - 3,
            ]  # fmt: skip
            leaves = [tensor.detach().requires_grad_() for tensor in given]
            for name in ("triton", "mamba-ssm", "torch"):
                if backends()[name]:
                    rows.append((f"gpu, {name}", f"left out: {backends()[name]}"))
                    continue

                def forward(name: str = name, given: list[Tensor] = given) -> Tensor:
                    with torch.no_grad():
                        return scan_map(*given, delta_softplus=True, backend=name)

                def both(name: str = name, leaves: list[Tensor] = leaves) -> Any:
                    y = scan_map(*leaves, delta_softplus=True, backend=name)
                    return torch.autograd.grad(y, leaves, torch.ones_like(y))

                size = given[0].numel() * given[0].element_size()
                # Forward reads u and four steps, writes y; backward reads u, dy and the steps, writes du and theirs.
                bound = [6 * size * per_byte, (6 + 11) * size * per_byte]
                took = [timed(forward), timed(both)]
                rows.append(
                    (
                        f"{name}, {str(dtype)[6:]}, 32 x {D} x {side}²: forward; with backward",
                        "; ".join(f"{t:.2f} ms, {t / b:.1f} x the bytes" for t, b in zip(took, bound, strict=True)),
                    )
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["scan", "length", "memory", "models", "growth", "start", "gpu"]
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=parts)
    parser.add_argument("--plot", type=Path, help="where to draw the growth with image size (.svg, .png)")
    chosen = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| what | figure |\n| --- | --- |", flush=True)
    for part in chosen.parts:
        rows = growth(chosen.plot) if part == "growth" else globals()[part]()
        for what, figure in rows:
            print(f"| {what.replace('  ', '&ensp;')} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
