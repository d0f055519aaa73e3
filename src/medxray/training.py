"""The only module that knows the training engine, transformers.Trainer on accelerate.

What it adds: checkpoints that are whole or absent, a log without clocks, and randomness that is a function of
(seed, step), so that a run resumed after a kill equals one that was never killed.
"""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from medxray.data import StudyImages, seed_of
from medxray.spec import TrainingSpec
from medxray.tasks import Task
from medxray.types import Batch, RunError, SpecError

CHECKPOINTS = "checkpoints"
BEST = "best.safetensors"
UNDECAYED = re.compile(r"(A_logs|Ds|_token)$")
BLOCK = re.compile(r"^(?:.*?\.)?(?:blocks|layers?|stages|h)\.\d+(?:\.blocks\.\d+)?(?=\.)")

Validate = Callable[[], dict[str, float]]


def fit(
    task: Task,
    images: StudyImages,
    folder: Path,
    validate: Validate,
    *,
    higher_is_better: bool = False,
    progress: bool = True,
) -> None:
    """Fits a task and leaves the best weights by `training.select` in it; resumes from the newest checkpoint.

    Args:
        task: prepared for its data.
        images: training studies.
        folder: run folder; gets checkpoints/ and log.jsonl.
        validate: -> metric -> value, with "loss" among them.
        higher_is_better: of the metric that chooses the weights.
        progress: show a bar.

    Raises:
        RunError: the loss is not finite, or a checkpoint cannot be written.
    """
    Fitter(task, images, folder, validate, higher_is_better, progress).run()


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, study) pairs, shuffled anew each epoch by (seed, epoch) alone.

    The studies of one step over all processes are those that one process with the whole batch would take; an
    incomplete last step is left out, its studies come in another epoch's order.
    """

    def __init__(self, studies: int, training: TrainingSpec, seed: int, rank: int, world: int) -> None:
        self.studies, self.seed, self.rank = studies, seed, rank
        step = training.batch_size * world * training.accumulate
        if studies < step:
            if world > 1 or training.accumulate > 1 or not studies:
                raise SpecError(
                    f"training.batch_size: one step takes {step} studies ({training.batch_size} x {world} processes "
                    f"x {training.accumulate} accumulated), but the training split has {studies}; lower it"
                )
            step = studies
        self.batch = step // (world * training.accumulate)
        self.whole = self.batch * world
        self.batches = studies // step * training.accumulate
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the studies."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.studies, generator=generator).tolist()
        for i in range(self.batches):
            start = i * self.whole + self.rank * self.batch
            yield [(self.epoch, study) for study in order[start : start + self.batch]]


class _EpochLoader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _Schedule(TrainerCallback):
    """Decides by step number alone when to log, validate and save."""

    def __init__(self, log: int, validate: int, save: int) -> None:
        self.log, self.validate, self.save = log, validate, save

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        step, last = state.global_step, state.global_step >= state.max_steps
        control.should_evaluate = last or step % self.validate == 0
        control.should_save = last or step % self.save == 0
        # The running mean of the loss is not part of a checkpoint: it is written out before one is made.
        control.should_log = control.should_evaluate or control.should_save or step % self.log == 0
        control.should_training_stop = last
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_log = control.should_evaluate = control.should_save = False
        return control


class _Bar(TrainerCallback):
    """A progress bar with rate, remaining time and the last logged loss."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fit", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class Fitter(Trainer):
    """transformers.Trainer for a `Task`."""

    def __init__(
        self,
        task: Task,
        images: StudyImages,
        folder: Path,
        validate: Validate,
        higher_is_better: bool,
        progress: bool,
    ) -> None:
        transformers_logging.set_verbosity_error()
        self.task, self.images, self.folder, self.validate = task, images, folder, validate
        self.settings: TrainingSpec = task.spec.training
        self.micro_step = 0
        settings, world = self.settings, int(os.environ.get("WORLD_SIZE", "1"))
        self.batches = EpochBatches(
            len(images), settings, task.spec.seed, int(os.environ.get("RANK", "0")), world
        )
        per_epoch = max(1, len(self.batches) // settings.accumulate)
        self.steps_per_epoch = per_epoch
        self.steps = settings.steps or math.ceil((settings.epochs or 1) * per_epoch)
        cpu = not torch.cuda.is_available()
        if settings.gradient_checkpointing:
            _checkpoint_activations(task)
        arguments = TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            max_steps=self.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulate,
            max_grad_norm=settings.clip,
            learning_rate=settings.learning_rate,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            torch_compile=settings.compile,
            seed=task.spec.seed,
            use_cpu=cpu,
            ddp_backend="gloo" if cpu and world > 1 else None,
            ddp_find_unused_parameters=True if world > 1 else None,
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            metric_for_best_model=settings.select,
            greater_is_better=higher_is_better,
            report_to=_reporters(),
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=task.spec.data.workers,
            dataloader_pin_memory=not cpu,
        )
        super().__init__(model=task, args=arguments, train_dataset=images)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.add_callback(
            _Schedule(settings.log_steps, settings.evaluate_steps or per_epoch, settings.save_steps or per_epoch)
        )
        if progress and self.is_world_process_zero():
            self.add_callback(_Bar())
        self._board: Any = None
        if self.is_world_process_zero() and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def run(self) -> None:
        """Fits from the newest checkpoint, or from the start, and loads the best weights."""
        checkpoint = newest_checkpoint(self.folder)
        if self.is_world_process_zero():
            (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            for half in (self.folder / CHECKPOINTS).glob(".*"):
                shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)
            _cut_log(self.folder / "log.jsonl", _step_of(checkpoint) if checkpoint else 0)
        self.task.watch(self.images)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.accelerator.wait_for_everyone()
        load_trained(self.task, self.folder / CHECKPOINTS / BEST)
        self.task.after_fit()
        self.task.eval()
        if self._board is not None:
            self._board.close()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by (seed, epoch), each wrapped so that the engine passes it on whole."""
        return _EpochLoader(
            self.images,
            batch_sampler=self.batches,
            collate_fn=_Collate(self.images),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Studies in the training split."""
        return len(self.images)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"batch": inputs["batch"].to(self.args.device, non_blocking=True)}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        count = torch.tensor(float(sum(self.task.items(sample["batch"]) for sample in batch_samples)), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count.clamp(min=1)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One batch forward and backward, with randomness from (seed, step, batch of the step, process) alone."""
        step = self.state.global_step
        if self.micro_step == 0:
            self.task.before_step(step, self.steps_per_epoch)
        torch.manual_seed(seed_of(self.task.spec.seed, step, self.micro_step, self.args.process_index))
        self.micro_step = (self.micro_step + 1) % self.current_gradient_accumulation_steps
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the step's mean over all processes."""
        loss = model(inputs["batch"], num_items_in_batch) * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over groups by rate, depth and decay."""
        self.optimizer: Any
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.task, self.settings),
                lr=self.settings.learning_rate,
                betas=(self.settings.betas[0], self.settings.betas[1]),
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Warm-up from zero, then cosine, linear or constant, down to a floor."""
        self.lr_scheduler: Any
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, rate_factor(self.settings, num_training_steps)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        # Uninterrupted and resumed runs must leave the same generator state to what follows.
        with torch.random.fork_rng(devices=[]):
            self.task.eval()
            metrics = {f"eval_{name}": value for name, value in self.validate().items()}
            self.task.train()
        self.log(dict(metrics))
        if f"eval_{self.settings.select}" not in metrics:
            raise SpecError(
                f"training.select: validation has no metric {self.settings.select!r} "
                f"(found: {', '.join(name.removeprefix('eval_') for name in metrics)})"
            )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best: bool = super()._determine_best_metric(metrics, trial)
        if (best or self.state.best_global_step is None) and self.is_world_process_zero():
            target = self.folder / CHECKPOINTS / BEST
            with _disk(target):
                save_trained(self.task, target)
        return best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line in log.jsonl: step, epoch and values; never a time, so that equal runs have equal logs."""
        if "train_runtime" in logs:
            return
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise RunError(
                f"the training loss is {loss} at step {self.state.global_step}; the last checkpoint is kept. "
                "Lower training.learning_rate, or use precision fp32"
            )
        super().log(logs)
        if self.is_world_process_zero():
            row = {"step": self.state.global_step, **logs}
            with _disk(self.folder / "log.jsonl"), (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self._board is not None:
                for name, value in logs.items():
                    self._board.add_scalar(name, value, self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.is_world_process_zero():
            root = self.folder / CHECKPOINTS
            name = f"step-{self.state.global_step:08d}"
            staged = root / f".{name}"
            with _disk(root / name):
                try:
                    staged.mkdir(parents=True)
                    save_trained(self.task, staged / "model.safetensors")
                    torch.save(self.optimizer.state_dict(), staged / "optimizer.pt")
                    torch.save(self.lr_scheduler.state_dict(), staged / "scheduler.pt")
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                    self._save_scaler(str(staged))
                    for file in staged.iterdir():
                        _flush(file)
                    staged.rename(root / name)
                    _flush(root)
                except BaseException:
                    shutil.rmtree(staged, ignore_errors=True)
                    raise
            for old in sorted(root.glob("step-*"))[: -int(self.settings.keep_checkpoints)]:
                # Renamed first: a kill while deleting must not leave a half checkpoint under its name.
                shutil.rmtree(old.rename(root / f".{old.name}"), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.task, Path(resume_from_checkpoint) / "model.safetensors")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""


class _Collate:
    """Picklable for loader workers."""

    def __init__(self, images: StudyImages) -> None:
        self.collate = images.collate

    def __call__(self, samples: list[Any]) -> dict[str, Batch]:
        return {"batch": self.collate(samples)}


def trained_state(task: Task) -> dict[str, Tensor]:
    """Every tensor of a task but those of frozen public weights."""
    public = task.frozen_public()
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in task.state_dict().items()
        if not (public and name.startswith(public))
    }


def save_trained(task: Task, path: Path, *, complete: bool = False) -> None:
    """Writes a task's tensors as safetensors: the old file or the new one stays, never half of one."""
    state = trained_state(task) if not complete else {k: v.detach().cpu() for k, v in task.state_dict().items()}
    unique: dict[int, str] = {}
    for name in list(state):
        # Tied tensors are saved once; loading ties them again.
        first = unique.setdefault(state[name].data_ptr() if state[name].numel() else id(state[name]), name)
        state[name] = state[name].clone() if first != name else state[name].contiguous()
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(state, staged, metadata={"format": "pt"})
        _flush(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def load_trained(task: Task, path: Path) -> None:
    """Reads what `save_trained` wrote.

    Raises:
        WeightsError: with the keys and shapes that disagree.
        RunError: the file is damaged.
    """
    from medxray.weights import load_into

    try:
        state = load_file(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"weights {path} cannot be read: {error}; fit again, or restore the file") from error
    except Exception as error:  # safetensors raises its own type
        raise RunError(f"weights {path} are damaged: {error}; fit again, or restore the file") from error
    present = set(state)
    allowed = tuple(name for name in task.state_dict() if name not in present and name.startswith(task.frozen_public()))
    load_into(task, state, str(path), allow_missing=allowed if task.frozen_public() else ())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    found = sorted((folder / CHECKPOINTS).glob("step-*"))
    return found[-1] if found else None


def parameter_groups(task: Task, settings: TrainingSpec) -> list[dict[str, Any]]:
    """Trained parameters by (rate, decay). The encoder's blocks get smaller rates the further from its output."""
    encoder = [name for name, _ in task.encoder.named_parameters()]
    blocks = list(dict.fromkeys(m[0] for name in encoder if (m := BLOCK.match(name))))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    reached = False
    for name, parameter in task.named_parameters():
        part, _, rest = name.partition(".")
        rate = settings.rates.get(part, settings.learning_rate)
        if part == "encoder":
            match = BLOCK.match(rest)
            reached = reached or match is not None
            depth = blocks.index(match[0]) + 1 if match else (len(blocks) + 1 if reached else 0)
            rate *= settings.layer_decay ** (len(blocks) + 1 - depth)
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or UNDECAYED.search(name) else settings.weight_decay
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    unknown = set(settings.rates) - {name.partition(".")[0] for name, _ in task.named_parameters()}
    if unknown:
        raise SpecError(
            f"training.rates: no part {sorted(unknown)[0]!r}; "
            f"found {', '.join(sorted({n.partition('.')[0] for n, _ in task.named_parameters()}))}"
        )
    return list(groups.values())


def rate_factor(settings: TrainingSpec, steps: int) -> Callable[[int], float]:
    """Step -> factor on the peak rate."""
    warmup = round(settings.warmup * steps)
    floor = settings.min_learning_rate / settings.learning_rate if settings.learning_rate else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if settings.schedule == "constant":
            return 1.0
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
        return floor + (1 - floor) * falling

    return factor


def _reporters() -> list[str]:
    wandb = importlib.util.find_spec("wandb") is not None
    return ["wandb"] if wandb and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")) else []


def _checkpoint_activations(task: Task) -> None:
    module: Any
    for module in task.modules():
        if hasattr(module, "activation_checkpointing_enable"):  # transformers' newer name
            module.activation_checkpointing_enable({"use_reentrant": False})
        elif hasattr(module, "gradient_checkpointing_enable"):
            module.gradient_checkpointing_enable({"use_reentrant": False})
        elif isinstance(getattr(module, "gradient_checkpointing", None), bool):
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _cut_log(path: Path, step: int) -> None:
    """Takes lines after a step, or half written ones, off a log."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    staged = path.with_name(f".{path.name}")
    staged.write_text("".join(kept), encoding="utf-8")
    staged.replace(path)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Says in words that a disk is full or read-only; what was saved before stays."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, RuntimeError) and "write" not in reason and "PytorchStreamWriter" not in reason:
            raise
        raise RunError(
            f"{path} could not be written: {reason}; what was saved before is whole. "
            "Free some space or name another folder with output=..., then fit again to go on"
        ) from error
