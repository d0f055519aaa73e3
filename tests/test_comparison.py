"""Runs side by side."""

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import yaml
from typer.testing import CliRunner

import medxray
from medxray.cli import app
from medxray.comparison import Comparison, compare, holm
from medxray.data.text import clean
from medxray.metrics.classification import AUROC
from medxray.metrics.intervals import difference, score, seeds, seeds_difference
from medxray.metrics.text import Bleu, Cider, RougeL
from medxray.types import DataError, RunError, Scores, SpecError

WORDS = ["heart", "lungs", "effusion", "edema", "clear", "normal", "small", "left", "right", "no", "is", "the", ".", "mild"]
N = 60
STUDIES = [f"s{i}" for i in range(N)]
PATIENTS = [f"p{i // 2}" for i in range(N)]
METRICS = ["bleu", "rouge-l", "cider"]


def written(seed: int, n: int = N) -> list[str]:
    """Reports out of a bag of words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(6, 14))) for _ in range(n)]


REFERENCES = written(0)


def near(keep: float, seed: int) -> list[str]:
    """The references, of whose words a share is kept and the others are drawn anew."""
    rng = np.random.default_rng(seed)
    return [" ".join(w if rng.random() < keep else str(rng.choice(WORDS)) for w in text.split()) for text in REFERENCES]


def run(folder: Path, said: Sequence[Any], true: Sequence[Any] = (), **settings: Any) -> Path:
    """A run folder as `evaluate` leaves it: texts, labels or errors."""
    studies, patients = settings.pop("studies", STUDIES[: len(said)]), settings.pop("patients", PATIENTS[: len(said)])
    split = settings.pop("split", "test")
    folder.mkdir(parents=True)
    spec = {"task": "report", "name": folder.name, "seed": 42, "output": str(folder), "data": {"cleaning": "r2gen-iu"}}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec | settings), encoding="utf-8")
    rows = [
        {
            "study_id": study, "patient_id": patient, "split": split,
            "text": one if isinstance(one, str) else "",
            "reference": truth if isinstance(truth, str) else None,
            "scores": json.dumps({} if isinstance(one, str) else one),
            "labels": json.dumps(truth) if isinstance(truth, dict) else None,
        }
        for study, patient, one, truth in zip(studies, patients, said, true or REFERENCES[: len(said)], strict=True)
    ]  # fmt: skip
    names = ("study_id", "patient_id", "split", "text", "reference", "scores", "labels")
    parquet.write_table(arrow.table({name: [row[name] for row in rows] for name in names}), folder / "predictions.parquet")
    return folder


def table(file: Path, said: Sequence[str], true: Sequence[str] = (), studies: Sequence[str] = STUDIES, **columns: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = {"study_id": studies, "prediction": said, "reference": true or REFERENCES, "patient_id": PATIENTS, **columns}
    kept = {name: values for name, values in cells.items() if values is not None}
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([list(kept), *zip(*kept.values(), strict=False)])
    return file


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def told(comparison: Comparison) -> str:
    return "\n".join(comparison.notes)


def test_values_and_differences_are_those_of_the_bootstrap(tmp_path: Path) -> None:
    base, ours = near(0.4, 1), near(0.8, 2)
    found = medxray.compare([run(tmp_path / "base", base), run(tmp_path / "ours", ours)], metrics=METRICS)
    assert list(found.scores) == ["base", "ours"] and list(found.differences) == ["ours"]
    assert found.metrics == ["bleu-1", "bleu-2", "bleu-3", "bleu-4", "rouge-l", "cider"]
    for metric in (Bleu(), RougeL(), Cider()):
        for name, value in score(metric, base, REFERENCES, PATIENTS).items():
            assert found.scores["base"][name] == value
        for name, apart in difference(metric, ours, base, REFERENCES, PATIENTS).items():
            ours_is = found.differences["ours"][name]
            assert (ours_is.value, ours_is.low, ours_is.high, ours_is.p) == (apart.value, apart.low, apart.high, apart.p)
            assert ours_is.low > 0 and ours_is.better is True and ours_is.holm == pytest.approx(6 * 0.001)
    back = compare([tmp_path / "base", tmp_path / "ours"], metrics=METRICS, baseline="ours")
    assert list(back.scores) == ["ours", "base"] and back.differences["base"]["cider"].better is False
    assert back.differences["base"]["bleu-4"].value == -found.differences["ours"]["bleu-4"].value


def test_what_the_interval_does_not_tell_is_not_marked(tmp_path: Path) -> None:
    poor = written(7)
    even = [REFERENCES[i] if i % 2 else poor[i] for i in range(N)]
    odd = [poor[i] if i % 2 else REFERENCES[i] for i in range(N)]
    found = compare([run(tmp_path / "even", even), run(tmp_path / "odd", odd)], metrics=["rouge-l"])
    apart = found.differences["odd"]["rouge-l"]
    assert apart.low < 0 < apart.high and apart.p > 0.05 and apart.better is None
    assert not set("▲▼") & set(str(found) + found.markdown() + found.latex())
    assert found.wins("odd", "rouge-l") == (N // 2, 0, N // 2)


def test_without_intervals_nothing_is_marked(tmp_path: Path) -> None:
    found = compare(
        [run(tmp_path / "base", written(5)), run(tmp_path / "ours", REFERENCES)], metrics=["bleu"], intervals=False
    )
    apart = found.differences["ours"]["bleu-4"]
    assert apart.value > 0.9 and math.isnan(apart.low) and math.isnan(apart.p) and math.isnan(apart.holm) and apart.better is None
    assert "nan" not in str(found) + found.markdown() + found.latex()
    assert json.loads(json.dumps(found.to_dict()), parse_constant=pytest.fail)["differences"]["ours"]["bleu-4"]["p"] is None


def test_holm() -> None:
    # The steps by hand: 4 x .005, 3 x .01, 2 x .03, then .04 is not below the one before.
    assert holm([0.01, 0.04, math.nan, 0.03, 0.005]) == pytest.approx([0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_wins_and_the_studies_that_differ_most(tmp_path: Path) -> None:
    base = near(0.6, 1)
    ours = list(base)
    ours[3], ours[8], ours[20] = REFERENCES[3], REFERENCES[8], "nothing alike"
    found = compare([run(tmp_path / "base", base), run(tmp_path / "ours", ours)], metrics=METRICS)
    assert found.wins("ours", "rouge-l") == (2, N - 3, 1)
    metric, above, below = found.differing("ours")
    assert metric == "cider" and {one.study_id for one in above} == {"s3", "s8"} and [one.study_id for one in below] == ["s20"]
    assert below[0].reference == REFERENCES[20] and below[0].said["ours"][0] == "nothing alike"
    assert above[0].said["ours"][1] - above[0].said["base"][1] == max(found.gains("ours", "cider"))
    assert compare([tmp_path / "base", tmp_path / "ours"], metrics=["rouge-l"]).differing("ours", 1)[0] == "rouge-l"
    assert compare([tmp_path / "base", tmp_path / "ours"], metrics=["bleu"]).differing("ours")[0] == ""


def test_reports_have_a_row_for_each_finding(tmp_path: Path) -> None:
    true = ["There is a small left pleural effusion.", "The lungs are clear.", "There is cardiomegaly."]
    said = ["There is a right pleural effusion.", "There is a pleural effusion.", "There is cardiomegaly."]
    found = compare([run(tmp_path / "base", ["Normal."] * 3, true), run(tmp_path / "ours", said, true)])
    rows = {row.name: row for row in found.findings["ours"]}
    effusion = rows["Pleural Effusion"]
    assert (effusion.named, effusion.hits, effusion.hallucinations, effusion.wrong_side) == (1, 1, 1, 1)
    assert rows["Cardiomegaly"].f1 == 1 and {row.name: row for row in found.findings["base"]}["Cardiomegaly"].misses == 1
    assert {"bleu-4", "rouge-l", "cider", "clinical-f1-micro-14"} <= set(found.metrics)


def test_of_errors_the_lower_is_better(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    errors = rng.random(N) + 1
    of = {
        name: run(tmp_path / name, [{"reconstruction": float(e)} for e in values], [0.0] * N, task="pretrain")
        for name, values in (("base", errors), ("ours", errors - 0.5 - 0.1 * rng.random(N)))
    }
    found = compare(list(of.values()))
    apart = found.differences["ours"]["reconstruction-error"]
    assert apart.value < -0.5 and apart.better is True and found.lower == ("reconstruction-error",)
    assert found.wins("ours", "reconstruction-error") == (N, 0, 0)
    assert "lower is better" in str(found) and not found.findings and found.differing("ours") == ("", [], [])
    assert found.write(tmp_path / "out").is_dir()


def labelled(folder: Path, noise: float, seed: int, names: Sequence[str] = ("Edema", "Effusion"), **settings: Any) -> Path:
    rng = np.random.default_rng(seed)
    truth = [{name: float((i + k) % 2) if i % 7 else None for k, name in enumerate(names)} for i in range(N)]
    said = [
        {name: float(np.clip((0.5 if t is None else t) + noise * rng.normal(), 0, 1)) for name, t in row.items()} for row in truth
    ]
    return run(folder, said, truth, task="classify", **settings)


def test_labels_are_compared_without_the_data_set(tmp_path: Path) -> None:
    base = labelled(tmp_path / "base", 0.9, 1)
    ours = labelled(tmp_path / "ours", 0.3, 2)
    found = compare([base, ours])
    assert found.metrics[:3] == ["auroc", "auroc/Edema", "auroc/Effusion"] and "average-precision" in found.metrics
    rows = parquet.read_table(ours / "predictions.parquet").to_pylist()
    metric = AUROC()
    metric.labels = ["Edema", "Effusion"]
    scores, truth = ([list(json.loads(row[name]).values()) for row in rows] for name in ("scores", "labels"))
    assert found.scores["ours"]["auroc/Effusion"] == score(metric, scores, truth, PATIENTS)["auroc/Effusion"]
    assert found.differences["ours"]["auroc"].better is True
    assert "auroc/Edema" not in str(found) and "auroc/Edema" in found.markdown()
    other = labelled(tmp_path / "other", 0.3, 2, ("Edema",))
    assert "labels that not all runs have are left out: Effusion" in told(found := compare([base, other]))
    assert [name for name in found.metrics if "/" in name] == ["auroc/Edema", "average-precision/Edema"]


def test_seeds_of_one_system(tmp_path: Path) -> None:
    texts = [near(0.7, seed) for seed in range(3)]
    base = run(tmp_path / "base", near(0.3, 9))
    folders = [run(tmp_path / f"ours-seed{i}", said, seed=i, decoder={"width": 8}) for i, said in enumerate(texts)]
    joined = ",".join(map(str, folders))
    found = compare([str(base), f"ours={joined}"], metrics=["rouge-l", "cider"])
    statistics = [Cider().statistics(one, REFERENCES) for one in texts]
    assert found.scores["ours"]["cider"] == seeds(Cider(), statistics, PATIENTS)["cider"]
    ours, theirs = ([RougeL().statistics(one, REFERENCES) for one in of] for of in (texts, [near(0.3, 9)]))
    apart = seeds_difference(RougeL(), ours, theirs, PATIENTS)["rouge-l"]
    assert (found.differences["ours"]["rouge-l"].low, found.differences["ours"]["rouge-l"].p) == (apart.low, apart.p)
    assert "seeds: ours 3" in told(found) and found.texts["ours"] == texts[0] and len(found.places["ours"]) == 3
    mean = np.mean([RougeL().statistics(one, REFERENCES)[:, 0] for one in texts], axis=0)
    assert found.per_study["rouge-l"]["ours"] == pytest.approx(mean)
    by_mapping = compare({"base": base, "ours": folders}, metrics=["rouge-l", "cider"])
    assert by_mapping.scores == found.scores
    grouped = compare([base, *folders], metrics=["rouge-l", "cider"], group_seeds=True)
    assert grouped.scores == found.scores and list(grouped.scores) == ["base", "ours"]
    apart_ones = compare([base, *folders], metrics=["rouge-l"])
    assert list(apart_ones.scores) == ["base", "ours-seed0", "ours-seed1", "ours-seed2"]
    assert "have one spec but for seed, name and output; --seeds makes them one system" in told(apart_ones)
    # One that does something else stays alone.
    wider = run(tmp_path / "ours-seed3", texts[0], seed=3, decoder={"width": 9})
    assert list(compare([base, *folders, wider], metrics=["rouge-l"], group_seeds=True).scores) == ["base", "ours", "ours-seed3"]
    code, out, _ = invoke(base, *folders, "--seeds", "--metrics", "rouge-l", "--no-intervals")
    assert code == 0 and "seeds: ours 3" in out


def test_the_common_studies_are_compared(tmp_path: Path) -> None:
    base, ours = near(0.4, 1), near(0.8, 2)
    order = [*range(50, 9, -1)]
    run(tmp_path / "base", base[:45], REFERENCES[:45])
    run(tmp_path / "ours", [ours[i] for i in order], [REFERENCES[i] for i in order],
        studies=[STUDIES[i] for i in order], patients=[PATIENTS[i] for i in order])  # fmt: skip
    found = compare([tmp_path / "base", tmp_path / "ours"], metrics=["cider"])
    assert found.studies == STUDIES[10:45] and found.scores["base"]["cider"].n == 35
    assert found.scores["ours"] == score(Cider(), ours[10:45], REFERENCES[10:45], PATIENTS[10:45])
    left_out = f"10 of {tmp_path / 'base'}, 6 of {tmp_path / 'ours'}"
    assert f"compared on the 35 studies that all have; left out: {left_out}" in told(found)


def test_tables_and_runs(tmp_path: Path) -> None:
    said = near(0.8, 2)
    said[4] = ""
    file = table(tmp_path / "theirs.csv", said, [text + "\n" for text in REFERENCES])
    found = compare([run(tmp_path / "ours", near(0.4, 1)), f"them={file}"], metrics=["rouge-l"])
    assert list(found.scores) == ["ours", "them"] and found.scores["them"] == score(RougeL(), said, REFERENCES, PATIENTS)
    assert "protocol of ours: full: references cleaned by r2gen-iu, whole" in found.notes
    assert "protocol of them: as it stands: texts neither cleaned nor cut" in found.notes
    assert f"empty texts, which count as such: 1 of {file}" in told(found) and "split: test" in found.notes
    other = table(tmp_path / "other.csv", said, study_id=None, patient_id=None, prediction=None, id=STUDIES, made=said)
    code, out, _ = invoke(
        other, tmp_path / "ours", "--study", "id", "--prediction", "made", "--metrics", "rouge-l", "--baseline", "ours"
    )
    assert code == 0 and "differences are to ours" in out


def test_one_protocol_for_runs_and_tables(tmp_path: Path) -> None:
    said = near(0.8, 2)
    paths = [run(tmp_path / "c", said), table(tmp_path / "d.csv", said, [text.upper() for text in REFERENCES])]
    with pytest.raises(DataError, match="read both by one"):
        compare(paths)
    found = compare(paths, metrics=["rouge-l"], protocol="full-iu")
    assert found.scores["c"] == found.scores["d"] and found.references[0] == clean(REFERENCES[0], "r2gen-iu")
    assert any(note.startswith("protocol of c, d: full-iu: predictions and references cleaned") for note in found.notes)


def test_patients_are_drawn_whole(tmp_path: Path) -> None:
    texts = near(0.4, 1), near(0.8, 2)
    for name, said in zip(("a", "b"), texts, strict=True):
        run(tmp_path / name, said)
        # A file of an earlier version: neither patients nor split nor labels.
        old = run(tmp_path / "old" / name, said)
        kept = parquet.read_table(old / "predictions.parquet").drop_columns(["patient_id", "split", "labels"])
        parquet.write_table(kept, old / "predictions.parquet")
        scores = Scores({}, notes=["split: val; cleaning: r2gen-iu; references whole"])
        (old / "scores.json").write_text(json.dumps(scores.to_dict()))
    by_patient = compare([tmp_path / "a", tmp_path / "b"], metrics=["rouge-l"])
    alone = compare([tmp_path / "old/a", tmp_path / "old/b"], metrics=["rouge-l"])
    assert by_patient.scores["a"]["rouge-l"].value == alone.scores["a"]["rouge-l"].value
    assert by_patient.scores["a"]["rouge-l"].low != alone.scores["a"]["rouge-l"].low
    assert alone.scores["a"] == score(RougeL(), texts[0], REFERENCES, [""] * N)
    assert "no run tells patients apart, so each study counts as a patient" in alone.notes and "split: val" in alone.notes
    assert "1,000 draws of the 30 patients" in told(by_patient) and "1,000 draws of the 60 patients" in told(alone)


def test_names(tmp_path: Path) -> None:
    for place in ("a/run", "b/run", "x=1"):
        run(tmp_path / place, near(0.5, 1))
    found = compare([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "x=1"], metrics=["rouge-l"], intervals=False)
    assert list(found.scores) == ["a/run", "b/run", next(iter([n for n in found.scores if n.endswith("x=1")]))]
    found = compare([f"one={tmp_path / 'a/run'}", tmp_path / "b/run"], metrics=["rouge-l"], intervals=False)
    assert list(found.scores) == ["one", "run"]


def test_settings_of_a_metric_come_from_a_spec(tmp_path: Path) -> None:
    run(tmp_path / "a", near(0.5, 1))
    run(tmp_path / "b", near(0.5, 2), metrics=[{"name": "clinical", "uncertain": "negative", "full": True}])
    found = compare([tmp_path / "a", tmp_path / "b"], metrics=["clinical"], intervals=False)
    assert "clinical-precision-example-14" in found.metrics


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)&", line.removesuffix("\\\\"))


def test_what_is_written(tmp_path: Path) -> None:
    odd = r"R_2 & 50% $x^2$ {a}~\b #1 <c>|d"
    found = compare(
        {odd: run(tmp_path / "a", near(0.4, 1)), "ours": run(tmp_path / "b", near(0.8, 2))}, metrics=["bleu", "rouge-l"]
    )
    out = found.write(tmp_path / "deep" / "out")
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "scores.json", "table.md", "table.tex"]
    plain = json.loads((out / "scores.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    again = Scores.from_dict(plain)
    assert again["bleu-4"] == found.scores[odd]["bleu-4"] and again.comparisons == {"ours": found.scores["ours"]}
    assert plain["differences"]["ours"]["rouge-l"]["better"] is True and plain["wins"]["ours"]["rouge-l"]["wins"] > N / 2
    assert plain["runs"]["ours"] == [str(tmp_path / "b")] and plain["findings"]["ours"]["Edema"]["named"] >= 0
    text = (out / "table.tex").read_text(encoding="utf-8")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert r"R\_2 \& 50\% \$x\textasciicircum{}2\$ \{a\}\textasciitilde{}\textbackslash{}b \#1 \textless{}c\textgreater{}" in text
    back = compare([tmp_path / "b", tmp_path / "a"], metrics=["rouge-l"]).latex()
    assert re.search(r"rouge-l & 0\.\d{3} \(0\.\d{3}--0\.\d{3}\) & .* & \$-\$0\.\d{3} \(\$-\$0.* \$\\bigtriangledown\$ &", back)
    # What is special to LaTeX stands there escaped, or in pairs.
    plain_text = re.sub(r"\\[\\{}&%$#_]", "", "\n".join(body))
    assert plain_text.count("{") == plain_text.count("}") and plain_text.count("$") % 2 == 0
    assert not set("%#_^~<>|") & set(plain_text) and plain_text.isascii()
    lines = [line for line in body if line.endswith("\\\\")]
    assert len(lines) == 1 + 5 and {len(cells(line)) for line in lines} == {5} and r"\begin{tabular}{lllll}" in text
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"))
    markdown = [line for line in (out / "table.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(markdown) == 7 and {len(re.split(r"(?<!\\)\|", line)) for line in markdown} == {7}
    assert "(0.005)" in markdown[-1] and "▲" in markdown[-1]


def test_a_terminal_of_80_columns_holds_the_table(tmp_path: Path) -> None:
    long = "r2gencsr-with-a-very-long-name-of-a-run"
    paths = {"base": run(tmp_path / "a", near(0.8, 1)), long: run(tmp_path / "b", near(0.3, 2))}
    shown, _, notes = str(compare(paths)).partition("\n\n")
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "clinical-f1-micro-14" in shown and " ▼ 0.001 0.0" in shown and "-0." in shown
    assert f"{long} by cider: better in" in notes


def test_a_notebook_shows_the_table_without_single_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = medxray.compare([labelled(tmp_path / "base", 0.9, 1), labelled(tmp_path / "ours", 0.3, 2)])
    shown = found._repr_markdown_()
    assert "| auroc |" in shown and "| auroc/Edema |" not in shown and "| auroc/Edema |" in found.markdown()
    assert f"n = {len(found.studies)} studies" in shown
    # There rich would show what it is to write.
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "auroc" in str(found) and "difference" in str(found)


def test_a_run_folder_is_not_written_into(tmp_path: Path) -> None:
    found = compare([run(tmp_path / "a", near(0.4, 1)), run(tmp_path / "b", near(0.8, 2))], metrics=["rouge-l"])
    with pytest.raises(RunError, match=r"a is a run folder, whose scores.json would be lost"):
        found.write(tmp_path / "a")
    with pytest.raises(RunError, match="cannot be written"):
        found.write(table(tmp_path / "file.csv", near(0.4, 1)))


def test_one_patient_has_no_interval(tmp_path: Path) -> None:
    for name in "ab":
        run(tmp_path / name, near(0.5, ord(name)), patients=["p"] * N)
    found = compare([tmp_path / "a", tmp_path / "b"], metrics=["rouge-l"])
    assert math.isnan(found.differences["b"]["rouge-l"].p) and "one patient only, so there are no intervals" in found.notes


def other_references() -> list[str]:
    changed = list(REFERENCES)
    changed[4] = "another beginning and " + changed[4]
    return changed


def make_mistakes(folder: Path) -> None:
    good = near(0.5, 1)
    run(folder / "a", good)
    run(folder / "val", good, split="val")
    run(folder / "elsewhere", good[:3], REFERENCES[:3], studies=["x1", "x2", "x3"])
    run(folder / "cut", good, other_references())
    run(folder / "twice", good[:3], REFERENCES[:3], studies=["s1", "s2", "s1"])
    labelled(folder / "classify", 0.3, 1)
    labelled(folder / "others", 0.3, 1, ("Fracture",))
    old = labelled(folder / "old", 0.3, 1)
    kept = parquet.read_table(old / "predictions.parquet").drop_columns(["labels"])
    parquet.write_table(kept, old / "predictions.parquet")
    flipped = [{name: 0.5 for name in ("Edema", "Effusion")} for _ in range(N)]
    run(folder / "flipped", flipped, [{"Edema": 1.0, "Effusion": 1.0}] * N, task="classify")
    (folder / "bare").mkdir()
    broken = run(folder / "broken", good)
    (broken / "predictions.parquet").write_bytes(b"PAR1")
    run(folder / "none", [])
    table(folder / "t.csv", good)
    table(folder / "nameless.csv", good, study_id=None)
    table(folder / "double.csv", good, studies=["s1", *STUDIES[1:]])
    table(folder / "blank.csv", good, studies=["", *STUDIES[1:]])


MISTAKES = {
    "one run": (["a"], "expected two or more systems, found 1 (a)"),
    "no such path": (["a", "nowhere"], "nowhere: no such run folder or table"),
    "protocol": (["a", "t.csv", "--protocol", "r2gne-iu"], "protocol: no 'r2gne-iu'; did you mean 'r2gen-iu'"),
    "protocol of labels": (["classify", "flipped", "--protocol", "r2gen-iu"], "the runs write no reports"),
    "not evaluated": (["a", "bare"], "bare: no predictions.parquet, so it was not evaluated yet; run: medxray evaluate"),
    "damaged": (["a", "broken"], "broken: cannot be read as an evaluated run"),
    "no study": (["a", "none"], "holds no study"),
    "splits": (["a", "val"], "val was evaluated on val, a on test; judge both on one: medxray evaluate"),
    "another split": (["a", "t.csv", "--split", "val"], "a was evaluated on test, val was asked for"),
    "tasks": (["a", "classify"], "a gives reports, classify gives probabilities of labels; compare runs of one task"),
    "nothing in common": (["a", "elsewhere"], "have no study in common"),
    "references": (["a", "cut"], "study 's4' has another reference: '"),
    "references, and what to do": (["a", "cut"], "(--reference-of 'a')"),
    "a study twice": (["a", "twice"], "study 's1' stands there twice"),
    "a study twice in a table": (["a", "double.csv"], "study 's1' stands on line 2 too"),
    "a study without a name": (["a", "blank.csv"], "a row without the name of its study"),
    "no column of studies": (["a", "nameless.csv"], "no column 'study_id'"),
    "no column": (["a", "t.csv", "--prediction", "predictoin"], "no column 'predictoin'"),
    "baseline": (["a", "cut", "--baseline", "cat"], "baseline: no system 'cat'; did you mean 'cut'? (found: a, cut)"),
    "reference of": (["a", "cut", "--reference-of", "b"], "reference_of: no system 'b'"),
    "a name twice": (["x={0}/a", "x={0}/cut"], "two systems are called 'x'"),
    "a run twice": (["a", "a"], "two systems are called '"),
    "no path": (["x=", "a"], "'x' has no path"),
    "metric": (["a", "t.csv", "--metrics", "blue"], "no metric 'blue'; did you mean 'bleu'"),
    "metric of labels": (["a", "t.csv", "--metrics", "auroc"], "'auroc' does not compare texts"),
    "metric of texts": (["classify", "flipped", "--metrics", "bleu"], "'bleu' does not compare labels"),
    "no metric": (["a", "t.csv", "--metrics", ","], "metrics: none are named"),
    "labels": (["classify", "flipped"], "label 'Edema' is"),
    "other labels": (["classify", "others"], "have no label in common"),
    "labels not kept": (["classify", "old"], "was written before labels were kept there"),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    make_mistakes(folder)
    return folder


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_exits_with_2_and_one_message(case: str, mistakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mistakes)
    arguments, message = MISTAKES[case]
    code, out, error = invoke(*(a.format(mistakes) for a in arguments), "--out", "out")
    assert code == 2, (out, error)
    assert error.startswith("medxray: ") and message in error and "Traceback" not in out + error
    assert not (mistakes / "out").exists()


def test_mistakes_have_types(mistakes: Path) -> None:
    with pytest.raises(SpecError, match="expected a list of runs"):
        compare(str(mistakes / "a"))
    with pytest.raises(DataError, match=r"'another beginning and .* --reference-of|\.\.\."):
        compare([mistakes / "a", mistakes / "cut"])


def test_references_of_one_system_judge_all(mistakes: Path) -> None:
    found = compare([mistakes / "a", mistakes / "cut"], metrics=["rouge-l"], reference_of="cut")
    assert found.references == other_references() and "all are judged by the references of cut" in found.notes
    assert found.scores["a"] == found.scores["cut"] == score(RougeL(), near(0.5, 1), other_references(), PATIENTS)


def test_what_evaluate_leaves_can_be_compared(tmp_path: Path, phantom: Path) -> None:
    folders = []
    for seed in (1, 2):
        pipeline = medxray.build({
            "task": "classify", "seed": seed, "output": str(tmp_path / f"run{seed}"),
            "data": {"reader": {"name": "csv", "root": str(phantom), "report": "findings"}, "image_size": 32},
            "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 8},
            "training": {"steps": 2, "batch_size": 8},
        })  # fmt: skip
        scores = pipeline.fit(progress=False).evaluate("val", progress=False)
        folders.append(pipeline.folder)
    found = compare(folders, metrics=["auroc"], seed=2)
    assert found.scores["run2"]["auroc"] == scores["auroc"] and "split: val" in found.notes
    patients = parquet.read_table(folders[0] / "predictions.parquet")["patient_id"].to_pylist()
    assert patients == pipeline.images("val").patient_ids and all(patients)
