"""The only module that knows the training engine, transformers.Trainer on accelerate.

What it adds: checkpoints that are whole or absent, a log without clocks, randomness and schedules that are functions
of (seed, step), so that a run resumed after a kill equals one that was never killed; and a stop before anything is
learned from a loss that is not finite.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from medxray import disk, processes
from medxray.data import StudyImages, seed_of
from medxray.data.images import in_words
from medxray.data.loading import end_unanswered, is_out_of_memory, loading
from medxray.data.readers import Locality
from medxray.layers import MLP
from medxray.progress import progress_bar
from medxray.sharding import Sharded, as_divided, local, read_shards, shard_shapes, write_shards
from medxray.spec import TrainingSpec
from medxray.tasks import Task
from medxray.types import Batch, RunError, SpecError

CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
AVERAGES = "ema.safetensors"
SHARDS, PLAN, SUMS = "shards", "processes.json", "sums.json"
BEST = "best.safetensors"
ZERO = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
"""What deepspeed is told. Weights stay whole in each process, so that all that judges and writes them works as ever."""
UNDECAYED = re.compile(r"(A_logs|Ds|_token|pos_embed)$")
BLOCK = re.compile(r"^(?:.*?\.)?(?:blocks|layers?|stages|h)\.\d+(?:\.blocks\.\d+)?(?=\.)")

Validate = Callable[[], dict[str, float]]


def fit(
    task: Task,
    images: StudyImages,
    folder: Path,
    validate: Validate,
    *,
    pictured: Batch | None = None,
    higher_is_better: bool = False,
    progress: bool = True,
) -> None:
    """Fits a task and leaves the best weights by `training.select` in it; resumes from the newest checkpoint.

    Args:
        task: prepared for its data.
        images: training studies.
        folder: run folder; gets checkpoints/ and log.jsonl.
        validate: -> metric -> value, with "loss" among them.
        pictured: studies that the task draws after each epoch, into pictures/ of the run folder.
        higher_is_better: of the metric that chooses the weights.
        progress: show a bar.

    Raises:
        RunError: the loss or its gradients are not finite, with the studies that cause it; or a checkpoint cannot be
            written; or another process was lost.
        SpecError: `training` asks for what this machine or this number of processes cannot do.
    """
    Fitter(task, images, folder, validate, pictured, higher_is_better, progress).run()


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, study) pairs, shuffled anew each epoch by (seed, epoch) alone. Of a data set in shards the
    parts come in random order, and studies are shuffled among as many parts as are at hand at a time.

    The studies of one step over all processes are those that one process with the whole batch would take; an
    incomplete last step is left out, its studies come in another epoch's order. A run that goes on with another number of
    processes keeps its steps: each is divided anew, into parts that differ by one study at most where it does not come out even.

    Args:
        studies: how many there are, each of which an epoch has once; or the row of each that it has, as often as it has it.
        planned: processes that the run began with; `world` if None.

    Attributes:
        accumulate: batches of a process that make one step.
    """

    def __init__(
        self,
        studies: int | NDArray[np.int64],
        training: TrainingSpec,
        seed: int,
        rank: int,
        world: int,
        locality: Locality | None = None,
        planned: int | None = None,
    ) -> None:
        self.rows = np.arange(studies) if isinstance(studies, int) else studies
        self.seed, self.rank, self.world, self.locality = seed, rank, world, locality
        planned = planned or world
        step, count = training.batch_size * planned * training.accumulate, len(self.rows)
        if count < step:
            if planned > 1 or training.accumulate > 1 or not count:
                raise SpecError(
                    f"training.batch_size: one step takes {step} studies ({training.batch_size} x {planned} processes "
                    f"x {training.accumulate} accumulated), but the training split has {count}; lower it"
                )
            step = count
        if step < world:
            raise SpecError(
                f"training.batch_size: one step of this run takes {step} studies, which cannot be divided among {world} "
                f"processes; start at most {step}, or begin anew with more studies a step"
            )
        self.step = step
        self.accumulate = min(-(-step // (training.batch_size * world)), step // world)
        if planned == world:
            self.accumulate = training.accumulate
        self.batches = count // step * self.accumulate
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the studies."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        shuffled = torch.randperm(len(self.rows), generator=generator).numpy()
        if self.locality is not None:
            parts, window = self.locality
            places = torch.randperm(int(parts.max()) + 1, generator=generator).numpy()
            shuffled = np.lexsort((shuffled, places[parts[self.rows]] // window))
        order = self.rows[shuffled].tolist()
        pieces = self.accumulate * self.world
        for i in range(self.batches):
            begin, piece = i // self.accumulate * self.step, i % self.accumulate * self.world + self.rank
            start, stop = (begin + self.step * edge // pieces for edge in (piece, piece + 1))
            yield [(self.epoch, study) for study in order[start:stop]]


def oversampled(images: StudyImages, times: Mapping[str, int]) -> NDArray[np.int64]:
    """Rows of the studies of an epoch, those with a label of `times` as often as it says."""
    count = np.ones(len(images), np.int64)
    if times:
        present = images.label_array(list(times)) == 1
        count = np.maximum(count, np.where(present, np.array(list(times.values())), 1).max(axis=1))
    return np.repeat(np.arange(len(images)), count)


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
        self.bar = progress_bar(
            total=state.max_steps, initial=state.global_step, desc="fit", unit="step", dynamic_ncols=True
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        shown = {key: f"{value:.4g}" for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class WeightAverage(TrainerCallback):
    """An exponential moving average of a task's trained parameters, in float32 on their devices.

    After step n, from 0 on, its decay is min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
    Buffers, such as the statistics of batch norm, are the model's own.
    """

    def __init__(self, task: nn.Module, decay: float) -> None:
        self.decay = decay
        named = {name: p for name, p in task.named_parameters() if p.requires_grad}
        self.names, self.parameters = list(named), list(named.values())
        self.averages = [p.detach().to(torch.float32, copy=True) for p in self.parameters]

    @property
    def named(self) -> dict[str, Tensor]:
        """Name of a parameter -> its average."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        n = state.global_step - 1
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_([local(a) for a in self.averages], [local(p).float() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The task with averaged weights; its own come back in the end."""
        own = [p.data for p in self.parameters]
        try:
            for parameter, average in zip(self.parameters, self.averages, strict=True):
                parameter.data = average.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data

    def save(self, path: Path) -> None:
        """Writes the averages as safetensors, by the names of their parameters."""
        with disk.replacing(path) as staged:
            save_file({name: average.cpu() for name, average in self.named.items()}, staged, metadata={"format": "pt"})

    def load(self, path: Path) -> None:
        """The inverse of `save`.

        Raises:
            RunError: the file is missing, damaged, or of other parameters.
        """
        try:
            state = load_file(path)
            for name, average in zip(self.names, self.averages, strict=True):
                average.copy_(as_divided(state[name], average))
        except Exception as error:  # safetensors raises its own type
            raise RunError(
                f"averaged weights {path} cannot be read: {type(error).__name__}: {error}; "
                "delete this checkpoint to go on from the one before it"
            ) from error


class _Step(NamedTuple):
    """What is kept of an optimiser step until it is known that it was sound.

    Attributes:
        number: from 1 on.
        epoch: of its studies.
        study_ids: of this process.
        loss: () its share of the loss.
        unsound: () 0 where the loss and its gradients are finite on all processes.
    """

    number: int
    epoch: int
    study_ids: list[str]
    loss: Tensor
    unsound: Tensor


class Fitter(Trainer):
    """transformers.Trainer for a `Task`."""

    optimizer: Any
    model_wrapped: Any

    def __init__(
        self,
        task: Task,
        images: StudyImages,
        folder: Path,
        validate: Validate,
        pictured: Batch | None,
        higher_is_better: bool,
        progress: bool,
    ) -> None:
        transformers_logging.set_verbosity_error()
        self.task, self.images, self.folder, self.validate = task, images, folder, validate
        self.settings: TrainingSpec = task.spec.training
        self.pictured, self.drawn_at = pictured, 0
        self.micro_step = 0
        self.losses: list[Tensor] = []
        self.study_ids: list[str] = []
        self.unchecked: list[_Step] = []
        settings, world = self.settings, processes.world()
        self.strategy = strategy_of(settings, world)
        self.sharded: Sharded | None = None
        self.average: WeightAverage | None = None
        self.checkpoint = newest_checkpoint(folder)
        self.planned = _planned(self.checkpoint) or world
        locality = images.locality if isinstance(images, StudyImages) and images.features is None else None
        rows = oversampled(images, settings.oversample)
        self.batches = EpochBatches(rows, settings, task.spec.seed, processes.rank(), world, locality, self.planned)
        per_epoch = max(1, len(self.batches) // self.batches.accumulate)
        self.steps_per_epoch = per_epoch
        self.steps = settings.steps or math.ceil((settings.epochs or 1) * per_epoch)
        self.peak = settings.peak(self.planned, task.repeats)
        cpu = not torch.cuda.is_available()
        checkpoint_activations(task, settings.gradient_checkpointing)
        arguments = TrainingArguments(
            output_dir=str(folder / CHECKPOINTS),
            max_steps=self.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=self.batches.accumulate,
            max_grad_norm=settings.clip,
            learning_rate=self.peak,
            bf16=settings.precision == "bf16",
            fp16=settings.precision == "fp16",
            # Divided blocks are compiled one by one.
            torch_compile=settings.compile and self.strategy != "fsdp",
            deepspeed=ZERO if self.strategy == "deepspeed" else None,
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
        with processes.together(self._where):
            self._run(self.checkpoint)

    @contextlib.contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            kept = newest_checkpoint(self.folder)
            raise RunError(
                f"out of memory at step {self.state.global_step + 1} of {self.steps}: {in_words(error)}; "
                f"{f'{kept.name} is kept' if kept else 'there is no checkpoint yet'}. Lower training.batch_size and raise "
                "training.accumulate, or set training.gradient_checkpointing"
            ) from error

    def _where(self) -> str:
        kept = newest_checkpoint(self.folder)
        state = f"the checkpoint of step {_step_of(kept)} is kept" if kept else "there is no checkpoint yet"
        return (
            f" after step {self.state.global_step} of {self.steps}; {state}, from which the same command goes on, with fewer "
            "processes too"
        )

    def _run(self, checkpoint: Path | None) -> None:
        processes.wait()
        if self.is_world_process_zero():
            (self.folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            for half in (self.folder / CHECKPOINTS).glob(".*"):
                shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)
            _cut_log(self.folder / "log.jsonl", _step_of(checkpoint) if checkpoint else 0)
        self.task.watch(self.images)
        # A run that was killed after its last step has none left; the Trainer would still take one.
        if checkpoint is None or _step_of(checkpoint) < self.steps:
            if checkpoint is not None:
                _check_sums(checkpoint)
                _load_weights(self.task, checkpoint)
            if self.strategy == "fsdp":
                self._divide()
            if self.settings.ema is not None:
                self.average = WeightAverage(self.model, self.settings.ema)
                self.add_callback(self.average)
            with self._in_memory(), loading():
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self._join()
        self.accelerator.wait_for_everyone()
        load_trained(self.task, self.folder / CHECKPOINTS / BEST)
        self.task.after_fit()
        self.task.eval()
        if self._board is not None:
            self._board.close()

    def _divide(self) -> None:
        """The model that learns is a divided copy of the task from here on."""
        self.sharded = Sharded(self.task, compile=self.settings.compile)
        self.model = self.model_wrapped = self.sharded.learner
        prepare = self.accelerator.prepare_model
        # It gets autocast; who has what, and the sum of gradients, are its own.
        divided: Any = functools.partial(prepare, device_placement=False, evaluation_mode=True)
        self.accelerator.prepare_model = lambda model, **_: divided(model)  # type: ignore[method-assign]
        if self.settings.precision != "fp32":
            divided(self.task)

    def _join(self) -> None:
        if self.sharded is not None:
            self.sharded.fill()
            self.sharded = None
            self.optimizer = None
            self.model = self.model_wrapped = self.task

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by (seed, epoch), each wrapped so that the engine passes it on whole."""
        return _EpochLoader(
            self.images,
            batch_sampler=self.batches,
            collate_fn=_Collate(self.images),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=end_unanswered,
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
            with self._whole() if self.task.looks_before(step, self.steps_per_epoch) else contextlib.nullcontext():
                self.task.before_step(step, self.steps_per_epoch)
            if self.sharded is not None:
                self.sharded.follow()
            if self.settings.final_weight_decay is not None:
                for group in self.optimizer.param_groups:
                    if group["decays"]:
                        group["weight_decay"] = weight_decay(self.settings, step, self.steps)
            self.losses, self.study_ids = [], []
        torch.manual_seed(seed_of(self.task.spec.seed, step, self.micro_step, self.args.process_index))
        self.micro_step = (self.micro_step + 1) % self.current_gradient_accumulation_steps
        self.study_ids += inputs["batch"].study_ids
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the step's mean over all processes."""
        loss = model(inputs["batch"], num_items_in_batch) * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    @property
    def deferred(self) -> bool:
        """True where reading a number would make the host wait for the device: steps are then checked when the loss is
        logged, and the optimiser itself passes over those that are unsound."""
        # The optimiser's flag and divided parameters do not go together.
        return self.args.device.type == "cuda" and self.strategy not in ("fsdp", "deepspeed")

    @property
    def rescaled(self) -> bool:
        """True where a scaler of fp16 makes gradients overflow now and then, and leaves such steps out."""
        return getattr(self.accelerator, "scaler", None) is not None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last place before the optimiser's step.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.settings.clip_value:
            # Gradients are on their own scale by now: the norm was taken of them.
            for parameter in model.parameters():
                if parameter.grad is not None:
                    local(parameter.grad).clamp_(-self.settings.clip_value, self.settings.clip_value)
        loss = torch.stack(self.losses).sum()
        finite = loss.isfinite()
        # deepspeed has none before its first step.
        if not self.rescaled and norm is not None:
            finite = finite & torch.as_tensor(norm, device=loss.device).isfinite()
        unsound = (~finite).float()
        if self.args.world_size > 1:
            unsound = self.accelerator.reduce(unsound, reduction="sum").clamp(max=1)
        epoch = int(self.state.epoch or 0)
        self.unchecked.append(_Step(self.state.global_step + 1, epoch, self.study_ids, loss, unsound))
        if not self.deferred:
            self._check_steps()
        elif not self.rescaled:
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            if all(group["fused"] for group in optimizer.param_groups):
                optimizer.found_inf = unsound
        return norm

    def _check_steps(self) -> None:
        """Raises RunError for the first step that was unsound since the last check."""
        steps, self.unchecked = self.unchecked, []
        if not steps:
            return
        unsound = torch.stack([step.unsound for step in steps]).tolist()
        for step, wrong in zip(steps, unsound, strict=True):
            if wrong:
                raise RunError(self._unsound(step))

    def _unsound(self, step: _Step) -> str:
        """What is wrong with a step, which studies cause it, and what to do."""
        with self._whole():
            names, guilty = step.study_ids, self._causes(step)
        loss = float(step.loss)
        if self.args.world_size > 1:
            found: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(found, (names, guilty, loss))
            names, guilty = ([name for part in found for name in part[i]] for i in (0, 1))
            loss = sum(part[2] for part in found)
        what = "the gradients are not finite" if math.isfinite(loss) else f"the training loss is {loss}"
        kept = newest_checkpoint(self.folder)
        if guilty:
            who = f"it comes from {'studies' if len(guilty) > 1 else 'study'} {_some(guilty)}"
            cure = "look at the images and leave the study out if they are wrong; else lower the learning rate"
        else:
            who = f"none of its {len(names)} studies was found to cause it alone: {_some(names)}"
            cure = "lower the learning rate, or use training.precision fp32"
        state = f"the checkpoint of step {_step_of(kept)} is kept" if kept else "there is no checkpoint yet"
        return f"{what} at step {step.number} of {self.steps}; {who}; {state}. To go on, {cure}, and fit again"

    def _causes(self, step: _Step) -> list[str]:
        """The studies of a step whose own loss or gradients are not finite."""
        rows = {name: row for row, name in enumerate(self.images.study_ids)}
        parameters = [p for p in self.task.parameters() if p.requires_grad]
        guilty = []
        for name in dict.fromkeys(step.study_ids):
            # Twice, because a batch norm that trains takes no batch of one.
            batch = self.images.collate([self.images[step.epoch, rows[name]]] * 2).to(self.args.device)
            torch.manual_seed(seed_of(self.task.spec.seed, step.number - 1))
            with torch.enable_grad(), self.compute_loss_context_manager():
                loss = self.task(batch)
            sound = bool(loss.isfinite())
            if sound and not self.rescaled:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                sound = all(bool(g.isfinite().all()) for g in gradients if g is not None)
            if not sound:
                guilty.append(name)
        return guilty

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW or Adam over groups by rate, depth and decay."""
        if self.optimizer is None:
            kind = torch.optim.AdamW if self.settings.optimiser == "adamw" else torch.optim.Adam
            self.optimizer = kind(
                parameter_groups(self.learner, self.settings, self.peak),
                lr=self.peak,
                betas=(self.settings.betas[0], self.settings.betas[1]),
                amsgrad=self.settings.amsgrad,
                # The fused one can pass over a step by a flag on the device.
                fused=True if self.deferred and not self.rescaled else None,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Warm-up from zero, then as `training.schedule` says."""
        self.lr_scheduler: Any
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                rate_factor(self.settings, num_training_steps, self.peak, self.steps_per_epoch),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        with self._judged():
            metrics = {f"eval_{name}": value for name, value in self.validate().items()}
        self.log(dict(metrics))
        if f"eval_{self.settings.select}" not in metrics:
            raise SpecError(
                f"training.select: validation has no metric {self.settings.select!r} "
                f"(found: {', '.join(name.removeprefix('eval_') for name in metrics)})"
            )
        return metrics

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """The task as it would be kept if the fit ended here."""
        # Uninterrupted and resumed runs must leave the same generator state to what follows.
        with torch.random.fork_rng(devices=[]), self._averaged():
            self.task.eval()
            yield
            self.task.train()

    @property
    def learner(self) -> Task:
        """What the optimiser works on: the task, or its divided copy."""
        return self.sharded.learner if self.sharded is not None else self.task

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """The task with all of its weights, which divided ones are gathered for."""
        return self.sharded.whole() if self.sharded is not None else contextlib.nullcontext()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """The same with averaged weights, where there are any."""
        if self.average is None:
            return self._whole()
        return self.sharded.whole(self.average.named) if self.sharded is not None else self.average.in_place()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # Before a checkpoint is made, so that a run that goes on from it has every picture.
        step = self.state.global_step
        if step != self.drawn_at and (step % self.steps_per_epoch == 0 or step >= self.steps):
            self.drawn_at = step
            self._draw(f"step-{step:08d}")
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _draw(self, name: str) -> None:
        if self.pictured is None:
            return
        with self._judged(), torch.no_grad():
            if not self.is_world_process_zero():
                return
            try:
                self.task.pictures(self.pictured.to(self.args.device), self.folder / PICTURES, name)
            except OSError as error:
                warnings.warn(
                    f"pictures of {name} could not be written to {self.folder / PICTURES}: {error.strerror or error}; "
                    "the fit goes on",
                    stacklevel=2,
                )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best: bool = super()._determine_best_metric(metrics, trial)
        # Infinite while no validation has had a number: then the newest weights stand in.
        if best or math.isinf(self.state.best_metric):
            target = self.folder / CHECKPOINTS / BEST
            with _disk(target), self._averaged():
                if self.is_world_process_zero():
                    save_trained(self.task, target)
        return best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line in log.jsonl: step, epoch and values; never a time, so that equal runs have equal logs."""
        if "train_runtime" in logs:
            return
        if "loss" in logs:
            self._check_steps()
            if self.settings.final_weight_decay is not None:
                logs["weight_decay"] = weight_decay(self.settings, self.state.global_step - 1, self.steps)
            logs |= self.task.logged()
        super().log(logs)
        if self.is_world_process_zero():
            row = {"step": self.state.global_step, **logs}
            with _disk(self.folder / "log.jsonl"), (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if self._board is not None:
                for name, value in logs.items():
                    self._board.add_scalar(name, value, self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = self.folder / CHECKPOINTS
        name = f"step-{self.state.global_step:08d}"
        staged = root / f".{name}"
        if self.sharded is not None:
            with _disk(root / name):
                write_shards(staged / SHARDS, self._shards())
        elif self.strategy == "deepspeed":
            self.model_wrapped.save_checkpoint(str(staged))
        if self.is_world_process_zero():
            with _disk(root / name):
                try:
                    staged.mkdir(parents=True, exist_ok=True)
                    if self.sharded is None:
                        save_trained(self.task, staged / "model.safetensors")
                        if self.average is not None:
                            self.average.save(staged / AVERAGES)
                        if self.strategy != "deepspeed":
                            torch.save(self.optimizer.state_dict(), staged / "optimizer.pt")
                    torch.save(self.lr_scheduler.state_dict(), staged / "scheduler.pt")
                    self.state.save_to_json(str(staged / "trainer_state.json"))
                    (staged / PLAN).write_text(json.dumps({"processes": self.planned}), encoding="utf-8")
                    self._save_scaler(str(staged))
                    sums = {file.name: disk.digest(file) for file in sorted(staged.iterdir()) if file.is_file()}
                    (staged / SUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")
                    for file in staged.rglob("*"):
                        disk.flush(file)
                    staged.rename(root / name)
                    disk.flush(root)
                except BaseException:
                    shutil.rmtree(staged, ignore_errors=True)
                    raise
            for old in sorted(root.glob("step-*"))[: -int(self.settings.keep_checkpoints)]:
                # Renamed first: a kill while deleting must not leave a half checkpoint under its name.
                shutil.rmtree(old.rename(root / f".{old.name}"), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _shards(self) -> dict[str, Tensor]:
        """What a checkpoint of a divided model holds: its tensors, their averages, and the optimiser's."""
        assert self.sharded is not None
        weights = {name: self.sharded.parameters.get(name, tensor) for name, tensor in trained_tensors(self.task).items()}
        state = {f"model/{name}": tensor.detach() for name, tensor in weights.items()}
        if self.average is not None:
            state |= {f"ema/{name}": tensor for name, tensor in self.average.named.items()}
        for name, parameter in self.learner.named_parameters():
            held = self.optimizer.state.get(parameter, {})
            state |= {f"optimizer/{key}/{name}": tensor for key, tensor in held.items()}
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights are there by now; here come their averages."""
        folder = Path(resume_from_checkpoint)
        if self.average is None:
            return
        if (folder / SHARDS).is_dir():
            read_shards(folder / SHARDS, {f"ema/{name}": tensor for name, tensor in self.average.named.items()})
        else:
            self.average.load(folder / AVERAGES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.strategy == "deepspeed":
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder, groups = Path(checkpoint), self.optimizer.state_dict()["param_groups"]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if (folder / SHARDS).is_dir():
            held = self._read_optimizer(folder / SHARDS, parameters)
        else:
            whole = _state(folder / "optimizer.pt")
            groups = whole["param_groups"]
            held = {
                i: {key: as_divided(value, parameters[i]) for key, value in own.items()} for i, own in whole["state"].items()
            }
        self.optimizer.load_state_dict({"state": held, "param_groups": groups})
        self.lr_scheduler.load_state_dict(_state(folder / "scheduler.pt"))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _read_optimizer(self, folder: Path, parameters: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimiser's state by numbers of parameters, each process its own parts."""
        numbers = {id(parameter): i for i, parameter in enumerate(parameters)}
        places = {name: numbers[id(p)] for name, p in self.learner.named_parameters() if id(p) in numbers}
        wanted: dict[str, Tensor] = {}
        held: dict[int, dict[str, Tensor]] = {}
        for full, shape in shard_shapes(folder).items():
            part, _, rest = full.partition("/")
            key, _, name = rest.partition("/")
            if part == "optimizer" and name in places:
                like = parameters[places[name]]
                wanted[full] = torch.zeros_like(like) if shape == like.shape else torch.zeros(shape)
                held.setdefault(places[name], {})[key] = wanted[full]
        read_shards(folder, wanted)
        return held

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: every step seeds itself."""


class _Collate:
    """Picklable for loader workers."""

    def __init__(self, images: StudyImages) -> None:
        self.collate = images.collate

    def __call__(self, samples: list[Any]) -> dict[str, Batch]:
        return {"batch": self.collate(samples)}


def strategy_of(settings: TrainingSpec, world: int) -> Literal["none", "ddp", "fsdp", "deepspeed"]:
    """How `world` processes share a fit.

    Raises:
        SpecError: `training.strategy` is not possible here.
    """
    strategy = settings.strategy
    if strategy == "auto":
        return "ddp" if world > 1 else "none"
    if strategy == "fsdp":
        if world == 1:
            raise SpecError(
                "training.strategy: fsdp divides a model among processes, and there is one; start several, such as "
                "torchrun --nproc-per-node 2 -m medxray.cli fit ..., or use auto"
            )
        if settings.precision == "fp16":
            raise SpecError("training.strategy: fsdp does not scale losses as training.precision fp16 needs; use bf16")
    if strategy == "deepspeed":
        if not torch.cuda.is_available():
            raise SpecError("training.strategy: deepspeed works on GPUs, and there is none here; use ddp or fsdp")
        if importlib.util.find_spec("deepspeed") is None:
            raise SpecError("training.strategy: deepspeed is not installed; pip install deepspeed, or use fsdp")
    return strategy if world > 1 or strategy == "deepspeed" else "none"


def _planned(checkpoint: Path | None) -> int | None:
    """How many processes a run began with; None where it is not known."""
    if checkpoint is None or not (checkpoint / PLAN).is_file():
        return None
    try:
        return int(json.loads((checkpoint / PLAN).read_text(encoding="utf-8"))["processes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"checkpoint {checkpoint}: {PLAN} cannot be read ({error}); delete this checkpoint to go on from the one before it"
        ) from error


def _check_sums(checkpoint: Path) -> None:
    """Raises RunError where a file of a checkpoint is not what was written; the parts of divided tensors check themselves."""
    told = f"delete this checkpoint to go on from the one before it, if there is one: rm -r {checkpoint}"
    path = checkpoint / SUMS
    if not path.is_file():
        return
    try:
        sums = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); {told}") from error
    for name, known in sums.items():
        file = checkpoint / name
        if not file.is_file() or disk.digest(file) != known:
            raise RunError(f"{file} is {'damaged' if file.is_file() else 'missing'}: it is not what was written; {told}")


def trained_tensors(task: Task) -> dict[str, Tensor]:
    """Every tensor of a task but those of frozen public weights."""
    public = task.frozen_public()
    return {
        name: tensor for name, tensor in task.state_dict().items() if not (public and name.startswith(public))
    }


def trained_state(task: Task) -> dict[str, Tensor]:
    """The same on the CPU, in one piece each."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(task).items()}


def _load_weights(task: Task, checkpoint: Path) -> None:
    """The weights of a checkpoint, divided or not, into a task that is whole."""
    if (checkpoint / SHARDS).is_dir():
        read_shards(checkpoint / SHARDS, {f"model/{name}": tensor for name, tensor in trained_tensors(task).items()})
    else:
        load_trained(task, checkpoint / "model.safetensors")


def save_trained(task: Task, path: Path, *, complete: bool = False) -> None:
    """Writes a task's tensors as safetensors: the old file or the new one stays, never half of one."""
    state = trained_state(task) if not complete else {k: v.detach().cpu() for k, v in task.state_dict().items()}
    unique: dict[int, str] = {}
    for name in list(state):
        # Tied tensors are saved once; loading ties them again.
        first = unique.setdefault(state[name].data_ptr() if state[name].numel() else id(state[name]), name)
        state[name] = state[name].clone() if first != name else state[name].contiguous()
    with disk.replacing(path) as staged:
        # One entry: several are written in an order that changes from run to run.
        save_file(state, staged, metadata={"sha256": _sum(state)})


def _sum(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, kinds, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_trained(task: Task, path: Path) -> None:
    """Reads what `save_trained` wrote.

    Raises:
        WeightsError: with the keys and shapes that disagree.
        RunError: the file is damaged.
    """
    from medxray.weights import load_into

    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("sha256")
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"weights {path} cannot be read: {error}; fit again, or restore the file") from error
    except Exception as error:  # safetensors raises its own type
        raise RunError(f"weights {path} are damaged: {error}; fit again, or restore the file") from error
    if known is not None and known != _sum(state):
        raise RunError(f"weights {path} are damaged: they are not what was written; fit again, or restore the file")
    present = set(state)
    public = task.frozen_public()
    allowed = [name for name in task.state_dict() if name not in present and name.startswith(public)]
    load_into(task, state, str(path), allow_missing=allowed)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    found = sorted((folder / CHECKPOINTS).glob("step-*"))
    return found[-1] if found else None


def parameter_groups(task: Task, settings: TrainingSpec, peak: float) -> list[dict[str, Any]]:
    """Trained parameters by (rate, decay). The encoder's blocks get smaller rates the further from its output."""
    scheduled = settings.final_weight_decay is not None
    encoder = [name for name, _ in task.encoder.named_parameters()]
    blocks = list(dict.fromkeys(m[0] for name in encoder if (m := BLOCK.match(name))))
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    reached = False
    for name, parameter in task.named_parameters():
        part, _, rest = name.partition(".")
        rate = settings.rates.get(part, peak)
        if part == "encoder":
            match = BLOCK.match(rest)
            reached = reached or match is not None
            depth = blocks.index(match[0]) + 1 if match else (len(blocks) + 1 if reached else 0)
            rate *= settings.layer_decay ** (len(blocks) + 1 - depth)
        if not parameter.requires_grad:
            continue
        whole = settings.optimiser == "adam" or (parameter.ndim > 1 and not UNDECAYED.search(name))
        decays = (scheduled or settings.weight_decay > 0) and whole
        decay = settings.weight_decay if decays else 0.0
        group = groups.setdefault(
            (rate, decays), {"params": [], "lr": rate, "weight_decay": decay, "decays": decays}
        )
        group["params"].append(parameter)
    unknown = set(settings.rates) - {name.partition(".")[0] for name, _ in task.named_parameters()}
    if unknown:
        raise SpecError(
            f"training.rates: no part {sorted(unknown)[0]!r}; "
            f"found {', '.join(sorted({n.partition('.')[0] for n, _ in task.named_parameters()}))}"
        )
    return list(groups.values())


def weight_decay(settings: TrainingSpec, step: int, steps: int) -> float:
    """Of a step, from 0 on: from `weight_decay` to `final_weight_decay` along half a cosine over the steps."""
    if settings.final_weight_decay is None:
        return settings.weight_decay
    rest = 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    return settings.final_weight_decay + (settings.weight_decay - settings.final_weight_decay) * rest


def rate_factor(
    settings: TrainingSpec, steps: int, peak: float, steps_per_epoch: int = 1
) -> Callable[[int], float]:
    """Step -> factor on the peak rate."""
    warmup = round(settings.warmup * steps)
    floor = settings.min_learning_rate / peak if peak else 0.0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings.schedule == "step":
            return float(settings.step_factor ** (step // (settings.step_epochs * steps_per_epoch)))
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if settings.schedule == "constant":
            return 1.0
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
        return floor + (1 - floor) * falling

    return factor


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _reporters() -> list[str]:
    wandb = importlib.util.find_spec("wandb") is not None
    return ["wandb"] if wandb and (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")) else []


def checkpoint_activations(task: nn.Module, what: bool | str) -> None:
    """Makes a task recompute activations: True whole blocks, "mlp" what stands between the layers of their MLPs."""
    module: Any
    for module in task.modules() if what else ():
        if what == "mlp":
            if isinstance(module, MLP):
                module.recompute = True
        elif hasattr(module, "activation_checkpointing_enable"):  # transformers' newer name
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
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    with _disk(path):
        disk.write(path, "".join(kept))


def _state(path: Path) -> Any:
    """What a checkpoint holds of an optimiser or a schedule: tensors and plain values, and nothing that would have to be run.

    Raises:
        RunError: it is damaged, or holds more.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch have errors of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{path} cannot be read: {reason}; delete this checkpoint to go on from the one before it") from error


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Says in words that a disk is full or read-only; what was saved before stays."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or in_words(error)
        if isinstance(error, RuntimeError):
            if not re.search("write|PytorchStreamWriter|inline_container", reason):
                raise
            # torch does not tell what the system said.
            reason = f"{reason} ({shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB are free)"
        raise RunError(
            f"{path} could not be written: {reason}; what was saved before is whole. "
            "Free some space or name another folder with output=..., then fit again to go on"
        ) from error
