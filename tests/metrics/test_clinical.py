"""The rule labeller against labelled sentences and people's tags; clinical metrics against loops and scikit-learn."""

import csv
import hashlib
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import medxray.metrics
from medxray.data.text import clean
from medxray.metrics import METRICS, label_reports, per_finding, read_report
from medxray.metrics.chexbert import CONDITIONS, Chexbert
from medxray.metrics.clinical import MAIN_OBSERVATIONS, OBSERVATIONS, label_report, sides
from medxray.metrics.findings import Clinical
from medxray.metrics.intervals import score
from medxray.types import SpecError, WeightsError

HERE = Path(__file__).parent
DEGREES, SIDES = ("small", "moderate", "large"), ("left", "right", "bilateral")


def labelled(half: str) -> list[tuple[str, dict[str, tuple[int, str | None, str | None]]]]:
    """Sentences of the "seen" half, which the rules were written with, or of the "held" half, which they were not."""
    rows = []
    with (HERE / "clinical_sentences.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            held = hashlib.sha256(row["sentence"].encode()).digest()[0] % 2
            labels = {}
            for label in filter(None, row["labels"].split("; ")):
                name, value, rest = re.fullmatch(r"(\D+?) (-?\d)((?: \w+)*)", label).groups()
                words = rest.split()
                side = next((word for word in words if word in SIDES), None)
                labels[name] = (int(value), side, next((word for word in words if word in DEGREES), None))
            if held == (half == "held"):
                rows.append((row["sentence"], labels))
    return rows


def f1(said: set, true: set) -> float:
    return 2 * len(said & true) / (len(said) + len(true))


def test_labelled_sentences_are_many_and_of_all_observations():
    sentences = labelled("seen") + labelled("held")
    assert len({sentence for sentence, _ in sentences}) == len(sentences) >= 400
    assert min(len(labelled(half)) for half in ("seen", "held")) >= 200
    assert {name for _, labels in sentences for name in labels} == set(OBSERVATIONS) - {"No Finding"}
    for value, least in ((1, 200), (0, 150), (-1, 80)):
        assert sum(label[0] == value for _, labels in sentences for label in labels.values()) >= least


@pytest.mark.parametrize("rule", ["none", "r2gen-iu", "r2gen-mimic"])
@pytest.mark.parametrize("half", ["seen", "held"])
def test_labelled_sentences(half: str, rule: str):
    """Each half, raw and cleaned: F1 of (sentence, observation, value), all three right or wrong together."""
    said, true, correct = set(), set(), []
    for sentence, labels in labelled(half):
        text = clean(sentence, rule)
        found = label_reports([text])[0]
        # CheXpert's rule, computed anew.
        if not any(label[0] for name, label in labels.items() if name != "Support Devices"):
            labels = {**labels, "No Finding": (1, None, None)}
        said |= {(sentence, name, value) for name, value in found.items()}
        true |= {(sentence, name, label[0]) for name, label in labels.items()}
        located = sides(text)
        degrees = {finding.name: finding.degree for finding in read_report(text) if finding.value and finding.degree}
        for name, (value, side, degree) in labels.items():
            if value and found.get(name) == value:
                correct.append((located.get(name) == side, degrees.get(name) == degree))
    assert f1(said, true) >= 0.95
    each = [f1({s for s in said if s[1] == name}, {t for t in true if t[1] == name}) for name in OBSERVATIONS]
    assert np.mean(each) >= 0.95 and min(each) >= 0.8, dict(zip(OBSERVATIONS, each, strict=True))
    for value in (1, 0, -1):
        assert f1({s for s in said if s[2] == value}, {t for t in true if t[2] == value}) >= 0.95, value
    assert (np.mean(correct, axis=0) >= 0.95).all()


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", {}),
        (" . ", {}),
        ("___", {}),
        ("Normal chest.", {"No Finding": 1}),
        ("Endotracheal tube in place.", {"Support Devices": 1, "No Finding": 1}),
        ("Possible edema.", {"Edema": -1}),
        ("No effusion. Small left effusion.", {"Pleural Effusion": 1}),
        ("No effusion.\nAn effusion cannot be\nexcluded.", {"Pleural Effusion": -1}),
        (
            "FINDINGS:\nHeart size normal\nIMPRESSION:\n1. Pneumonia\n2. No edema",
            {"Cardiomegaly": 0, "Pneumonia": 1, "Edema": 0},
        ),
        ("XXXX left effusion ___ seen.", {"Pleural Effusion": 1}),
        ("größe des herzens 心", {"No Finding": 1}),
    ],
)
def test_label_reports(text: str, labels: dict[str, int]):
    assert label_reports([text]) == [labels]


def test_read_report_tells_side_degree_and_sentence():
    text = "Heart size normal. Moderate left\neffusion, with right basilar atelectasis; no edema."
    assert [tuple(finding) for finding in read_report(text)] == [
        ("Cardiomegaly", 0, None, None, "Heart size normal"),
        ("Pleural Effusion", 1, "left", "moderate", "Moderate left effusion, with right basilar atelectasis"),
        ("Atelectasis", 1, "right", None, "Moderate left effusion, with right basilar atelectasis"),
        ("Edema", 0, None, None, "no edema"),
    ]
    assert sides("Left effusion. Right effusion. No left pneumothorax.") == {"Pleural Effusion": "bilateral"}


@pytest.mark.parametrize(
    "text", ["no " * 30_000, "effusion " * 20_000, "effusion and " * 15_000, "(" * 50_000, "heart " * 20_000,
             "suggest" * 10_000, "left and right " * 15_000, "not " * 9 + "costophrenic " * 9_000, "may be " * 20_000,
             "history , edema , " * 10_000, "small " * 30_000, "\n" * 50_000, "x.y" * 20_000],
)  # fmt: skip
def test_no_text_takes_long(text: str):
    begin = time.process_time()
    label_reports([text])
    assert time.process_time() - begin < 10


def test_agrees_with_people(shared: Path):
    """F1 by observation of what the rules read in 3,261 reports and what people tagged."""
    with (shared / "data" / "iu_xray" / "reports.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tags = yaml.safe_load((HERE / "iu_xray_tags.yaml").read_text(encoding="utf-8"))
    assert set(tags) == set(OBSERVATIONS) - {"No Finding"}
    true: dict[str, set[int]] = {name: set() for name in OBSERVATIONS}
    for i, row in enumerate(rows):
        own = [tag.strip() for tag in row["mesh"].split(";")]
        found = {name for name, pattern in tags.items() if any(re.search(pattern, tag) for tag in own)}
        for name in found or {"No Finding"}:
            true[name].add(i)
        if found == {"Support Devices"}:
            true["No Finding"].add(i)
    labels = label_reports([f"{row['findings']} {row['impression']}" for row in rows])
    said = {name: {i for i, label in enumerate(labels) if label.get(name, 0)} for name in OBSERVATIONS}
    each = {name: f1(said[name], true[name]) for name in OBSERVATIONS}
    assert len(rows) == 3261 and np.mean(list(each.values())) >= 0.80, each
    # A report doubts pneumonia far more often than people tag it.
    assert min(value for name, value in each.items() if name != "Pneumonia") >= 0.75, each


# The metric. Reports of which it is known what is in them, in the words of the rules.
SAID = {
    "Enlarged Cardiomediastinum": "the mediastinum is widened", "Cardiomegaly": "the heart is enlarged",
    "Lung Lesion": "there is a nodule", "Lung Opacity": "there is an infiltrate", "Edema": "there is edema",
    "Consolidation": "there is consolidation", "Pneumonia": "there is pneumonia", "Atelectasis": "there is atelectasis",
    "Pneumothorax": "there is a pneumothorax", "Pleural Effusion": "there is a pleural effusion",
    "Pleural Other": "there is pleural thickening", "Fracture": "there is a fracture",
    "Support Devices": "there is a stent",
}  # fmt: skip
DOUBTED = {
    name: f"possible {text.removeprefix('there is ')}" for name, text in SAID.items() if text.startswith("there is ")
}


def some_reports(n: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts, and (n, 14) what each says: 1, 0, -1."""
    rng = np.random.default_rng(seed)
    texts, truth = [], np.zeros((n, len(OBSERVATIONS)), dtype=int)
    for i in range(n):
        lines = []
        for k, name in enumerate(OBSERVATIONS):
            draw = rng.random()
            if name in SAID and draw < 0.12:
                lines.append(SAID[name])
                truth[i, k] = 1
            elif name in DOUBTED and draw < 0.2 and name != "Fracture":
                lines.append(DOUBTED[name])
                truth[i, k] = -1
        if not truth[i, [k for k, name in enumerate(OBSERVATIONS) if name != "Support Devices"]].any():
            lines.append("normal chest")
            truth[i, 0] = 1
        texts.append(" . ".join(lines) + " .")
    return texts, truth


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    predictions, predicted = some_reports(60, 1)
    references, expected = some_reports(60, 2)
    for i in range(20):
        predictions[i], predicted[i] = references[i], expected[i]
    predictions[20], predicted[20] = "", 0
    # Nobody predicts a fracture, and nobody refers to pleural thickening.
    for texts, truth, name in ((predictions, predicted, "Fracture"), (references, expected, "Pleural Other")):
        for i in np.flatnonzero(truth[:, OBSERVATIONS.index(name)]):
            texts[i], truth[i] = "normal .", [1] + [0] * 13
    return predictions, references, predicted, expected


def ours(
    metric: Clinical, predictions: list[str], references: list[str], weights: np.ndarray
) -> list[dict[str, float]]:
    found = metric.reduce(metric.statistics(predictions, references), weights)
    assert found.shape == (len(weights), len(metric.values))
    return [dict(zip(metric.values, row, strict=True)) for row in found]


@pytest.mark.parametrize("uncertain", ["positive", "negative"])
@pytest.mark.parametrize("count", [14, 5])
def test_values_equal_a_plain_loop_and_scikit_learn(pairs, uncertain, count):
    sklearn = pytest.importorskip("sklearn.metrics")
    predictions, references, predicted, expected = pairs
    columns = [OBSERVATIONS.index(name) for name in (OBSERVATIONS if count == 14 else MAIN_OBSERVATIONS)]
    named = (1, -1) if uncertain == "positive" else (1,)
    P, R = np.isin(predicted[:, columns], named), np.isin(expected[:, columns], named)
    repeats = np.random.default_rng(3).integers(0, 4, len(P))
    P, R = np.repeat(P, repeats, axis=0), np.repeat(R, repeats, axis=0)
    found = ours(Clinical(uncertain=uncertain, full=True), predictions, references, repeats[None].astype(float))[0]

    def loop(pairs_of_sets) -> tuple[list[float], list[float], list[float]]:
        lists: tuple[list[float], list[float], list[float]] = ([], [], [])
        for a, b in pairs_of_sets:
            both = len(a & b)
            if a:
                lists[0].append(both / len(a))
            if b:
                lists[1].append(both / len(b))
            if a or b:
                lists[2].append(2 * both / (len(a) + len(b)))
        return lists

    sets = [(set(np.flatnonzero(p)), set(np.flatnonzero(r))) for p, r in zip(P, R, strict=True)]
    means = [np.mean(numbers) for numbers in loop(sets)]
    everything = [({(i, k) for i, s in enumerate(side) for k in s}) for side in zip(*sets, strict=True)]
    pooled = [numbers[0] for numbers in loop([everything])]
    occur = R.any(axis=0)
    by_name = [(set(np.flatnonzero(p)), set(np.flatnonzero(r))) for p, r in zip(P.T, R.T, strict=True)]
    rows = [
        (len(p & r) / len(p) if p else 0, len(p & r) / len(r), 2 * len(p & r) / (len(p) + len(r)))
        for (p, r), o in zip(by_name, occur, strict=True)
        if o
    ]
    for mean, values in (("example", means), ("micro", pooled), ("macro", np.mean(rows, axis=0))):
        for measure, value in zip(("precision", "recall", "f1"), values, strict=True):
            assert found[f"clinical-{measure}-{mean}-{count}"] == pytest.approx(value, abs=1e-12)
    for mean, average in (("example", "samples"), ("micro", "micro"), ("macro", "macro")):
        kept = slice(None) if mean != "macro" else occur
        undefined = np.nan if mean != "macro" else 0
        theirs = sklearn.precision_recall_fscore_support(
            R[:, kept], P[:, kept], average=average, zero_division=undefined
        )
        for measure, value in zip(("precision", "recall", "f1"), theirs, strict=False):
            assert found[f"clinical-{measure}-{mean}-{count}"] == pytest.approx(value, abs=1e-12), (measure, mean)


def test_settings_and_names(pairs):
    headline = ("clinical-f1-micro-14", "clinical-f1-macro-14", "clinical-f1-micro-5", "clinical-f1-macro-5")
    built = METRICS.build(METRICS.settings_of("clinical")(name="clinical"))
    assert built.values == headline and built.uncertain == "positive"
    full = METRICS.build(METRICS.settings_of("clinical")(name="clinical", full=True, uncertain="negative"))
    assert len(full.values) == 18 and set(headline) < set(full.values)
    predictions, references = pairs[:2]
    computed = built.compute(predictions=predictions, references=references)
    assert computed == ours(built, predictions, references, np.ones((1, 60)))[0]
    found = score(built, predictions, references, [""] * 60, resamples=200)
    assert all(found[name].low < found[name].value < found[name].high for name in headline)
    with pytest.raises((SpecError, ValueError), match="uncertain"):
        METRICS.settings_of("clinical")(name="clinical", uncertain="maybe")


def test_undefined_values_are_nan():
    values = ours(Clinical(full=True), ["possible edema ."], ["normal ."], np.ones((1, 1)))[0]
    assert values["clinical-f1-micro-14"] == 0 and values["clinical-f1-macro-14"] == 0
    assert values["clinical-precision-micro-5"] == 0 and np.isnan(values["clinical-recall-micro-5"])
    assert np.isnan(values["clinical-f1-macro-5"]) and np.isnan(values["clinical-recall-example-5"])
    nothing = ours(Clinical(full=True), [""], [""], np.ones((1, 1)))[0]
    assert np.isnan(list(nothing.values())).all()
    assert np.isnan(ours(Clinical(), ["normal ."], ["normal ."], np.zeros((1, 1)))[0]["clinical-f1-micro-14"])


def test_per_finding():
    predictions = ["left effusion .", "right effusion .", "bilateral effusions .", "effusion .", "edema .", "normal ."]
    references = [*["left effusion ."] * 4, "normal .", "possible fracture ."]
    rows = {row.name: row for row in per_finding(predictions, references)}
    effusion = rows["Pleural Effusion"]
    assert (effusion.named, effusion.hits, effusion.misses, effusion.hallucinations) == (4, 4, 0, 0)
    assert effusion.wrong_side == 2
    assert effusion.f1 == 1 and np.isnan(rows["Pneumonia"].f1)
    assert (rows["Edema"].hallucinations, rows["Fracture"].misses, rows["No Finding"].misses) == (1, 1, 1)
    assert rows["No Finding"].hallucinations == 1
    assert [row.name for row in per_finding([], [])] == list(OBSERVATIONS)
    assert {row.name: row for row in per_finding(predictions, references, "negative")}["Fracture"].misses == 0


def test_public_names():
    assert medxray.metrics.label_reports is label_reports
    with pytest.raises(AttributeError, match="no attribute 'label_report_s'"):
        _ = medxray.metrics.label_report_s


def test_a_generated_report_keeps_its_phantom_findings():
    """The rules of the phantom's findings and of CheXpert's are the same; only the names differ."""
    text = "no focal airspace disease . possible pneumonia . a left chest pacemaker . small right hydropneumothorax ."
    assert label_report(text) == {"Consolidation": -1, "Pacemaker": 1, "Effusion": 1, "Pneumothorax": 1}


# CheXbert, by a small random model that is saved as its authors save theirs.
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "left", "effusion", "edema", "heart", "large", ".", "##s", "is",
]  # fmt: skip


class AsPublished(torch.nn.Module):
    """The authors' module by its state dict's names: `bert`, and 14 heads of which the last has two classes."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        config = BertConfig(
            vocab_size=len(WORDS), hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
            initializer_range=0.5,
        )  # fmt: skip
        self.bert = BertModel(config)
        self.linear_heads = torch.nn.ModuleList(torch.nn.Linear(128, 4) for _ in range(13))
        self.linear_heads.append(torch.nn.Linear(128, 2))


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, AsPublished]:
    torch.manual_seed(0)
    model = AsPublished().eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    saved = {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}, "epoch": 7}
    torch.save(saved, tmp_path / "chexbert.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path, model


REPORTS = [
    "No  left effusions.\nHeart is large.", "Edema.", "", "heart is large left edema . " * 200, "no effusion zebra",
    "edema edema", "Left heart.", "is is is", "large effusions", "no no left .",
]  # fmt: skip


@torch.no_grad()
def by_hand(model: AsPublished, text: str) -> dict[str, int]:
    """One report at a time, tokens by hand."""
    ids = [2]
    for word in re.findall(r"\w+|[^\w\s]", text.lower()):
        if word not in WORDS and word.endswith("s") and word[:-1] in WORDS:
            ids += [WORDS.index(word[:-1]), WORDS.index("##s")]
        else:
            ids.append(WORDS.index(word) if word in WORDS else 1)
    ids = [*ids[:511], 3]
    first = model.bert(input_ids=torch.tensor([ids])).last_hidden_state[:, 0]
    choices = [int(head(first).argmax()) for head in model.linear_heads]
    return {
        name: {1: 1, 2: 0, 3: -1}[choice] for name, choice in zip(CONDITIONS, choices, strict=True) if choice
    }


def test_chexbert_labels_as_its_model_does(published):
    folder, model = published
    metric = Chexbert(str(folder), batch_size=3)
    found = metric.label(REPORTS)
    assert found == [by_hand(model, text) for text in REPORTS]
    assert len({tuple(sorted(labels.items())) for labels in found}) > 3
    assert {value for labels in found for value in labels.values()} == {1, 0, -1}
    assert set(CONDITIONS) == set(OBSERVATIONS) and metric.values[0] == "chexbert-f1-micro-14"
    perfect = metric.compute(predictions=REPORTS, references=REPORTS)
    assert perfect["chexbert-f1-micro-14"] == 1


def test_chexbert_says_which_file_is_missing_or_wrong(published, tmp_path_factory):
    folder, _ = published
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(WeightsError, match="no folder"):
        Chexbert(str(empty / "absent"))
    with pytest.raises(WeightsError, match=r"lacks chexbert\.pth and vocab\.txt"):
        Chexbert(str(empty))
    (empty / "vocab.txt").write_text("a\n")
    with pytest.raises(WeightsError, match=r"lacks chexbert\.pth; .*stanfordmlgroup/CheXbert"):
        Chexbert(str(empty))
    (empty / "chexbert.pth").write_bytes((folder / "chexbert.pth").read_bytes())
    with pytest.raises(WeightsError, match=r"1 tokens, and chexbert\.pth was made with 14"):
        Chexbert(str(empty)).label(["edema"])
    torch.save({"model_state_dict": {"module.weight": torch.zeros(2)}}, empty / "chexbert.pth")
    with pytest.raises(WeightsError, match=r"not CheXbert's: no bert\.embeddings\.word"):
        Chexbert(str(empty)).label(["edema"])
    state = torch.load(folder / "chexbert.pth", weights_only=True)["model_state_dict"]
    del state["module.linear_heads.13.bias"]
    torch.save({"model_state_dict": state}, folder / "chexbert.pth")
    with pytest.raises(WeightsError, match=r"1 missing keys \(linear_heads.13.bias\)"):
        Chexbert(str(folder)).label(["edema"])


def test_chexbert_runs_nothing_that_is_in_a_file(published):
    folder, _ = published

    class Trap:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"model_state_dict": Trap()}, folder / "chexbert.pth")
    with pytest.raises(WeightsError, match="not opened"):
        Chexbert(str(folder)).label(["edema"])
