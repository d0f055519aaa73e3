"""What the metrics of reports are worth and cost.

    python benchmarks/metrics.py COMMAND [--help]
"""

import argparse
import contextlib
import csv
import hashlib
import io
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pycocoevalcap.bleu.bleu import Bleu as CocoBleu
from pycocoevalcap.cider.cider import Cider as CocoCider
from pycocoevalcap.meteor.meteor import Meteor as CocoMeteor
from pycocoevalcap.rouge.rouge import Rouge as CocoRouge

from medxray.data.phantom import draw_study
from medxray.data.text import clean
from medxray.metrics import Metric, clinical, label_reports
from medxray.metrics.intervals import score_all
from medxray.metrics.meteor import Meteor
from medxray.metrics.text import Bleu, Cider, RougeL, best_constant
from ratios import record

PEER = "pycocoevalcap's ROUGE-L of as many pairs"
COMMANDS: dict[str, Callable[[list[str]], None]] = {}
TESTS = Path(__file__).parents[1] / "tests" / "metrics"


def command(run: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Makes a function of the remaining arguments a command of its name."""
    COMMANDS[run.__name__] = run
    return run


@command
def labeller(arguments: list[str]) -> None:
    """The rule labeller: F1 by observation on labelled sentences and beside people's tags; its speed on one core."""
    parser = argparse.ArgumentParser(prog="metrics.py labeller", description=labeller.__doc__)
    parser.add_argument("--reports", type=Path,
                        help="the Indiana collection: columns findings, impression and mesh")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    names = clinical.OBSERVATIONS

    columns: dict[str, list[float]] = {}
    with (TESTS / "clinical_sentences.csv").open(encoding="utf-8") as file:
        sentences = [(row["sentence"], row["labels"]) for row in csv.DictReader(file)]
    for half, title in enumerate(("sentences, seen", "sentences, held back")):
        said, true = set(), set()
        for sentence, labels in sentences:
            if hashlib.sha256(sentence.encode()).digest()[0] % 2 != half:
                continue
            said |= {(sentence, name, value) for name, value in label_reports([sentence])[0].items()}
            own = {name: int(value) for name, value in re.findall(r"([A-Z][A-Za-z ]+) (-?\d)", labels)}
            if not any(value for name, value in own.items() if name != "Support Devices"):
                own["No Finding"] = 1
            true |= {(sentence, name, value) for name, value in own.items()}
        columns[title] = [_f1({s for s in said if s[1] == n}, {t for t in true if t[1] == n}) for n in names]
        print(f"{title}: F1 of (sentence, observation, value) {_f1(said, true):.3f}, {len(true)} labels")

    if options.reports is None:
        print("--reports names none: real reports are left out")
        _table(names, columns)
        return
    with options.reports.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [f"{row['findings']} {row['impression']}" for row in rows]
    patterns = yaml.safe_load((TESTS / "iu_xray_tags.yaml").read_text(encoding="utf-8"))
    tagged: dict[str, set[int]] = {name: set() for name in names}
    for i, row in enumerate(rows):
        own_tags = [tag.strip() for tag in row["mesh"].split(";")]
        found = {name for name, pattern in patterns.items() if any(re.search(pattern, tag) for tag in own_tags)}
        for name in found | (set() if found - {"Support Devices"} else {"No Finding"}):
            tagged[name].add(i)
    labels_of = label_reports(texts)
    for title, values in (("reports, doubt is present", (1, -1)), ("reports, doubt is absent", (1,))):
        read = {n: {i for i, own in enumerate(labels_of) if own.get(n, 0) in values} for n in names}
        if values == (1,):
            read["No Finding"] = {
                i for i, own in enumerate(labels_of)
                if not any(v == 1 for n, v in own.items() if n not in ("Support Devices", "No Finding"))
            }  # fmt: skip
        columns[title] = [_f1(read[n], tagged[n]) for n in names]
    columns["tagged reports"] = [len(tagged[n]) for n in names]
    _table(names, columns)

    shuffled = texts[1:] + texts[:1]

    def forgetful() -> None:
        for text in texts:
            clinical._read.cache_clear()
            label_reports([text])

    def fresh() -> None:
        clinical._read.cache_clear()
        label_reports(texts)

    runs: dict[str, Callable[[], object]] = {
        "sentences remembered, from the first report on": fresh,
        "the same reports again": lambda: label_reports(texts),
        "nothing remembered between reports": forgetful,
        PEER: lambda: CocoRouge().compute_score(*({i: [t] for i, t in enumerate(one)} for one in (shuffled, texts))),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
    length = sum(map(len, texts)) / len(texts)
    print(f"\n{len(texts):,} reports of {length:.0f} characters, one core, {options.rounds} rounds in turn")
    print(f"{'':50}{'median reports/s':>18}{'time over ROUGE-L':>20}")
    peer = times[PEER]
    for name, values_s in times.items():
        ratio = statistics.median(a / b for a, b in zip(values_s, peer, strict=True))
        print(f"{name:50}{len(texts) / statistics.median(values_s):18,.0f}{ratio:20.3f}")


def _reports(file: Path | None, count: int) -> list[str]:
    """Cleaned reports: of a table with columns findings and impression, or made-up ones."""
    if file is None:
        return [clean(draw_study(1, i, 32, views=()).findings, "r2gen-iu") for i in range(count)]
    with file.open(encoding="utf-8") as table:
        texts = [clean(f"{row['findings']} {row['impression']}", "r2gen-iu") for row in csv.DictReader(table)]
    return [text for text in texts if len(text.split()) > 3][:count]


def _text_arguments(run: Callable[[list[str]], None], arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"metrics.py {run.__name__}", description=run.__doc__)
    parser.add_argument("--reports", type=Path, help="real ones: a table with columns findings and impression")
    parser.add_argument("--studies", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    options.texts = _reports(options.reports, options.studies)
    words = sum(len(text.split()) for text in options.texts) / len(options.texts)
    kind = "made-up" if options.reports is None else "real"
    print(f"{len(options.texts):,} {kind} reports of {words:.0f} words, each against another's, {options.rounds} rounds in turn")
    return options


@command
def text(arguments: list[str]) -> None:
    """BLEU, ROUGE-L, CIDEr and METEOR beside pycocoevalcap's, and the best constant report."""
    options = _text_arguments(text, arguments)
    references, predictions = options.texts, options.texts[1:] + options.texts[:1]
    gts, res = ({i: [t] for i, t in enumerate(texts)} for texts in (references, predictions))
    pairs: dict[str, tuple[Metric, Any]] = {
        "bleu": (Bleu(), CocoBleu(4)), "rouge-l": (RougeL(), CocoRouge()), "cider": (Cider(), CocoCider()),
    }  # fmt: skip
    if reason := Meteor().unavailable():
        print(f"meteor left out: {reason}")
    else:
        pairs["meteor"] = (Meteor(), CocoMeteor())
        # Both programs read their tables for seconds when they start; that is no part of a pair's cost.
        pairs["meteor"][0].statistics(predictions[:1], references[:1])
        pairs["meteor"][1].compute_score({0: [references[0]]}, {0: [predictions[0]]})
    ones = np.ones((1, len(references)))
    print(f"{'':10}{'pycocoevalcap s':>17}{'ours s':>9}{'times as fast':>15}{'largest difference':>20}")
    for name, (ours, peer) in pairs.items():
        own, other, values, theirs = [], [], np.empty(0), np.empty(0)
        for _ in range(options.rounds):
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = np.atleast_1d(peer.compute_score(gts, res)[0])
            other.append(time.perf_counter() - started)
            started = time.perf_counter()
            values = ours.reduce(ours.statistics(predictions, references), ones)[0]
            own.append(time.perf_counter() - started)
        ratio = statistics.median(b / a for a, b in zip(own, other, strict=True))
        record(f"{name} of {len(references):,} reports", ratio, "pycocoevalcap")
        apart = float(np.abs(values - theirs).max())
        print(f"{name:10}{statistics.median(other):17.2f}{statistics.median(own):9.2f}{ratio:15.1f}{apart:20.1e}")
    candidates = list(dict.fromkeys(references))
    for name in ("bleu-4", "rouge-l", "cider"):
        started = time.perf_counter()
        best_constant(candidates, references, name)
        seconds = time.perf_counter() - started
        print(f"best constant report by {name}: {len(candidates):,} x {len(references):,} in {seconds:.2f} s")


@command
def bootstrap(arguments: list[str]) -> None:
    """1,000 resamples of corpus BLEU and CIDEr by patients of two studies each, with the statistics that they are made of."""
    options = _text_arguments(bootstrap, arguments)
    references, predictions = options.texts, options.texts[1:] + options.texts[:1]
    groups = [str(i // 2) for i in range(len(references))]
    for metrics in ([Bleu()], [Cider()], [Bleu(), Cider()]):
        times: dict[int, list[float]] = {0: [], 1000: []}
        for _ in range(options.rounds):
            for resamples, seconds in times.items():
                started = time.perf_counter()
                score_all(metrics, predictions, references, groups, resamples)
                seconds.append(time.perf_counter() - started)
        name = " and ".join(metric.values[0].partition("-")[0] for metric in metrics)
        print(f"{name}: {statistics.median(times[1000]):.2f} s, of it statistics {statistics.median(times[0]):.2f} s")


def _f1(said: set, true: set) -> float:
    return 2 * len(said & true) / (len(said) + len(true)) if said or true else float("nan")


def _table(names: tuple[str, ...], columns: dict[str, list[float]]) -> None:
    print(f"\n{'F1':28}" + "".join(f"{title:>28}" for title in columns))
    for k, name in enumerate(names):
        cells = [f"{v[k]:28.3f}" if isinstance(v[k], float) else f"{v[k]:28,}" for v in columns.values()]
        print(f"{name:28}" + "".join(cells))
    means = [f"{sum(v) / len(v):28.3f}" if isinstance(v[0], float) else "" for v in columns.values()]
    print(f"{'mean':28}" + "".join(means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=sorted(COMMANDS))
    chosen, rest = parser.parse_known_args()
    COMMANDS[chosen.command](rest)


if __name__ == "__main__":
    main()
