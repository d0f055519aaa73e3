"""Reports of the phantom's studies, from a small grammar in the wording of radiologists.

Statements come in a fixed anatomical order (devices, heart, lungs, pleura, bones) with varied phrasing. `XXXX`
stands where a de-identified report would have lost a word, never in place of a finding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FINDINGS: tuple[str, ...] = (
    "Cardiomegaly", "Effusion", "Pneumothorax", "Consolidation", "Atelectasis", "Edema", "Nodule", "Fracture",
    "Pacemaker", "Central Line", "Tube",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One finding of a study.

    Attributes:
        name: one of `FINDINGS`.
        side: "left", "right", "bilateral" or "none".
        place: "apex", "upper", "mid", "lower", "base", "none"; the approach of a central line ("jugular",
            "subclavian"), the height of a tube's tip ("high", "good", "low").
        degree: "small", "moderate" or "large"; "none" for devices.
        uncertain: drawn faint, worded with doubt, labelled -1.
        change: against the study before: "new", "unchanged", "improved" or "worse".
        key: seeds where and how it is drawn; the same as long as the finding persists.
    """

    name: str
    side: str
    place: str
    degree: str
    uncertain: bool
    change: str = "new"
    key: int = 0


_SIZE = {"small": ("small",), "moderate": ("moderate",), "large": ("large",)}
_GRADE = {"small": ("mild",), "moderate": ("moderate",), "large": ("severe", "marked")}
_GRADE_ADVERB = {"small": ("mildly",), "moderate": ("moderately",), "large": ("severely", "markedly")}
_ZONE = {"upper": ("upper lobe", "upper lung"), "mid": ("mid lung",), "lower": ("lower lobe", "lower lung")}
_RIB = {"upper": "upper", "mid": "mid", "lower": "lower"}

# {side} left, right, bilateral; {size} small...; {grade} mild...; {adverb} mildly...; {zone} upper lobe...
_PRESENT: Mapping[str, tuple[str, ...]] = {
    "Cardiomegaly": (
        "The heart is {adverb} enlarged.",
        "There is {grade} cardiomegaly.",
        "{Grade} enlargement of the cardiac silhouette.",
        "The cardiac silhouette is {adverb} enlarged.",
    ),
    "Effusion": (
        "There is a {size} {side} pleural effusion.",
        "{Size} {side} pleural effusion is present.",
        "{Size} {side} effusion with blunting of the costophrenic angle.",
    ),
    "Pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "{Size} {side} apical pneumothorax is seen.",
        "{Size} {side} pneumothorax with a visible pleural line.",
    ),
    "Consolidation": (
        "There is {grade} consolidation in the {side} {zone}.",
        "{Grade} airspace consolidation is seen in the {side} {zone}.",
        "{Side} {zone} airspace disease which is {grade}.",
    ),
    "Atelectasis": (
        "There is {grade} {side} basilar atelectasis with elevation of the hemidiaphragm.",
        "{Grade} atelectasis at the {side} lung base.",
        "Bands of {grade} atelectasis are present at the {side} base.",
    ),
    "Edema": (
        "There is {grade} bilateral pulmonary edema.",
        "{Grade} bilateral perihilar interstitial edema.",
        "Bilateral vascular congestion with {grade} pulmonary edema.",
    ),
    "Nodule": (
        "There is a {size} nodule in the {side} {zone}.",
        "{Size} round {side} {zone} nodule.",
        "A {size} pulmonary nodule projects over the {side} {zone}.",
    ),
    "Fracture": (
        "There is a {adverb} displaced fracture of a {side} {rib} rib.",
        "{Adverb} displaced {side} {rib} rib fracture.",
        "{Side} {rib} rib fracture with {grade} displacement.",
    ),
    "Pacemaker": (
        "A {side} chest pacemaker is present with the lead in the right ventricle.",
        "{Side} sided pacemaker with lead in the expected position.",
        "Single lead {side} pacemaker is seen.",
    ),
    "Tube": (
        "The endotracheal tube tip is {tip} the carina.",
        "Endotracheal tube is present with the tip {tip} the carina.",
        "An endotracheal tube terminates {tip} the carina.",
    ),
}
_LINES = {
    "jugular": (
        "{Side} internal jugular central line with the tip in the superior vena cava.",
        "A {side} jugular central venous catheter is present.",
    ),
    "subclavian": (
        "{Side} subclavian central line with the tip in the superior vena cava.",
        "A {side} subclavian central venous catheter is present.",
    ),
}
_BILATERAL = {
    "Effusion": (
        "There are {size} bilateral pleural effusions.",
        "{Size} bilateral pleural effusions are present.",
    ),
    "Atelectasis": ("There is {grade} bibasilar atelectasis.", "{Grade} bibasilar atelectasis is present."),
}
_TIP = {"high": "high above", "good": "in good position above", "low": "low just above"}
_UNCERTAIN: Mapping[str, tuple[str, ...]] = {
    "Cardiomegaly": (
        "Borderline heart size which may represent {grade} cardiomegaly.",
        "Possible {grade} cardiomegaly.",
    ),
    "Effusion": (
        "A {size} {side} pleural effusion cannot be excluded.",
        "Possible {size} {side} pleural effusion.",
        "Blunting of the {side} costophrenic angle may represent a {size} effusion.",
    ),
    "Pneumothorax": (
        "A {size} {side} pneumothorax cannot be excluded.",
        "Possible {size} {side} apical pneumothorax.",
    ),
    "Consolidation": (
        "Faint {side} {zone} opacity may represent {grade} consolidation.",
        "Possible {grade} consolidation in the {side} {zone}.",
    ),
    "Atelectasis": (
        "Faint {side} basilar opacity may represent {grade} atelectasis.",
        "Possible {grade} atelectasis at the {side} lung base.",
    ),
    "Edema": (
        "Possible {grade} bilateral pulmonary edema.",
        "{Grade} bilateral pulmonary edema cannot be excluded.",
    ),
    "Nodule": (
        "Possible {size} nodule in the {side} {zone}.",
        "A {size} round opacity in the {side} {zone} may represent a nodule.",
    ),
    "Fracture": (
        "Possible {adverb} displaced {side} {rib} rib fracture.",
        "A {adverb} displaced fracture of a {side} {rib} rib cannot be excluded.",
    ),
}
_CHANGE = {
    "unchanged": (
        "This is unchanged.",
        "This is unchanged since the prior study.",
        "No change compared to XXXX.",
    ),
    "improved": ("This has improved since the prior study.", "This has decreased compared to XXXX."),
    "worse": ("This has worsened since the prior study.", "This has increased compared to XXXX."),
}
_NORMAL_HEART = (
    "The heart is normal in size.",
    "Heart size is within normal limits.",
    "The cardiomediastinal silhouette is within normal limits.",
    "The cardiac silhouette and mediastinum are normal.",
    "Heart size and XXXX are normal.",
)
_CLEAR_LUNGS = (
    "The lungs are clear.",
    "The XXXX are clear.",
    "The lungs are clear bilaterally without focal consolidation.",
    "The lungs are well expanded and clear.",
    "No focal consolidation or suspicious nodule.",
    "Lungs are clear without consolidation edema or nodule.",
)
_NORMAL_PLEURA = (
    "No pleural effusion or pneumothorax.",
    "There is no pleural effusion or pneumothorax.",
    "No pneumothorax or effusion is seen.",
    "There is no evidence of pneumothorax or pleural effusion.",
)
_NORMAL_BONES = (
    "No acute bony abnormality.",
    "The osseous structures are intact.",
    "The XXXX are intact.",
    "No displaced rib fracture.",
    "Visualized bones are normal.",
)
_VESSELS = (
    "Pulmonary vascularity is within normal limits.",
    "The pulmonary XXXX are normal.",
    "Pulmonary vasculature is normal.",
)
_CONTOURS = (
    "The mediastinal contours are normal.",
    "The mediastinum is unremarkable.",
    "Mediastinal contours are within normal limits.",
    "The trachea is midline.",
    "The aorta is XXXX.",
)
_ABDOMEN = (
    "The diaphragm is normal.",
    "The upper abdomen is unremarkable.",
    "The soft tissues are unremarkable.",
)
_NO = {
    "Effusion": ("No pleural effusion.", "There is no pleural effusion.", "No effusion is seen."),
    "Pneumothorax": ("No pneumothorax.", "There is no pneumothorax.", "No evidence of pneumothorax."),
    "Consolidation": ("No focal consolidation.", "There is no focal airspace disease."),
    "Edema": ("No pulmonary edema.", "There is no edema."),
    "Nodule": ("No suspicious nodule.", "No pulmonary nodule is seen."),
}
_NORMAL_IMPRESSION = (
    "No acute cardiopulmonary abnormality.",
    "No acute cardiopulmonary disease.",
    "No acute disease.",
    "Normal chest.",
    "No acute findings.",
    "Normal chest XXXX.",
)
_COMPLAINTS = (
    "Chest pain.", "Shortness of breath.", "XXXX-year-old {person} with chest pain.", "Cough and fever.",
    "XXXX-year-old {person} with XXXX.", "Dyspnea.", "Preoperative evaluation.", "Cough for XXXX weeks.",
)  # fmt: skip
_FOLLOW_UP = ("Followup.", "Followup of XXXX.", "Interval evaluation.")
_WORD = {
    "Cardiomegaly": "cardiomegaly", "Effusion": "{side} pleural effusion", "Pneumothorax": "{side} pneumothorax",
    "Consolidation": "{side} {zone} consolidation", "Atelectasis": "{side} basilar atelectasis",
    "Edema": "pulmonary edema", "Nodule": "{side} {zone} nodule", "Fracture": "displaced {side} rib fracture",
    "Pacemaker": "{side} pacemaker", "Central Line": "{side} central line", "Tube": "endotracheal tube",
}  # fmt: skip
_DEVICES = ("Tube", "Central Line", "Pacemaker")
_LUNGS = ("Consolidation", "Atelectasis", "Edema", "Nodule")


def _fill(template: str, finding: Finding, rng: np.random.Generator) -> str:
    words = {
        "side": finding.side,
        "rib": _RIB.get(finding.place, ""),
        "tip": _TIP.get(finding.place, ""),
        "zone": _pick(_ZONE.get(finding.place, ("",)), rng),
    }
    if finding.degree in _SIZE:
        words["size"] = _pick(_SIZE[finding.degree], rng)
        words["grade"] = _pick(_GRADE[finding.degree], rng)
        words["adverb"] = _pick(_GRADE_ADVERB[finding.degree], rng)
    words |= {key.capitalize(): word.capitalize() for key, word in words.items()}
    return template.format_map(words).replace("  ", " ")


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _statement(finding: Finding, rng: np.random.Generator) -> str:
    if finding.uncertain:
        templates: Sequence[str] = _UNCERTAIN[finding.name]
    elif finding.name == "Central Line":
        templates = _LINES[finding.place]
    elif finding.side == "bilateral" and finding.name in _BILATERAL:
        templates = _BILATERAL[finding.name]
    else:
        templates = _PRESENT[finding.name]
    sentence = _fill(_pick(templates, rng), finding, rng)
    if finding.change in _CHANGE and rng.random() < 0.45:
        sentence += " " + _pick(_CHANGE[finding.change], rng)
    return sentence


def write_report(
    findings: Sequence[Finding], gone: Sequence[str], follow_up: bool, female: bool, rng: np.random.Generator
) -> tuple[str, str, str]:
    """Indication, findings and impression of one study.

    Args:
        findings: what the study shows.
        gone: names that the study before showed and this one no longer does.
        follow_up: whether there was a study before.
        female: the patient's sex.
        rng: chooses the phrases.
    """
    named = {finding.name: finding for finding in findings}
    person = "female" if female else "male"
    indication = _pick(_FOLLOW_UP if follow_up else _COMPLAINTS, rng).format(person=person)

    lines = [_statement(named[name], rng) for name in _DEVICES if name in named]
    lines.append(_statement(named["Cardiomegaly"], rng) if "Cardiomegaly" in named else _pick(_NORMAL_HEART, rng))
    if rng.random() < 0.55 and len(findings) < 3:
        lines.append(_pick(_CONTOURS, rng))
    if "Edema" not in named and rng.random() < 0.45 and len(findings) < 3:
        lines.append(_pick(_VESSELS, rng))
    lungs = [name for name in _LUNGS if name in named]
    lines += [_statement(named[name], rng) for name in lungs] or [_pick(_CLEAR_LUNGS, rng)]
    absent = [name for name in ("Consolidation", "Edema", "Nodule") if name not in named]
    if lungs and absent and rng.random() < 0.6:
        lines.append(_pick(_NO[_pick(absent, rng)], rng))
    if "Effusion" in named or "Pneumothorax" in named:
        for name in ("Effusion", "Pneumothorax"):
            lines.append(_statement(named[name], rng) if name in named else _pick(_NO[name], rng))
    else:
        lines.append(_pick(_NORMAL_PLEURA, rng))
    if "Fracture" in named:
        lines.append(_statement(named["Fracture"], rng))
    elif rng.random() < 0.7:
        lines.append(_pick(_NORMAL_BONES, rng))
    if not {"Effusion", "Atelectasis"} & set(named) and len(findings) < 3 and rng.random() < 0.4:
        lines.append(_pick(_ABDOMEN, rng))
    if follow_up and gone and rng.random() < 0.8:
        word = _WORD[gone[0]].replace("{side} ", "").replace("{zone} ", "")
        lines.append(_pick((f"The previously seen {word} has resolved.", f"Interval resolution of the {word}."), rng))

    if not findings:
        return indication, " ".join(lines), _pick(_NORMAL_IMPRESSION, rng)
    parts = []
    for finding in findings:
        text = _fill(_WORD[finding.name], finding, rng)
        if finding.degree in _GRADE:
            words = _SIZE if finding.name in ("Effusion", "Pneumothorax", "Nodule") else _GRADE
            if finding.name == "Fracture":
                words = _GRADE_ADVERB
            text = f"{_pick(words[finding.degree], rng)} {text}"
        if finding.uncertain:
            text = f"possible {text}"
        elif finding.change in ("unchanged", "improved") and rng.random() < 0.5:
            text = f"{finding.change} {text}"
        parts.append(text[0].upper() + text[1:] + ".")
    return indication, " ".join(lines), " ".join(parts)
