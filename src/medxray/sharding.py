"""A task whose parameters are divided among the processes (FSDP2, torch.distributed.fsdp.fully_shard), and checkpoints whose
files hold what each process had."""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from medxray import processes
from medxray.tasks import Task
from medxray.types import RunError, SpecError

_HOLDERS = (nn.ModuleList, nn.ModuleDict)
# Of each module its own; and what accelerate puts in a method's place.
_PLAIN = frozenset(vars(nn.Module())) | {"forward", "_original_forward"}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What is gathered as a whole for its pass: the repeated modules of a model, such as the blocks of a Transformer.

    They are the items of its lists of equal modules that have modules of their own, the innermost ones where such lists lie
    in each other. A module says `blocks_apart = False` where it and what is in it are also entered by other methods than
    `forward`: they then stay with what holds them.
    """
    found: dict[nn.Module, None] = {}
    for module in model.modules():
        items = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        if len(items) > 1 and len({type(item) for item in items}) == 1 and not isinstance(items[0], _HOLDERS):
            found |= dict.fromkeys(item for item in items if any(item.children()) and next(item.parameters(), None) is not None)
    for module in model.modules():
        if not getattr(module, "blocks_apart", True):
            found = {block: None for block in found if block not in set(module.modules())}
    return [block for block in found if not any(part in found for part in block.modules() if part is not block)]


class Sharded:
    """A task, and a copy of it whose parameters are divided among the processes and which alone learns.

    The task itself has no weights but inside `whole`, where it is an ordinary module again: what judges, writes or predicts
    knows nothing of the division, and processes need not make the same calls there. Buffers and modules without parameters
    are the same objects in both.

    Attributes:
        learner: the copy.
        parameters: name -> the part of this process, as a DTensor.

    Raises:
        SpecError: a parameter cannot be divided.
    """

    def __init__(self, task: Task, *, compile: bool = False) -> None:
        for name, parameter in task.named_parameters():
            if parameter.ndim == 0 or not parameter.is_floating_point():
                kind = "a single number" if parameter.ndim == 0 else f"held as {parameter.dtype}"
                raise SpecError(
                    f"training.strategy: fsdp cannot divide {name}, which is {kind}; use ddp"
                    + ("" if parameter.ndim == 0 else ", or leave out quantize")
                )
        self.task = task
        same: list[Any] = [*task.parameters(), *task.buffers(), *self._own().values()]
        same += [module for module in task.modules() if next(module.parameters(), None) is None]
        self.learner: Task = copy.deepcopy(task, {id(value): value for value in same})
        for own, other in zip(task.modules(), self.learner.modules(), strict=True):
            other._buffers = own._buffers
        mesh = init_device_mesh(next(task.parameters()).device.type, (processes.world(),))
        for block in blocks_of(self.learner):
            if compile:
                block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(self.learner, mesh=mesh)
        self.parameters = dict(self.learner.named_parameters(remove_duplicate=False))
        self._drop()

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.task).items() if name not in _PLAIN}

    def follow(self) -> None:
        """Gives the learner what the task has learned of the step."""
        vars(self.learner).update(self._own())

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Gathers the weights, which all processes must do together.

        Args:
            values: name -> what is taken in a parameter's place, such as its average.
        """
        for name, parameter in self.task.named_parameters():
            value: Any = (values or {}).get(name, self.parameters[name])
            parameter.data = value.full_tensor().detach().to(parameter.dtype)

    def _drop(self) -> None:
        for parameter in self.task.parameters():
            parameter.data = parameter.data.new_empty(0)

    @contextlib.contextmanager
    def whole(self, values: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """The task with its weights, or with those of `values`; as `fill`."""
        self.fill(values)
        try:
            yield
        finally:
            self._drop()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as another one is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def write_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes named tensors, each process its own parts, as safetensors; all processes must write together.

    Raises:
        OSError: a process could not.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _alone():
            save(dict(state), storage_writer=writer, no_dist=processes.world() == 1)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def shard_shapes(folder: Path) -> dict[str, torch.Size]:
    """Name -> whole shape of what `write_shards` wrote.

    Raises:
        RunError: it cannot be read.
    """
    with _readable(folder):
        metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata()
        return {name: one.size for name, one in metadata.state_dict_metadata.items()}


def read_shards(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Reads named tensors in place, each process its own parts, however many processes wrote them.

    Raises:
        RunError: one is missing, has another shape or cannot be read.
    """
    with _readable(folder), _alone():
        load(dict(state), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=processes.world() == 1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Nobody is warned that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (Exception, CheckpointException) as error:  # safetensors raises its own type
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise RunError(
            f"checkpoint {folder} cannot be read: {reason[0]}; delete this checkpoint to go on from the one before it"
        ) from error
