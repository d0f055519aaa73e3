"""The processes of one job, as torchrun, Slurm or Ray start them: which one this is, its part of the work, what all of them
made, and who was lost."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import distributed

from medxray.types import RunError

T = TypeVar("T")


class _Peer(NamedTuple):
    host: str
    pid: int


_peers: list[_Peer] = []


def rank() -> int:
    """Number of this process, from 0 on; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local() -> tuple[int, int]:
    """Number of this process among those of its machine, and how many these are; (0, 1) where the launcher does not tell."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local()[0]) if torch.cuda.is_available() else torch.device("cpu")


def join() -> None:
    """Meets the other processes, once; each gets its own GPU where there are any. Nothing for a single one."""
    if world() == 1 or len(_peers) == world():
        return
    from accelerate import PartialState

    cpu = not torch.cuda.is_available()
    PartialState(cpu=cpu, **({"backend": "gloo"} if cpu else {}))
    met: list[Any] = [None] * world()
    distributed.all_gather_object(met, _Peer(socket.gethostname(), os.getpid()))
    _peers[:] = met


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        join()
        distributed.barrier()


def own_batches(
    rows: Sequence[int], size: int, among: tuple[int, int] | None = None
) -> list[tuple[int, Sequence[int]]]:
    """This process's batches of at most `size` rows, with their numbers. A batch is what it is in one process, so what is
    made of it is, too.

    Args:
        among: number of this process, and of how many that share the rows; of all if None.
    """
    own, count = among or (rank(), world())
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return list(enumerate(batches))[own::count]


def union(made: Sequence[tuple[int, T]], count: int) -> list[T]:
    """What all processes made, in order; every process gets all of it, so every process must ask.

    Args:
        made: by this process: number and value.
        count: of all values together.

    Raises:
        RunError: a value is missing, or there are two of one number.
    """
    parts: list[Any] = [made]
    if world() > 1:
        join()
        parts = [None] * world()
        distributed.all_gather_object(parts, made)
    found = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    if [number for number, _ in found] != list(range(count)):
        raise RunError(
            f"{world()} processes made {len(found)} of {count} parts; they were not started with the same spec and data: start "
            "them all by one command"
        )
    return [value for _, value in found]


@contextlib.contextmanager
def together(where: Callable[[], str] = str) -> Iterator[None]:
    """Joins the other processes, and says who of them was lost where one is.

    Args:
        where: what the message tells of how far the work was and what to do.

    Raises:
        RunError: another process ended; it is named where it ran on this machine.
    """
    if world() == 1:
        yield
        return
    join()
    try:
        yield
    except RuntimeError as error:
        gone = _lost()
        if not gone and not isinstance(error, distributed.DistError) and "onnection" not in str(error):
            raise
        who = " and ".join(gone) or "a process on another machine"
        raise RunError(
            f"{who} of the {world()} of this job ended before its work was done, so the others end too (this is {rank()})"
            f"{where()}; look at what it said, and if it said nothing, at whether it was killed for want of memory"
        ) from error


def _lost() -> list[str]:
    """Processes of this machine that ended, but for those that ended because they had lost another."""
    left = "medxray/left/{}"
    store: Any = distributed.distributed_c10d._get_default_store()
    # Where the lost process held the store, nobody can leave a word.
    with contextlib.suppress(RuntimeError):
        store.set(left.format(rank()), "")
    if rank() == 0:
        _hear(store, [left.format(number) for number, peer in enumerate(_peers) if number and _runs(peer.pid)])
    gone = []
    for number, peer in enumerate(_peers):
        if peer.host != socket.gethostname() or _runs(peer.pid):
            continue
        with contextlib.suppress(RuntimeError):
            if store.check([left.format(number)]):
                continue
        gone.append(f"process {number} (pid {peer.pid} on {peer.host})")
    return gone


def _hear(store: Any, words: Sequence[str]) -> None:
    """The first process, whose end is that of the store, lets the others end and waits for what they leave there."""
    with contextlib.suppress(RuntimeError):
        distributed.destroy_process_group()
    with contextlib.suppress(RuntimeError):
        store.wait(list(words), timedelta(seconds=10))


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    # One that nobody has waited for yet is still listed.
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] != "Z"
