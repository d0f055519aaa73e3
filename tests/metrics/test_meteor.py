"""METEOR 1.5: equal to pycocoevalcap's, and whatever befalls the Java program."""

import gc
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.meteor.meteor import Meteor as CocoMeteor

import medxray
from medxray.metrics import available, intervals, meteor
from medxray.metrics.meteor import Meteor
from medxray.metrics.text import Bleu
from medxray.scoring import score_table
from medxray.summary import diagnose
from medxray.types import MedxrayError, SpecError

needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="METEOR needs Java; install a runtime such as Debian's default-jre-headless"
)
ANSWER = """exec {python} -c '
import sys
for line in sys.stdin:
    print("4 4 1 1 3 3 1 1" + " 0" * 12, {chunks}, "4 4", flush=True)
'"""
"""Four words on each side, all matched."""


def answering(chunks: int) -> str:
    return ANSWER.format(python=sys.executable, chunks=chunks)


@needs_java
def test_values_equal_pycocoevalcap(hard_pairs, monkeypatch):
    """Of all studies, of each, of a part of them, and of texts that would break the program's lines; in any locale."""
    predictions, references = hard_pairs
    coco = CocoMeteor()
    # Turkish lower-cases I otherwise, and German writes decimal commas.
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    metric = Meteor()
    assert metric.unavailable() is None

    statistics = metric.statistics(predictions, references)
    peer, each = coco.compute_score(*({i: [t] for i, t in enumerate(texts)} for texts in (references, predictions)))
    assert metric.compute(predictions=predictions, references=references) == pytest.approx({"meteor": peer}, abs=1e-6)
    scored = intervals.score(metric, predictions, references, [str(i // 2) for i in range(500)])["meteor"]
    assert scored.value == pytest.approx(peer, abs=1e-6)
    assert scored.low < peer < scored.high
    assert metric.each(statistics)[:, 0] == pytest.approx(each, abs=1e-6)

    rows = np.random.default_rng(0).permutation(500)[:100]
    gts, res = ({i: [texts[i]] for i in rows} for texts in (references, predictions))
    assert metric.reduce(statistics[rows], np.ones((1, 100)))[0, 0] == pytest.approx(coco.compute_score(gts, res)[0], abs=1e-6)

    torn = ["heart\nis\r\nnormal", "|||heart is||| normal", "heart is normal ||| ", "heart is \ud800normal"]
    whole = ["heart is normal", "heart is normal", "heart is normal", "heart is ?normal"]
    program = metric._program
    assert np.array_equal(metric.statistics(torn, torn[::-1]), metric.statistics(whole, whole[::-1]))
    assert metric._program is program, "the program was started again"
    process = program._process
    del metric, program
    gc.collect()
    assert process.poll() is not None, "the program outlives its metric"


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Puts a program in Java's place; its number stands in the file that is returned."""

    def install(script: str) -> Path:
        file, number = tmp_path / "java", tmp_path / "number"
        file.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\necho $$ > {number}\n{script}\n')
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return number

    return install


def gone(number: Path) -> bool:
    try:
        os.kill(int(number.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_more_text_than_pipes_hold(java):
    number = java(answering(chunks=2))
    metric = Meteor()
    found = metric.statistics(["heart " * 100] * 3000, ["lungs " * 100] * 3000)
    assert found.shape == (3000, 23) and not gone(number)
    value = metric.reduce(found, np.ones((1, 3000)))
    # All words are matched in two chunks: precision and recall are 1, the penalty is 0.6 * (2 / 4) ** 0.2.
    assert value == pytest.approx(1 - 0.6 * 0.5**0.2)
    del metric
    gc.collect()
    assert gone(number)


def test_equal_texts_are_not_penalised(java):
    java(answering(chunks=1))
    metric = Meteor()
    assert metric.reduce(metric.statistics(["a"] * 3, ["a"] * 3), np.ones((1, 3))) == 1


def test_a_program_that_dies(java):
    number = java("read line; echo 1 2 3; echo 'java.lang.OutOfMemoryError: Java heap space' >&2; exit 3")
    with pytest.raises(MedxrayError, match=r"ended after 1 of 2 studies with status 3: java.*heap space; it takes up to 2GiB"):
        Meteor().statistics(["a", "b"], ["a", "b"])
    assert gone(number)


def test_a_program_that_hangs(java, monkeypatch):
    monkeypatch.setattr(meteor, "PATIENCE_S", 0.5)
    # A text of more than a pipe holds, which is never read.
    number = java("exec sleep 60")
    with pytest.raises(MedxrayError, match=r"silent for 0\.5 s at study 1 of 2 and was ended; shorten"):
        Meteor().statistics(["a " * 100_000, "b"], ["a", "b"])
    assert gone(number)


def test_a_program_that_talks_nonsense(java):
    java("read line; echo METEOR 2.0; read line")
    with pytest.raises(MedxrayError, match=r"expected 23 numbers a study from METEOR 1\.5, found 'METEOR 2\.0'"):
        Meteor().statistics(["a"], ["a"])


def test_after_a_failure_it_starts_again(java):
    java("exit 1")
    metric = Meteor()
    with pytest.raises(MedxrayError):
        metric.statistics(["a"], ["a"])
    java(answering(chunks=2))
    assert metric.statistics(["a"], ["a"]).shape == (1, 23)


def test_without_java_it_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    bleu, metric = Bleu(), Meteor()
    kept, told = available([bleu, metric])
    assert kept == [bleu] and len(told) == 1
    assert told[0].startswith("meteor left out: it needs Java, and there is no `java` (install a runtime")
    with pytest.raises(MedxrayError, match="no metric can be computed here: meteor left out: it needs Java"):
        available([metric])
    with pytest.raises(MedxrayError, match="meteor cannot be computed: it needs Java"):
        metric.compute(predictions=["a"], references=["a"])
    table = tmp_path / "reports.csv"
    table.write_text("prediction,reference\nheart is normal,the heart is normal\n", encoding="utf-8")
    scores = score_table(table, "prediction", "reference", metrics=["bleu", "meteor"])
    assert "meteor" not in scores and "bleu-4" in scores and told[0] in scores.notes


def test_a_run_without_java_is_scored_by_the_rest(monkeypatch, tmp_path, phantom):
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = {
        "task": "report", "output": str(tmp_path / "run"), "metrics": ["meteor", "bleu"],
        "data": {"image_size": 64, "reader": {"name": "csv", "root": str(phantom), "report": "findings"}, "max_studies": 24},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 1, "patch": 32},
        "decoder": {
            "name": "memory-transformer", "width": 16, "hidden": 16, "heads": 1, "layers": 1, "slots": 1, "max_length": 8,
        },
        "training": {"steps": 1, "batch_size": 8}, "generation": {"max_new_tokens": 8},
    }  # fmt: skip
    with pytest.raises(SpecError, match=r"no metric 'meteor'.*meteor left out: it needs Java"):
        medxray.build(spec, ["training.select=meteor"]).fit(progress=False)
    scores = medxray.build(spec).fit(progress=False).evaluate("val", progress=False)
    assert list(scores) == list(Bleu.values) and all(list(row) == list(scores) for row in scores.comparisons.values())
    assert any(note.startswith("meteor left out: it needs Java") for note in scores.notes)
    assert any(check.name == "METEOR" and check.found.startswith("it needs Java") for check in diagnose())


def test_java_that_does_not_run(java, tmp_path):
    java("")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    assert "java does not run" in str(Meteor().unavailable())


def test_without_the_program_it_is_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'medxray[metrics]'" in str(Meteor().unavailable())
