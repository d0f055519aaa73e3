"""The parts of several processes are the whole, each piece once; the real ones meet in tests/system/test_distributed.py."""

import os
import subprocess
import sys

import pytest

from medxray import processes
from medxray.spec import TrainingSpec
from medxray.training import EpochBatches, strategy_of
from medxray.types import RunError, SpecError


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_batches_of_all_processes_are_those_of_one(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    rows = list(range(100, 123))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    made = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        made += processes.own_batches(rows, 4)
    assert [number for number, _ in sorted(made)] == list(range(6))
    assert [row for _, part in sorted(made) for row in part] == rows
    assert processes.own_batches(rows, 4, (1, 2)) == [(1, rows[4:8]), (3, rows[12:16]), (5, rows[20:])]


@pytest.mark.parametrize("numbers", [[0, 2], [0, 1, 1, 2], [0, 1, 3], []])
def test_a_part_that_is_missing_or_twice_is_told(numbers: list[int]) -> None:
    assert processes.union([(1, "b"), (0, "a"), (2, "c")], 3) == ["a", "b", "c"]
    with pytest.raises(RunError, match=rf"made {len(numbers)} of 3 parts; .* the same spec and data"):
        processes.union([(number, "") for number in numbers], 3)


def test_a_process_that_has_ended_is_known() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert processes._runs(os.getpid())
    while child.returncode is None and processes._runs(child.pid):
        pass
    # Nobody has waited for it: the system still lists it.
    os.kill(child.pid, 0)
    assert not processes._runs(child.pid)
    child.wait()
    assert not processes._runs(child.pid)


def test_other_errors_stay_what_they_are_where_all_processes_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="own"), processes.together():
        raise RuntimeError("own")
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(processes, "join", lambda: None)
    monkeypatch.setattr(processes, "_lost", list)
    with pytest.raises(RuntimeError, match="own"), processes.together():
        raise RuntimeError("own")
    told = r"a process on another machine of the 2 .* at step 3"
    with pytest.raises(RunError, match=told), processes.together(lambda: " at step 3"):
        raise RuntimeError("Connection closed by peer [10.0.0.7]:54696")


def epoch(world: int, planned: int | None = None, batch: int = 4, accumulate: int = 1, count: int = 100) -> list[list[set[int]]]:
    """The studies of each step, process by process."""
    settings = TrainingSpec(batch_size=batch, accumulate=accumulate)
    parts = [EpochBatches(count, settings, 5, rank, world, None, planned) for rank in range(world)]
    each = [list(part) for part in parts]
    a, most = parts[0].accumulate, -(-batch * (planned or world) * accumulate // world // parts[0].accumulate) + 1
    assert len({len(batches) for batches in each}) == 1 and all(0 < len(b) <= most for batches in each for b in batches)
    steps = len(each[0]) // a
    return [[{s for b in batches[i * a : (i + 1) * a] for _, s in b} for batches in each] for i in range(steps)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_stay_what_they_are_with_another_number_of_processes(world: int, accumulate: int) -> None:
    begun = [set().union(*step) for step in epoch(4, accumulate=accumulate)]
    for then, before in zip(epoch(world, 4, accumulate=accumulate), begun, strict=True):
        assert set().union(*then) == before and sum(map(len, then)) == len(before)
        assert max(map(len, then)) - min(map(len, then)) <= accumulate * 4


def test_more_processes_than_studies_of_a_step_are_refused() -> None:
    with pytest.raises(SpecError, match=r"one step of this run takes 4 studies, which cannot be divided among 5 .*at most 4"):
        epoch(5, 2, batch=2)


def test_a_strategy_that_is_not_possible_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(strategy: str, world: int, **others: str) -> str:
        return strategy_of(TrainingSpec.model_validate({"strategy": strategy, **others}), world)

    assert [of("auto", 1), of("auto", 2), of("ddp", 1), of("ddp", 2), of("fsdp", 2)] == ["none", "ddp", "none", "ddp", "fsdp"]
    with pytest.raises(SpecError, match=r"fsdp divides a model among processes, and there is one; start several, .*torchrun"):
        of("fsdp", 1)
    with pytest.raises(SpecError, match=r"fsdp does not scale losses as training.precision fp16 needs; use bf16"):
        of("fsdp", 2, precision="fp16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SpecError, match=r"deepspeed works on GPUs, and there is none here; use ddp or fsdp"):
        of("deepspeed", 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"deepspeed is not installed; pip install deepspeed"):
        of("deepspeed", 2)
