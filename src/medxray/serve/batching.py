"""Studies that wait, joined into batches for the one thread that runs the model."""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from medxray.data import Sample


class Batcher:
    """Joins studies that wait into batches, which one thread runs.

    Args:
        run: kind of work and its studies -> a result each.
        most: studies of a batch.
        wait: seconds that a study waits for others while nothing runs; while something does, they gather anyway.
    """

    def __init__(self, run: Callable[[str, list[Sample]], Sequence[Any]], most: int, wait: float) -> None:
        self._run, self._most, self._wait = run, most, wait
        self._queue: queue.SimpleQueue[tuple[str, Sample, Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def __call__(self, kind: str, sample: Sample) -> Any:
        """The result of one study; one that is cancelled while it waits is never run."""
        future: Future[Any] = Future()
        self._queue.put((kind, sample, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Ends the thread once what was asked is done."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        going = True
        while going:
            batch: list[tuple[str, Sample, Future[Any]]] = []
            until = math.inf
            while len(batch) < self._most:
                try:
                    item = self._queue.get(timeout=max(0.0, until - time.monotonic()) if batch else None)
                except queue.Empty:
                    break
                if item is None:
                    going = False
                    break
                if item[2].set_running_or_notify_cancel():
                    batch.append(item)
                    until = min(until, time.monotonic() + self._wait)
            for kind in dict.fromkeys(kind for kind, _, _ in batch):
                self._answer(kind, [(sample, future) for own, sample, future in batch if own == kind])

    def _answer(self, kind: str, batch: list[tuple[Sample, Future[Any]]]) -> None:
        try:
            results = self._run(kind, [sample for sample, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            # One study must not take the others with it.
            for one in batch:
                self._answer(kind, [one])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
