"""Cleaning rules, marks of de-identification, and the sections of free-text reports."""

import csv
import random
import re
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from medxray.data import load_studies
from medxray.data.readers import READERS
from medxray.data.text import RULES, SECTIONS, clean, is_empty, sections, without_marks
from medxray.spec import DataSpec, Spec
from medxray.types import DataError, SpecError

# Cleaning


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("No effusion.", "no effusion ."),
        ("1. No effusion. 2. Clear lungs.", "no effusion . clear lungs ."),
        ("Heart: normal (stable); lungs/pleura 'clear'.", "heart normal stable lungspleura clear ."),
        ("left-sided XXXX", "left-sided xxxx ."),
        ("Clear... No change", "clear . no change ."),
    ],
)
def test_rules_agree_on_plain_reports(raw: str, expected: str) -> None:
    assert clean(raw, "r2gen-iu") == expected
    assert clean(raw, "r2gen-mimic") == expected
    if ":" not in raw:
        assert clean(raw, "r2gencsr-mimic") == expected


def test_mimic_joins_lines_and_spaces() -> None:
    raw = "The lungs \n  are   clear.  No \n effusion."
    assert clean(raw, "r2gen-mimic") == clean(raw, "r2gencsr-mimic") == "the lungs are clear . no effusion ."
    assert "\n" in clean(raw, "r2gen-iu")


def test_r2gencsr_keeps_colons_and_comparisons() -> None:
    raw = "FINDINGS:  Heart: < 50 % of the chest. Mass = 3 cm @ hilum : stable"
    assert clean(raw, "r2gencsr-mimic") == "findings : heart : < 50  of the chest . mass = 3 cm @ hilum  : stable ."
    assert clean(raw, "r2gen-mimic") == "findings heart  50  of the chest . mass  3 cm  hilum  stable ."


def test_none_leaves_text_alone() -> None:
    raw = " 1. Any TEXT, (as it is). "
    assert clean(raw, "none") == raw


def test_numbers_that_are_no_enumeration_stay() -> None:
    assert clean("A 6. mm nodule and 45 mm mass. Stable.", "r2gen-iu") == "a 6 . mm nodule and 45 mm mass . stable ."


def plainly(text: str, rule: str) -> str:
    """The rules a step at a time, sentence by sentence: what the fast ones must equal."""
    if rule != "r2gen-iu":
        text = text.replace("\n", " ")
        for _ in range(6):
            text = text.replace("  ", " ")
    for _ in range(3 if rule == "r2gen-iu" else 8):
        text = text.replace("..", ".")
    text = text.replace("1. ", "")
    for dot in (".", ""):
        for number in (2, 3, 4, 5):
            text = text.replace(f"{dot} {number}. ", ". ")
    colon = rule == "r2gencsr-mimic"
    if colon:
        text = text.replace(":", " :")
    marks = r"[.,?;*!%^&_+()\[\]{}]" if colon else r"[.,?;*!%^&_+():<=>@\[\]{}]"
    cleaned = []
    for sentence in text.strip().lower().split(". "):
        cleaned.append(re.sub(marks, "", re.sub(r"[\"/\\']", "", sentence).strip()))
    return " . ".join(cleaned) + " ."


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_any_text_as_a_step_at_a_time(rule: str) -> None:
    draw = random.Random(rule)
    parts = ["1. ", " 2. ", ". 3. ", "..", ".........", " ", "  ", "\n", "\r\n", "\t", "\0", "\1", "Ünd", "XXXX", "___", ":", "@",
             "<", "'", '"', "/", "\\", "(", "]", "a", "Lungs clear", ". ", ".", ";", "\xa0", "\u2028", "İ", "%"]  # fmt: skip
    for _ in range(4000):
        text = "".join(draw.choices(parts, k=draw.randrange(14)))
        assert clean(text, rule) == plainly(text, rule), repr(text)


@pytest.mark.parametrize(("raw", "empty"), [("", True), (" ... \n", True), ("1. ", True), ("clear", False)])
def test_is_empty(raw: str, empty: bool) -> None:
    assert is_empty(clean(raw, "r2gen-iu")) is empty


def test_unknown_rule_names_the_known() -> None:
    with pytest.raises(DataError, match=r"'r2gen'.*r2gen-iu, r2gen-mimic, r2gencsr-mimic, none"):
        clean("text", "r2gen")


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_fast(rule: str) -> None:
    """Far above the speed promised, so that a busy machine does not matter; the figure is in benchmarks/data.py."""
    reports = [
        "The heart is normal in size (stable). No effusion, no pneumothorax. 2. Lungs clear: left base. " * 6
    ] * 500
    start = time.process_time()
    for report in reports:
        clean(report, rule)
    assert time.process_time() - start < 0.5


# Marks of de-identification


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("XXXX XXXX are normal.", "are normal."),
        ("Normal chest x-XXXX.", "Normal chest x."),
        ("XXXX-year-old male, chest pain.", "year-old male, chest pain."),
        ("views of the chest XXXX, XXXX at XXXX hours ", "views of the chest at hours"),
        ("As compared to ___, the left lung is clear.", "As compared to, the left lung is clear."),
        ("seen on [**2101-1-3**] by Dr. [**Last Name (STitle) 12**]. Done.", "seen on by Dr. Done."),
        ("Stable. XXXX. XXXX XXXX. Done.", "Stable. Done."),
        ("old scar (XXXX) seen", "old scar seen"),
        ("pre-XXXX-post", "pre-post"),
        ("Line one XXXX\nXXXX line two.", "Line one\nline two."),
        ("The <unk> is [UNK] normal.", "The is normal."),
        ("Dr. XXXX<XXXX>technologist", "Dr. technologist"),
        ("XXXX", ""),
        ("___ .", ""),
        ("Size 3 x 4 cm, axilla (exam)  as it is. ", "Size 3 x 4 cm, axilla (exam)  as it is. "),
    ],
)
def test_marks_are_dropped(raw: str, expected: str) -> None:
    assert without_marks(raw) == expected


def test_marks_by_a_spec(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "b.png").touch()
    (tmp_path / "studies.csv").write_text(
        "path,study_id,report,impression,indication,prior,split\n"
        "a.png,a,No XXXX. Clear.,Normal x-XXXX.,___ cough,Seen ___.,train\nb.png,b,XXXX XXXX.,,,,train\n"
    )
    reader = READERS.settings_of("csv")(name="csv", root=str(tmp_path))
    kept = load_studies(DataSpec(reader=reader)).splits["train"]
    assert kept["report"] == ["no xxxx . clear .", "xxxx xxxx ."]
    first = load_studies(DataSpec(reader=reader, marks="drop"), reports=False).splits["train"][0]
    assert [first[key] for key in ("report", "impression", "indication", "prior")] == [
        "no . clear .", "Normal x.", "cough", "Seen."
    ]  # fmt: skip
    with pytest.raises(DataError, match="study 'b': report is empty after cleaning"):
        load_studies(DataSpec(reader=reader, marks="drop"))
    with pytest.raises(SpecError, match=r"data\.marks"):
        Spec.read("classify-phantom", ["data.marks=remove"])
    assert Spec.read("classify-phantom", ["data.cleaning=r2gencsr-mimic"]).data.cleaning == "r2gencsr-mimic"


# Sections

FINDINGS, IMPRESSION = "The lungs are clear.", "No acute process."

MIMIC = """\
                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)
 
 INDICATION:  ___F with new onset ascites  // eval for infection
 
 TECHNIQUE:  Chest PA and lateral
 
 COMPARISON:  None.
 
 FINDINGS: 
 
 The lungs are
 clear.
 
 IMPRESSION: 
 
 No acute process.
"""

Expected = dict[str, str]

CASES: dict[str, tuple[str, Expected]] = {
    # Marks and cases of headings.
    "capitals, colons": (
        f"FINDINGS: {FINDINGS}\nIMPRESSION: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "capitals and small": (
        f"Findings: {FINDINGS}\nImpression: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "small": (f"findings: {FINDINGS}\nimpression: {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "small, inline, no stop": (
        "indication: cough findings: lungs clear impression: normal",
        {"indication": "cough", "findings": "lungs clear", "impression": "normal"},
    ),
    "all capitals, inline": (
        "INDICATION: COUGH FINDINGS: LUNGS CLEAR IMPRESSION: NORMAL",
        {"indication": "COUGH", "findings": "LUNGS CLEAR", "impression": "NORMAL"},
    ),
    "inline": (f"FINDINGS: {FINDINGS} IMPRESSION: {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "inline, capitals and small": (
        f"Findings: {FINDINGS} Impression: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "inline, small after a stop": (
        f"Findings: {FINDINGS} impression: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "inline after no stop": (f"Comparison: None Findings: {FINDINGS}", {"comparison": "None", "findings": FINDINGS}),
    "own lines, capitals": (
        f"FINDINGS\n{FINDINGS}\nIMPRESSION\n{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "own lines, small": (
        f"findings\n{FINDINGS}\n\nimpression\n{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "own lines, capitals and small": (
        f"Findings\n\n{FINDINGS}\n\nImpression\n\n{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "own lines with colons": (
        f"Findings:\n{FINDINGS}\nImpression:\n{IMPRESSION}\n",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "no colon": (f"FINDINGS {FINDINGS}\nIMPRESSION {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "no colon, inline": (
        f"FINDINGS {FINDINGS} IMPRESSION {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "no colon, small letters": (
        f"Findings {FINDINGS}\nImpression 1. Stable.",
        {"findings": FINDINGS, "impression": "1. Stable."},
    ),
    "no colon before a small letter": (
        f"INDICATION rib pain,\nCOMPARISON none\nFINDINGS {FINDINGS}",
        {"indication": "rib pain,", "comparison": "none", "findings": FINDINGS},
    ),
    "dashes": (
        f"FINDINGS - {FINDINGS}\nIMPRESSION \u2013 {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "semicolon": (f"FINDINGS; {FINDINGS}\nIMPRESSION; {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "space before the colon": (
        f"FINDINGS : {FINDINGS}\nIMPRESSION :{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "wide colon": (f"FINDINGS\uff1a {FINDINGS}", {"findings": FINDINGS}),
    "bold": (
        f"**FINDINGS:** {FINDINGS}\n\n**IMPRESSION**\n{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "marked down": (
        f"## Findings\n{FINDINGS}\n## Impression\n{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "brackets": (f"TECHNIQUE (2 views): PA.\nFINDINGS (chest): {FINDINGS}", {"technique": "PA.", "findings": FINDINGS}),
    "indented": (
        f"   FINDINGS:   {FINDINGS}\n\t IMPRESSION:\t{IMPRESSION}  ",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    # Characters of Windows.
    "line ends of Windows": (
        f"FINDINGS:\r\n{FINDINGS}\r\n\r\nIMPRESSION:\r\n{IMPRESSION}\r\n",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "line ends of old": (
        f"FINDINGS:\r{FINDINGS}\r\rIMPRESSION:\r{IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "quotes of Windows": ("FINDINGS: The patient\u2019s \u201cmass\u201d.", {"findings": 'The patient\'s "mass".'}),
    "quotes of Windows, raw": ("FINDINGS: The \x93mass\x94 isn\x92t seen.", {"findings": 'The "mass" isn\'t seen.'}),
    "quoted headings": (f"\u201cFINDINGS\u201d: {FINDINGS}", {"findings": FINDINGS}),
    "hard spaces, byte order mark": (f"\ufeffFINDINGS:\xa0{FINDINGS}", {"findings": FINDINGS}),
    # Names.
    "history": ("HISTORY: Cough.", {"indication": "Cough."}),
    "clinical information": (
        f"CLINICAL INFORMATION: Cough.\nREPORT: {FINDINGS}",
        {"indication": "Cough.", "findings": FINDINGS},
    ),
    "reason for exam": (
        f"REASON FOR EXAM: Cough.\nFINDINGS: {FINDINGS}",
        {"indication": "Cough.", "findings": FINDINGS},
    ),
    "reason for this examination": ("REASON FOR THIS EXAMINATION:\n  Cough.", {"indication": "Cough."}),
    "conclusion": (f"FINDINGS: {FINDINGS}\nCONCLUSION: {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "opinion": (f"FINDINGS: {FINDINGS} OPINION: {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "comparisons": ("COMPARISONS: ___.\nPRIOR STUDIES: none", {"comparison": "none"}),
    "comparison film": ("COMPARISON FILM: ___.", {"comparison": "___."}),
    "examination alone": ("EXAMINATION: CHEST (PA AND LAT)", {"technique": "CHEST (PA AND LAT)"}),
    "examination beside technique": ("EXAM: Chest\nTECHNIQUE: PA.", {"technique": "PA."}),
    "history and indication": ("HISTORY: Cough\nINDICATION: Mass?", {"indication": "Cough. Mass?"}),
    "both in one": ("INDICATION/HISTORY: Cough.", {"indication": "Cough."}),
    "misspelt": (f"FINIDNGS: {FINDINGS}\nIMPRESSON: {IMPRESSION}", {"findings": FINDINGS, "impression": IMPRESSION}),
    "findings and impression": (f"FINDINGS AND IMPRESSION: {FINDINGS}", {"findings": FINDINGS, "impression": FINDINGS}),
    "findings/impression": (f"FINDINGS/IMPRESSION: {FINDINGS}", {"findings": FINDINGS, "impression": FINDINGS}),
    "findings & impression": (f"Findings & Impression:\n{FINDINGS}", {"findings": FINDINGS, "impression": FINDINGS}),
    # Forms of MIMIC-CXR.
    "mimic": (
        MIMIC,
        {
            "findings": FINDINGS,
            "impression": IMPRESSION,
            "indication": "___F with new onset ascites // eval for infection",
            "technique": "Chest PA and lateral",
            "comparison": "None.",
        },
    ),
    "wet read before": (
        " WET READ: ___ ___ ___ 9:06 PM\n  Something else.\n"
        + "_" * 78
        + f"\n      FINAL REPORT\n FINDINGS:  {FINDINGS}\n",
        {"findings": FINDINGS},
    ),
    "wet read alone": (" WET READ: ___ ___ 9:06 PM\n  The lungs are\n  clear.", {"findings": FINDINGS}),
    "impression twice": (
        f"IMPRESSION: Old.\nFINDINGS: {FINDINGS}\nIMPRESSION: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "impression twice, the last empty": (f"IMPRESSION: {IMPRESSION}\nIMPRESSION:\n", {"impression": IMPRESSION}),
    "last paragraph": (
        f" FINAL REPORT\n INDICATION:  Cough.\n \n COMPARISON:  None.\n \n {FINDINGS}\n \n More.",
        {"indication": "Cough.", "comparison": "None.", "findings": f"{FINDINGS} More."},
    ),
    "last paragraph after a title": (
        f" FINAL REPORT\n CHEST, TWO VIEWS ON ___\n \n {FINDINGS}\n",
        {"findings": FINDINGS},
    ),
    "no heading": (f"Patient with cough.\n\n{FINDINGS}", {"findings": FINDINGS}),
    "no heading, one paragraph": ("The lungs\nare clear.", {"findings": FINDINGS}),
    "findings without a heading, then an impression": (
        f"{FINDINGS}\n\nIMPRESSION: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "findings after the comparison, then an impression": (
        f"COMPARISON: ___.\n\n{FINDINGS}\n\nIMPRESSION: {IMPRESSION}",
        {"comparison": "___.", "findings": FINDINGS, "impression": IMPRESSION},
    ),
    "views as a heading": (
        f" CHEST, TWO VIEWS:  {FINDINGS}\n \n IMPRESSION: {IMPRESSION}",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "views as a title": (
        f" PA AND LATERAL CHEST:\n \n INDICATION: Cough.\n \n FINDINGS: {FINDINGS}",
        {"indication": "Cough.", "findings": FINDINGS},
    ),
    "regions inside findings": (
        "FINDINGS:\n LUNGS: Clear.\n CHEST WALL: Normal.\n LINES AND TUBES: None.",
        {"findings": "LUNGS: Clear. CHEST WALL: Normal. LINES AND TUBES: None."},
    ),
    "only an indication": ("INDICATION: Cough.", {"indication": "Cough."}),
    # Addenda and what follows.
    "addendum after": (
        f"FINDINGS: {FINDINGS}\nIMPRESSION: {IMPRESSION}\nADDENDUM: Told by phone.",
        {"findings": FINDINGS, "impression": IMPRESSION},
    ),
    "addendum before": (f" ADDENDUM  Told by phone.\n FINAL REPORT\n FINDINGS: {FINDINGS}", {"findings": FINDINGS}),
    "addendum with an impression": (
        f"IMPRESSION: Old.\nADDENDUM: Read anew.\nIMPRESSION: {IMPRESSION}",
        {"impression": IMPRESSION},
    ),
    "notification, recommendations": (
        f"IMPRESSION: {IMPRESSION}\nRECOMMENDATION(S): CT.\nNOTIFICATION: By phone.",
        {"impression": IMPRESSION},
    ),
    "signature": (f"IMPRESSION: {IMPRESSION}\nElectronically signed by: ___", {"impression": IMPRESSION}),
    "numbered impression": (
        "IMPRESSION:\n1. No edema.\n2. Stable mass.",
        {"impression": "1. No edema. 2. Stable mass."},
    ),
    # What is no heading.
    "no findings in a sentence": (
        "FINDINGS: There are no findings: all clear.",
        {"findings": "There are no findings: all clear."},
    ),
    "NO FINDINGS in capitals": ("IMPRESSION: NO FINDINGS: ALL CLEAR.", {"impression": "NO FINDINGS: ALL CLEAR."}),
    "incidental findings": (
        "IMPRESSION: Stable. Other findings: none.",
        {"impression": "Stable. Other findings: none."},
    ),
    "a line that begins with the word": (
        "FINDINGS: There are no acute\nfindings in the chest. By\ncomparison the mass is smaller.",
        {"findings": "There are no acute findings in the chest. By comparison the mass is smaller."},
    ),
    "a sentence that begins with the word": (
        "FINDINGS: Clear. Comparison is made to ___. Impression of a rib.",
        {"findings": "Clear. Comparison is made to ___. Impression of a rib."},
    ),
    "a line's end": (
        "IMPRESSION: No significant\nfindings\nin the chest.",
        {"impression": "No significant findings in the chest."},
    ),
    "admitting diagnosis": ("INDICATION: ADMITTING DIAGNOSIS: CHF.", {"indication": "ADMITTING DIAGNOSIS: CHF."}),
    "differential": (
        "IMPRESSION: Mass. Differential diagnosis: cyst.",
        {"impression": "Mass. Differential diagnosis: cyst."},
    ),
    "time of day": (
        "COMPARISON: ___ at 9:06.\nFINDINGS: At 8:17 clear.",
        {"comparison": "___ at 9:06.", "findings": "At 8:17 clear."},
    ),
    # Nothing.
    "empty": ("", {}),
    "blank": (" \r\n \n", {}),
    "headings only": ("FINDINGS:\nIMPRESSION:\n", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_sections(case: str) -> None:
    text, expected = CASES[case]
    assert sections(text) == {**dict.fromkeys(SECTIONS, ""), **expected}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


STYLES: dict[str, Callable[[str, str], str]] = {
    "capitals": lambda name, text: f"{name.upper()}: {text}\n",
    "own line": lambda name, text: f"{name.upper()}\n{text}\n\n",
    "own line, small": lambda name, text: f"{name.title()}\n{text}\n\n",
    "small": lambda name, text: f"{name.title()}: {text}\n",
    "inline": lambda name, text: f"{name.upper()}: {text} ",
    "inline, small": lambda name, text: f"{name.title()}: {text} ",
    "no colon": lambda name, text: f"{name.upper()} {text}\n",
    "mimic": lambda name, text: f" {name.upper()}:  {text}\n \n",
    "all small": lambda name, text: f"{name}: {text.lower()}\n",
    "all capitals": lambda name, text: f"{name.upper()}: {text.upper()}\n",
    "windows": lambda name, text: f"{name.upper()}:\r\n{text}\r\n\r\n",
}
ORDER = ("indication", "comparison", "technique", "findings", "impression")


@pytest.mark.parametrize("style", STYLES)
def test_real_reports_come_apart(style: str, shared: Path) -> None:
    """3,261 reports whose sections people have entered, put together in a style; some hold headings themselves."""
    with (shared / "data" / "iu_xray" / "reports.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::3]
    wrong = 0
    for row in rows:
        found = sections("".join(STYLES[style](name, row[name]) for name in ORDER if row[name].strip()))
        for name in ORDER:
            text = " ".join(row[name].split())
            text = text.lower() if style == "all small" else text.upper() if style == "all capitals" else text
            wrong += found[name] != text.strip("*# ")
    assert wrong <= 0.004 * len(rows) * len(ORDER), f"{wrong} of {len(rows) * len(ORDER)} sections"


def test_original_xml_reports(shared: Path) -> None:
    files = sorted((shared / "data" / "openi_xml").glob("*.xml"))
    assert len(files) == 12
    for path in files:
        parts = [
            (e.get("Label", ""), " ".join((e.text or "").split())) for e in ElementTree.parse(path).iter("AbstractText")
        ]
        found = sections("\n\n".join(f"{label}:\n{text}" for label, text in parts))
        for label, text in parts:
            assert found[label.lower()] == text, path.name


HOSTILE: list[Callable[[int], str]] = [
    lambda n: "indication: a\n" * n,
    lambda n: "findings: a " * n,
    lambda n: "findings" + " " * 10 * n,
    lambda n: "\n \n" * 4 * n,
    lambda n: "FINDINGS " * n,
    lambda n: "[**" * 4 * n,
    lambda n: "XXXX, " * 2 * n,
    lambda n: ("CHEST A" * 9 + ": x\n") * (n // 6),
    lambda n: "* " * 5 * n,
    lambda n: "and / " * 2 * n,
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_texts_take_no_longer_than_their_length(number: int) -> None:
    def seconds(n: int) -> float:
        text, best = HOSTILE[number](n), float("inf")
        for _ in range(3):
            start = time.process_time()
            sections(text)
            without_marks(text)
            best = min(best, time.process_time() - start)
        return best

    assert seconds(8000) < 30 * max(seconds(1000), 1e-3), "eight times the text; sixty-four times, were it the square"


def test_a_table_of_whole_reports(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "studies.csv").write_text(
        f'path,study_id,report,split\na.png,a,"INDICATION: Cough.\nFINDINGS: {FINDINGS}\nIMPRESSION: {IMPRESSION}",train\n'
    )

    def load(**settings: str) -> dict[str, str]:
        reader = READERS.settings_of("csv")(name="csv", root=str(tmp_path), **settings)
        return load_studies(DataSpec(reader=reader, cleaning="none")).splits["train"][0]  # type: ignore[no-any-return]

    row = load(section="impression")
    assert [row[key] for key in ("report", "findings", "impression", "indication")] == [
        IMPRESSION,
        FINDINGS,
        IMPRESSION,
        "Cough.",
    ]
    assert load()["report"].startswith("INDICATION: Cough.\nFINDINGS")
    (tmp_path / "studies.csv").write_text("path,study_id,split\na.png,a,train\n")
    with pytest.raises(
        DataError, match=r"no column of reports to take the findings from; name it in data\.reader\.report"
    ):
        load(section="findings")
