"""METEOR 1.5, by its authors' Java program."""

import importlib.util
import queue
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from medxray.metrics import Metric
from medxray.progress import progress_bar
from medxray.types import MedxrayError

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
"""What precision weighs against recall, the penalty on scattered matches (exponent, factor), and the weight of content words."""
STAGES = np.array([1.0, 0.6, 0.8, 0.6])
"""Weights of matches that are exact, by stem, by synonym, by paraphrase."""
COLUMNS = 7 + 4 * len(STAGES)
HEAP = "2G"
"""Most memory of Java's heap; the tables of paraphrases take half of it."""
PATIENCE_S = 600.0
"""How long the program may be silent: it looks for minutes at two texts of 1,000 equal words."""
_BREAKS = re.compile(r"[\r\n]+")


class Meteor(Metric):
    """METEOR 1.5 of the corpus for English, with its parameters of the ranking task (Denkowski and Lavie, WMT 2014).

    Texts are tokenised and lower-cased by the program (`-norm`), as in the COCO caption evaluation. It needs Java 8 or newer
    and pycocoevalcap, which brings the program; without them the metric is left out. One process serves all calls, and ends
    with the metric. A corpus has the score of its summed statistics, not the mean of its studies' scores.

    Statistics, as the program prints them: words predicted and in the reference, function words of both; for each stage the
    matched words of prediction and reference, content words and then function words; chunks (0 for two equal texts, which
    are not penalised), matched words of both.
    """

    values = ("meteor",)

    def __init__(self) -> None:
        super().__init__()
        self._program: _Program | None = None

    def unavailable(self) -> str | None:
        return _lacking()

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        if reason := _lacking():
            raise MedxrayError(f"meteor cannot be computed: {reason}")
        if self._program is None or not self._program.end.alive:
            self._program = _Program()
        pairs = zip(predictions, references, strict=True)
        answers = self._program.ask([f"SCORE ||| {_plain(reference)} ||| {_plain(text)}" for text, reference in pairs])
        try:
            rows = np.array([answer.split() for answer in answers], dtype=np.float64).reshape(len(answers), COLUMNS)
        except ValueError:
            odd = next(answer for answer in answers if len(answer.split()) != COLUMNS)
            raise MedxrayError(f"meteor: expected {COLUMNS} numbers a study from METEOR 1.5, found {odd!r}") from None
        matched = rows[:, 4:-3].reshape(-1, len(STAGES), 2, 2).sum(axis=(1, 2))
        rows[(matched == rows[:, :2]).all(axis=1) & (rows[:, -3] == 1), -3] = 0
        return rows

    def reduce(self, statistics: np.ndarray, weights: np.ndarray) -> np.ndarray:
        totals = weights @ statistics
        words, function, chunks, matched = totals[:, :2], totals[:, 2:4], totals[:, -3], totals[:, -2:]
        # Stages, then content or function words, then prediction or reference.
        by_stage = totals[:, 4:-3].reshape(-1, len(STAGES), 2, 2)
        parts = np.array([DELTA, 1 - DELTA])
        found = np.einsum("rskt,s,k->rt", by_stage, STAGES, parts)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = (found / (parts[0] * (words - function) + parts[1] * function)).T
            mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
            score = mean * (1 - GAMMA * (chunks / matched.mean(axis=1)) ** BETA)
        return np.nan_to_num(score)[:, None]


def _plain(text: str) -> str:
    """A text that neither ends a line nor looks like the border of two."""
    return _BREAKS.sub(" ", text.replace("|||", ""))


def _lacking() -> str | None:
    """What METEOR lacks on this machine, and the cure."""
    if _jar() is None:
        return "pycocoevalcap, which brings METEOR 1.5, is not installed (pip install 'medxray[metrics]')"
    java = shutil.which("java")
    if java is None:
        return "it needs Java, and there is no `java` (install a runtime, such as Debian's default-jre-headless)"
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run([java, "-version"], capture_output=True, check=True, timeout=60)
        return None
    return f"it needs Java, and {java} does not run (install a runtime, such as Debian's default-jre-headless)"


def _jar() -> Path | None:
    package = importlib.util.find_spec("pycocoevalcap")
    places = package.submodule_search_locations if package is not None else None
    jars = [Path(place) / "meteor" / "meteor-1.5.jar" for place in places or ()]
    return next((jar for jar in jars if jar.is_file()), None)


class _Program:
    """The running program: a line in, a line out."""

    def __init__(self) -> None:
        # The locale decides on the case of letters; Turkish has another i.
        settings = [f"-Xmx{HEAP}", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"]
        command = ["java", *settings, "-jar", str(_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True)
        reader.start()
        self.end = weakref.finalize(self, _end, self._process, reader)

    def ask(self, lines: Sequence[str]) -> list[str]:
        """An answer a line. Lines are written beside the reading, so that no full pipe stops both sides."""
        sent = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        threading.Thread(target=_write, args=(self._process.stdin, sent), daemon=True).start()
        answers: list[str] = []
        bar = progress_bar(desc="METEOR", total=len(lines), unit="text", delay=2, leave=False)
        try:
            while len(answers) < len(lines):
                answer = self._answers.get(timeout=PATIENCE_S)
                if answer is None:
                    raise MedxrayError(
                        f"meteor: Java ended after {len(answers)} of {len(lines)} studies with status {self._process.wait()}: "
                        f"{self._last_words()}; it takes up to {HEAP}iB of memory: free some, or leave meteor out of the metrics"
                    )
                answers.append(answer.decode().strip())
                bar.update()
        except queue.Empty:
            self.end()
            raise MedxrayError(
                f"meteor: Java was silent for {PATIENCE_S:g} s at study {len(answers) + 1} of {len(lines)} and was ended; "
                "shorten the texts of that study, or leave meteor out of the metrics"
            ) from None
        except BaseException:
            # Answers that are still to come would be taken for those of the next call.
            self.end()
            raise
        finally:
            bar.close()
        return answers

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[0] if lines else "it said nothing"


def _read(stream: IO[bytes], answers: "queue.SimpleQueue[bytes | None]") -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


def _write(stream: IO[bytes], sent: bytes) -> None:
    with suppress(OSError):
        stream.write(sent)
        stream.flush()


def _end(process: "subprocess.Popen[bytes]", reader: threading.Thread) -> None:
    process.kill()
    process.wait()
    reader.join()
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
