"""Findings read back from report text by rules: mentions, negation over lists, doubt (after NegEx, Chapman 2001)."""

import re
from collections.abc import Mapping

_HEART = (
    r"(?:heart|cardiac (?:silhouette|shadow|size|contours?)|cardio ?mediastinal (?:silhouette|contours?)"
    r"|cardiopericardial silhouette)"
)
_MENTIONS: Mapping[str, str] = {
    "Cardiomegaly": (
        rf"cardiomegaly|{_HEART}(?: \w+){{0,4}}? enlarged|(?<!not )enlarged (?:\w+ ){{0,2}}?{_HEART}"
        rf"|enlargement of (?:the )?{_HEART}|(?:heart|cardiac) enlargement|borderline (?:enlarged )?{_HEART}"
        rf"|{_HEART}(?: \w+){{0,3}}? borderline"
    ),
    "Effusion": (
        r"effusions?|pleural fluid|hydro ?(?:pneumo)?thorax"
        r"|blunting of (?:\w+ ){0,3}?costophrenic|blunted (?:\w+ )?costophrenic"
    ),
    "Pneumothorax": r"(?:hydro ?)?pneumothora(?:x|ces)",
    "Consolidation": (
        r"consolidat(?:ions?|ive|ed)|pneumonias?|air ?space (?:disease|opacit(?:y|ies)|process)|infiltrat(?:es?|ions?)"
    ),
    "Atelectasis": r"atelectas[ie]s|atelectatic",
    "Edema": r"(?<!tissue )o?edema|(?:vascular|venous) congestion|kerley(?: b)? lines?|septal lines",
    "Nodule": r"nodul(?:es?|ar (?:densit|opacit)(?:y|ies))|(?:lung|pulmonary|suspicious|hilar) mass(?:es)?",
    "Fracture": r"fractur(?:es?|ed)",
    "Pacemaker": r"pace ?maker|pacer|pacing (?:device|leads?|wires?)|aicd|icd|defibrillator",
    "Central Line": (
        r"central (?:venous )?(?:lines?|catheters?)|picc(?: line)?|port ?a ?cath|mediport|venous catheters?"
        r"|(?:jugular|subclavian) (?:\w+ ){0,2}?(?:lines?|catheters?)|swan ganz|dialysis catheters?"
    ),
    "Tube": (
        r"(?:endotracheal|et|tracheostomy|(?:oro|naso)gastric|enteric|feeding|ng|chest|thoracostomy) tubes?"
        r"|tracheostomy|ett"
    ),
}  # fmt: skip
_NORMAL_HEART = (
    rf"{_HEART}(?: \w+){{0,7}}? (?:normal|unremarkable|not enlarged|stable|intact)|normal (?:\w+ )?{_HEART}|{_HEART}"
)
# A negation reaches to the end of its list; a new statement ends it. What comes behind reaches back to the last end.
_CUES: Mapping[str, str] = {
    "gone": (
        r"(?:has|have|is|are|was|were)(?: \w+)? (?:resolved|cleared|removed|absent)|resolved|no longer \w+"
        r"|(?:is|are|was|were) not (?:seen|identified|present|evident|visualized|demonstrated)"
    ),
    "doubt": (
        r"possibl[ey]|probabl[ey]|questionable|question of|likely|suspected|suspicious for|suggest\w*|concerning for"
        r"|versus|borderline|equivocal|(?:cannot|can not|difficult to|not) exclude"
    ),
    "both": (
        r"(?:may|might|could|can)(?: \w+)? (?:represent|be|reflect|indicate)"
        r"|(?:cannot|can not|not|is not|are not)(?: be)?(?: \w+)? (?:excluded|ruled out)"
        r"|(?:is|are) (?:possible|suspected|questionable|likely)"
    ),
    "negation": (
        r"no|not|without|negative for|free of|clear of|absence of|lack of|absent|denies|nor|rather than"
        r"|(?:resolution|removal) of"
    ),
    "end": (
        r"but|however|although|though|except|which|there (?:is|are)|with|is present|are present|persists?|remains?"
        r"|(?:the )?lungs are|low lung volumes"
    ),
}  # fmt: skip
_NAMES = tuple(_MENTIONS)
_RULES = re.compile(
    r"\b(?:"
    + "|".join([f"(?P<f{k}>{terms})" for k, terms in enumerate(_MENTIONS.values())])
    + f"|(?P<heart>{_NORMAL_HEART})|"
    + "|".join([f"(?P<{cue}>{terms})" for cue, terms in _CUES.items() if cue in ("both", "gone", "doubt")])
    + f"|(?P<end>{_CUES['end']})|(?P<negation>{_CUES['negation']})"
    + r")\b"
)
_SENTENCE = re.compile(r"[.;?!\n]+(?=\s|$)|(?<=[a-z])\.(?=[a-z])")
_GAP = re.compile(r"[\s,:()\[\]/_-]+")


def label_report(text: str) -> dict[str, int]:
    """The findings that a report names: 1 present, 0 absent, -1 in doubt; those not mentioned are left out.

    Works sentence by sentence on raw text and on cleaned text (lower case, sentences apart by " . "). A finding
    named several times is present if any sentence says so, else in doubt if any says so.
    """
    labels: dict[str, int] = {}
    for sentence in _SENTENCE.split(text.lower()):
        for name, value in _mentions(_GAP.sub(" ", sentence)):
            before = labels.get(name, 0)
            labels[name] = 1 if 1 in (before, value) else min(before, value)
    return labels


def _mentions(sentence: str) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    negated, doubted, first = False, False, 0
    for match in _RULES.finditer(sentence):
        rule = match.lastgroup or ""
        if rule[0] == "f":
            name = _NAMES[int(rule[1:])]
            words = match.group()
            if name == "Cardiomegaly" and (" is " in words or " are " in words):
                negated = doubted = False  # a statement with its own verb
            value = -1 if doubted else 1
            if negated or " not " in words:
                value = 0
            if "borderline" in words:
                value = min(value, -value)
            found.append((name, value))
        elif rule == "heart":
            negated = doubted = False
            if " " in match.group() and re.search(r"normal|unremarkable|not enlarged", match.group()):
                found.append(("Cardiomegaly", 0))
        elif rule == "negation":
            negated, doubted = True, False
        elif rule == "end":
            negated = doubted = False
            first = len(found)
        elif not (negated and match.group() in ("suggest", "suspicious for")):  # "no opacity to suggest pneumonia"
            if rule != "doubt":
                found[first:] = [(name, 0 if rule == "gone" else -abs(value)) for name, value in found[first:]]
            if rule != "gone":
                negated, doubted = False, True
    return found
