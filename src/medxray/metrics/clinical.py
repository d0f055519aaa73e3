"""Findings read back from report text by rules: mentions, negation over lists, doubt (after NegEx, Chapman 2001), sides
and degrees. The observations are CheXpert's fourteen (Irvin et al., AAAI 2019); the rules are our own."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

OBSERVATIONS: tuple[str, ...] = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
MAIN_OBSERVATIONS: tuple[str, ...] = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
"""The five that CheXpert's competition scores."""


class Finding(NamedTuple):
    """What one sentence says of one observation.

    Attributes:
        name: one of `OBSERVATIONS`.
        value: 1 present, 0 absent, -1 in doubt.
        side: "left", "right", "bilateral", or None where not said.
        degree: "small", "moderate" or "large", or None where not said; mild counts as small, severe as large.
        sentence: the sentence, as it stands in the text.
    """

    name: str
    value: int
    side: str | None
    degree: str | None
    sentence: str


def label_reports(texts: Iterable[str]) -> list[dict[str, int]]:
    """Labels of reports for CheXpert's observations, by rules.

    Args:
        texts: raw or cleaned (lower case, sentences apart by " . "); XXXX and ___ may stand for removed words.

    Returns:
        For each text, name -> 1 present, 0 absent, -1 in doubt; a name that is not mentioned is left out. An
        observation named several times is present if any sentence says so, else in doubt if any says so. "No Finding"
        is 1 where no other observation but Support Devices is present or in doubt, else left out; a text without a
        letter has no label at all.
    """
    return [_labels(text) for text in texts]


def _labels(text: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    for sentence in _sentences(text):
        for name, value, _, _ in _read(sentence):
            before = labels.get(name, 0)
            labels[name] = 1 if 1 in (before, value) else min(before, value)
    if re.search(r"[^\W\d_]", text) and not any(value for name, value in labels.items() if name != "Support Devices"):
        labels["No Finding"] = 1
    return labels


def read_report(text: str) -> list[Finding]:
    """Every mention of an observation in a report, in order, with its side and degree where the sentence says them."""
    return [
        Finding(name, value, side, degree, " ".join(sentence.split()))
        for sentence in _sentences(text)
        for name, value, side, degree in _read(sentence)
    ]


def sides(text: str) -> dict[str, str]:
    """Observation -> "left", "right" or "bilateral", of those that a report finds or suspects on a side that it tells;
    one found on the left in one sentence and on the right in another is bilateral."""
    told: dict[str, str] = {}
    for finding in read_report(text):
        if finding.value and finding.side:
            told[finding.name] = finding.side if told.get(finding.name, finding.side) == finding.side else "bilateral"
    return told


def label_report(text: str) -> dict[str, int]:
    """The findings of `medxray.data.phantom.FINDINGS` that a report names: 1 present, 0 absent, -1 in doubt; those not
    mentioned are left out. Consolidation has pneumonia and airspace disease in it."""
    labels: dict[str, int] = {}
    for sentence in _sentences(text):
        for mention in _Reading(_plain(sentence)).read():
            phantom = mention.term.phantom
            for name in _PHANTOM_PARTS.get(phantom, (phantom,)) if phantom else ():
                before = labels.get(name, 0)
                labels[name] = 1 if 1 in (before, mention.value) else min(before, mention.value)
    return labels


class _Term(NamedTuple):
    """A kind of mention: the observation that it names, and the finding of `medxray.data.phantom.FINDINGS`, if any."""

    name: str
    phantom: str | None
    words: str


_TERMS: tuple[_Term, ...] = (
    _Term("Cardiomegaly", "Cardiomegaly", r"cardiomegaly|(?:heart|cardiac) enlargement|enlarged cardiac size"),
    _Term("Enlarged Cardiomediastinum", None, r"(?:cardio ?)?mediastinal (?:widening|enlargement|prominence)"),
    _Term(
        "Lung Lesion", "Nodule",
        r"micronodules?|nodul(?:es?|arity|ar (?:\w+ )?(?:densit|opacit|opacification|focus|lesion|mass)\w*)"
        r"|mass(?:es)?(?! effect)|mass ?like \w+|tumou?rs?|neoplasms?|carcinomas?|metasta(?:sis|ses|tic \w+)"
        r"|(?:lung|pulmonary|parenchymal|cavit(?:ary|ating)) lesions?|lesions? (?:in|within"
        r"|of) the (?:\w+ )?(?:\w+ )?(?:lung|lobe)"
        r"|cavitation",
    ),
    _Term(
        "Lung Opacity", "Consolidation",
        r"air ?space (?:disease|opacit(?:y|ies)|process|infiltrat\w+)|infiltrat(?:es?|ions?)",
    ),
    _Term(
        "Lung Opacity", None,
        r"opacit(?:y|ies)|opacifications?|opacified|haz(?:e|iness)"
        r"|(?:increased|ill defined|vague|patchy|hazy|streaky|focal|subtle|abnormal|lung|pulmonary|parenchymal"
        r"|basilar|lobe"
        r"|perihilar|retrocardiac|infrahilar|linear|airspace|alveolar|interstitial|asymmetric|bandlike) densit(?:y|ies)"
        r"|scars?|scarring|cicatri(?:x|ces)|fibrosis|fibrotic \w+|reticula\w+|reticulonodular \w+"
        r"|interstitial (?:(?:lung|pulmonary) )?(?:markings?|prominence|thickening|changes?|patterns?|disease"
        r"|infiltrat\w+|process)"
        r"|(?:bronchovascular|peribronchial|lung|pulmonary|reticular|basilar|bronchial) (?:markings?|thickening"
        r"|infiltrat\w+)"
        r"|(?:increased|prominent|coarse(?:ned)?|accentuated) (?:\w+ )?markings|(?:bronchial|peribronchial) cuffing",
    ),
    _Term(
        "Edema", "Edema",
        r"edema(?<!tissue edema)|oedema(?<!tissue oedema)|(?:vascular|venous|pulmonary"
        r"|hilar) (?:\w+ )?(?:congestion|engorgement|cephalization)"
        r"|kerley(?: b)? lines?|septal lines|(?:heart|cardiac|congestive|ventricular) failure|chf|cephali[sz]ation"
        r"|fluid overload|vascular (?:fullness|plethora|prominence|redistribution)|venous hypertension"
        r"|prominen(?:t|ce)(?: of)?(?: the)? (?:central )?(?:pulmonary )?(?:vascul(?:ature|arity)|vessels)"
        r"|(?:pulmonary|central) (?:vascul(?:ature|arity)|vessels|xxxx) (?:is |are "
        r"|appears? )?(?:(?!not)\w+ )?(?:engorged|prominent|indistinct|congested)",
    ),
    _Term("Consolidation", "Consolidation", r"consolidat(?:ions?|ive|ed|ing)"),
    _Term("Pneumonia", "Consolidation", r"pneumonias?|bronchopneumonias?"),
    _Term(
        "Pneumonia", None,
        r"pneumonitis|pneumonic \w+|infectious(?: \w+)?|infection(?<!granulomatous infection)(?<!tuberculous infection)"
        r"(?<!prior infection)(?<!previous infection)(?<!old infection)s?",
    ),
    _Term("Atelectasis", "Atelectasis", r"atelectas[ie]s|atelectatic"),
    _Term("Atelectasis", None, r"collaps(?<!vertebral collaps)(?<!body collaps)ed?(?! of (?:\w+ )?(?:vertebra|t\d"
    r"|l\d))"),
    _Term("Pneumothorax", "Pneumothorax", r"pneumothora(?:x|ces)|ptx"),
    _Term("Hydropneumothorax", "Hydropneumothorax", r"h(?:ydr|em)o ?pneumothora(?:x|ces)"),
    _Term(
        "Pleural Effusion", "Effusion",
        r"effusion(?<!pericardial effusion)(?<!joint effusion)s?|pleural (?:\w+ )?fluid|hydrothorax|h(?:a)?emothorax"
        r"|fluid (?:in|within|along) the (?:\w+ ){0,2}(?:fissures?|pleural)|empyema"
        r"|blunting(?: of)?(?: \w+){0,4}? (?:costophrenic|cp|sul)\w*(?: (?:\w+ )?(?:angles?|sulc\w+))?"
        r"|blunted (?:\w+ ){0,2}(?:costophrenic|cp)(?: angles?)?"
        r"|(?:costophrenic|cp) (?:\w+ ){0,5}?blunt(?:ed|ing)|sulc\w+ (?:(?:is|are) )?blunt(?:ed|ing)",
    ),
    _Term(
        "Pleural Other", None,
        r"(?:(?:pleural|pleuro?|pleuro ?parenchymal|pleural parenchymal)(?: based)?(?: \w+)? (?:thickening|scars?"
        r"|scarring|fibrosis|plaques?"
        r"|calcifications?)|(?:thickening|calcifications?|scarring) of the (?:\w+ )?pleura|fibrothorax"
        r"|apical (?:pleural )?(?:cap|capping|thickening)|calcified (?:pleura|plaques?)|pleural (?:reaction|disease"
        r"|abnormalit\w+))"
        r"(?:(?: ,)?(?: (?:likely|probably|and|or))? scarring)?",
    ),
    _Term(
        "Fracture", "Fracture",
        r"fractur(?<!screw is fractur)(?<!wire is fractur)(?<!lead is fractur)(?:es?|ed)"
        r"(?! (?:of )?(?:\w+ ){0,5}?(?:wires?|leads?|hardware|screws?))",
    ),
    _Term(
        "Support Devices", "Pacemaker",
        r"pace ?makers?|pacers?|pacing (?:devices?|leads?|wires?)|aicd|icd|defibrillators?",
    ),
    _Term(
        "Support Devices", "Central Line",
        r"central (?:venous )?(?:lines?|catheters?)|piccs?(?: lines?)?|port ?a ?caths?|mediports?"
        r"|venous (?:\w+ )?catheters?"
        r"|(?:jugular|subclavian) (?:\w+ ){0,2}?(?:lines?|catheters?)|swan ganz(?: catheter)?|dialysis catheters?",
    ),
    _Term(
        "Support Devices", "Tube",
        r"(?:endotracheal|et|tracheostomy|(?:oro|naso)gastric|enteric|feeding|ng|chest|thoracostomy) tubes?"
        r"|tracheostomy|ett",
    ),
    _Term(
        "Support Devices", None,
        r"tub(?:es?|ing)|lines? (?:and|or) tubes?|lines?(?= placement)|(?:art|arterial|iv|support|monitoring"
        r"|femoral|venous) lines?"
        r"|catheters?|ports?|(?:prosthetic|mechanical|artificial|bioprosthetic|replacement) (?:\w+ ){0,2}valves?"
        r"|valve (?:\w+ )?(?:replacements?|prosthes[ie]s|repair|annuloplasty)|valvuloplasty"
        r"|stents?|hardware|screws?|rods?|(?:fixation|metal|metallic|cervical|surgical) (?:plates?|devices?)"
        r"|arthroplast(?:y|ies)|prosthes[ie]s(?<!breast prostheses)(?<!breast prosthesis)|drains?(?! ?age)"
        r"|pigtails?|sheaths?|balloon pump|iabp|lvad|impella|cannulas?"
        r"|(?:neuro)?stimulators?|(?:medical|support\w*|assist|implant(?:ed|able)|electronic|cardiac|infusion"
        r"|pacing) devices?"
        r"|closure devices?|generators?|loop recorders?|dob(?:b)?hoff|intubat(?:ed|ion)|shunts?(?= (?:catheter"
        r"|tub))|coils?|gastric band|lap band",
    ),
    _Term("Extubated", None, r"extubat(?:ed|ion)"),
)  # fmt: skip
_PARTS: Mapping[str, tuple[str, ...]] = {
    "Hydropneumothorax": ("Pleural Effusion", "Pneumothorax"),
    "Extubated": ("Support Devices",),
}
_PHANTOM_PARTS: Mapping[str, tuple[str, ...]] = {"Hydropneumothorax": ("Effusion", "Pneumothorax")}
# A structure is named by a noun and judged by a state beside it: "heart size and mediastinal contours are normal".
_STRUCTURES: tuple[_Term, ...] = (
    _Term(
        "Cardiomegaly", "Cardiomegaly",
        r"heart(?! (?:failure|enlargement))(?: (?:size|shadow|silhouettes?|contours?))?|cardiac (?:silhouettes?"
        r"|shadow|size|contours?)"
        r"|cardiac(?= (?:and|, hilar) (?:\w+ )?mediastinal)|cardiopericardial silhouette",
    ),
    _Term(
        "Enlarged Cardiomediastinum", "Cardiomegaly",
        r"cardio ?mediastin(?:um|al (?:silhouettes?|contours?|shadow|size|structures|borders?|margins?|outline))",
    ),
    _Term(
        "Enlarged Cardiomediastinum", None,
        r"mediastin(?:um|al (?:and hilar )?(?:silhouettes?|contours?|structures?|shadows?|width|size|borders?"
        r"|margins?|configuration))"
        r"|mediastinal(?= (?:and|,) (?:hilar|cardiac) (?:contours?|silhouettes?|structures?|shadows?))",
    ),
)  # fmt: skip
# What a state says of a structure.
_STATES: Mapping[str, str] = {
    "big": r"large(?=$| ?,| and tort| in size| heart| cardiac sil)|enlarge(?:d|ment)|prominen(?:t|ce)|widen(?:ed"
    r"|ing)|increased in size|generous|dilated|enlarging",
    "borderline": r"borderline",
    "normal": (
        r"upper (?:limits? of )?normal|upper limits?|top (?:limits of )?normal|(?:with)?in (?:normal limits?"
        r"|limits of normal)|normal|unremarkable"
        r"|not (?:\w+ )?(?:enlarged|widened)|nonenlarged"
    ),
}  # fmt: skip
_SEEN = (
    r"(?:seen|identified|present|evident|visuali[sz]ed|demonstrated|appreciated|apparent|noted|observed|found|visible"
    r"|detected)"
)
_GONE = r"(?:resolved|cleared|removed|evacuated|withdrawn|disappeared|drained)"
_BE = r"(?:is|are|was|were|be|been|has|have|had)"
_CHANGE = (
    r"(?:chang(?:es?|ed)|increased?|decreased?|improve(?:d|ment)|worsen(?:ed|ing)|resolution|progress(?:ed|ion)"
    r"|differen(?:t|ce)"
    r"|clear(?:ed|ing)|resolved|removed)"
)
_ADVERBS = (
    r"significant(?:ly)?|interval|definite(?:ly)?|appreciabl[ey]|substantial(?:ly)?|relevant|gross(?:ly)?|acute"
    r"|overall|other|obvious"
    r"|major|real|notabl[ey]|marked(?:ly)?|apparent|further|yet|been|fully|completely|entirely|much"
    r"|radiographic(?:ally)?"
)
_CUES: Mapping[str, str] = {
    # Words of negation that negate no finding.
    "neutral": (
        rf"(?:no|not|without|little)(?: (?:{_ADVERBS}))* {_CHANGE}(?: (?:in|of))?"
        r"|no doubt|not without|not (?:only|well \w+|fully \w+|completely \w+|entirely \w+)|tips? (?:is|are) not \w+"
        r"|(?:nearly|almost|partial(?:ly)?|incomplete(?:ly)?|near)(?: \w+)? (?:resol\w+|clear\w+|removal"
        r"|removed)(?: of)?"
    ),
    # Gone: said of what stands before, where a finding does, else of what follows.
    "gone": (
        rf"no longer(?: {_BE})?(?: \w+)?(?: (?:is|are))?|{_GONE}|none|absent|ruled out|excluded"
        rf"|{_BE} (?:(?:been|completely|fully|since|now|also|entirely) )*(?:{_GONE}|absent|ruled out|excluded"
        rf"|negative|none)"
        rf"|(?:completely|fully|since) {_GONE}|(?:{_BE} )?not (?:(?:clearly|definitely|otherwise|radiographically"
        rf"|currently|readily) )?{_SEEN}"
    ),
    "open": (
        r"(?:cannot|can not|can|could not|not|no|never)(?: entirely| completely| definitely| confidently| be"
        r"| definitively)* (?:be )?(?:(?:\w+ly) )?"
        r"(?:excluded|ruled out|confirmed)|(?:is|are|remains?|also|be) (?:also )?(?:possible|suspected|questionable"
        r"|likely|unlikely"
        r"|less likely|favou?red(?: over)?|a possibility|doubtful|in the differential)(?= ?$| ?,| and| but| versus"
        r"|(?<=over))|favou?red over"
        rf"|(?:may|might) not be {_SEEN}|(?:possible|suspected|questionable|questioned)(?= ?$)"
    ),
    "maybe": (
        r"(?:may|might|could|can|would)(?: (?:also|possibly|well|simply|reasonably|partly|in part|all))*"
        r" (?:represent|be|reflect|indicate|suggest|relate|correspond|signify|have)\w*|(?:less"
        r"|un)likely(?: to (?:be|represent|reflect))?"
    ),
    "doubt": (
        r"possibl[ey]|possibility of|probabl[ey]|probability of|questionable|question(?: of)?|likely|suspected"
        r"|suspicious for"
        r"|suspicion (?:of|for)|suggest(?:s|ed|ing|ions?|ive)?(?: of)?|concern(?:ing)? (?:for|of)|worrisome for"
        r"|versus|vs"
        r"|equivocal|presum(?:ed|ably)|potential(?:ly)?|differential|mimic\w*|rais\w+ the"
        r"|exclude|rule ?out|r o|(?:evaluat\w+|assess\w*|correlat\w+|workup)(?: \w+){0,4}? (?:for|of)"
        r"|if (?:there is )?(?:\w+ )?(?:suspicion|concern)|perhaps|(?:un)?certain|indeterminate"
    ),
    "history": r"(?:history|hx|h o) (?:of|positive for|significant for)|history",
    "end": (
        r"but|however|although|though|except(?:ion)?(?: for| of)?|which|there (?:is|are|has|have)"
        r"|(?<!consistent )(?<!compatible )(?<!keeping )with"
        rf"|(?:is|are|again|remains?) (?:again |also |now )?(?:{_SEEN}|unchanged|stable|similar)|persists?|remains?"
        rf"|again|aside from|apart from"
        r"|other than|after|following|status post|due to|secondary to|because of|lungs are|low lung volumes|while"
        r"|whereas"
        r"|and (?:the|an?)|(?<!not )(?:demonstrates?|shows?)|now|as well as"
    ),
    "negation": (
        r"no|not|without|negative for|free (?:of|from)|clear of|absence of|lack of|denies|nor|neither|rather than"
        r"|instead of"
        r"|(?:resolution|removal|clearing|disappearance|evacuation) of"
    ),
}  # fmt: skip
_CLEAR = (
    r"(?:lungs?|lung fields|lung bases|lungs and pleural spaces)(?: (?!not|no|with)\w+){0,6}? clear(?! (?:of|from"
    r"|ing|ed))"
    r"|clear (?:and (?:\w+ )?\w+ )?lungs|(?:lungs?|lung fields) clear"
)
_RULES = re.compile(
    # At the beginnings of words, but of those that begin no rule.
    r"\b(?=\w)(?!(?:the|of|xxxx|to|left|right|for|on|at|by|from|size|seen|acute)\b)(?:"
    + "|".join(
        [
            f"(?P<neutral>{_CUES['neutral']})",
            f"(?P<clear>{_CLEAR})",
            *(f"(?P<term{k}>{term.words})" for k, term in enumerate(_TERMS)),
            *(f"(?P<structure{k}>{term.words})" for k, term in enumerate(_STRUCTURES)),
            *(f"(?P<{state}>{words})" for state, words in _STATES.items()),
            *(f"(?P<{cue}>{words})" for cue, words in _CUES.items() if cue != "neutral"),
        ]
    )
    + r")\b"
)
_SENTENCE = re.compile(
    r"[.;?!]+(?=\s|$)|(?<=[a-z])\.(?=[a-zA-Z])|\n\s*(?=\n|[-*•]|\d+[.)]|[A-Z][A-Z ]+:)"
)
_MARKS = str.maketrans({**dict.fromkeys("()[]/_-", " "), ",": " , ", ":": " , "})
_BOTH_SIDES = re.compile(
    r"\b(?:left|right)(?<!on the left)(?<!on the right)"
    r" (?:(?:greater|more|worse|larger|less) than(?: the)?|and( \w+)?) (?:left|right)\b"
)
_DEGREES: Mapping[str, str] = {
    "small": r"small|mild(?:ly)?|minimal(?:ly)?|minor|tiny|trace|slight(?:ly)?|subtle|minute",
    "moderate": r"moderate(?:ly)?",
    "large": r"large|severe(?:ly)?|marked(?:ly)?|massive(?:ly)?|extensive(?:ly)?|huge|gross(?:ly)?",
}
_DEGREE = re.compile(r"\b(?:" + "|".join(f"(?P<{degree}>{words})" for degree, words in _DEGREES.items()) + r")\b")
_DEGREE_BEHIND = re.compile(
    r"(?:,|(?: (?:is|are|which|now|remains?|that|appears?|also|with|of|and))+)? (?:"
    + "|".join(f"(?P<{degree}>{words})" for degree, words in _DEGREES.items())
    + r")(?= ?$| ?,| in | and | displace| bilateral| degree| amount)"
)
_SIDE = re.compile(
    r"\b(?:(?P<bilateral>bilateral(?:ly)?|bibasilar|bibasal|biapical|both|bilobar)|(?P<left>left|lingula\w*)"
    r"|(?P<right>right))\b(?! (?:atri|ventric|heart|main))"
)
_PREPOSITION = (
    r"(?:in|at|on|of|within|along|over(?:lying)?|overlies|involving|throughout|near|to|into|projecting|from|adjacent)"
)
_MODIFIER = (
    r"(?:the|an?|any|small|mild(?:ly)?|minimal|tiny|trace|slight|subtle|moderate(?:ly)?|large|severe|marked|new|old"
    r"|left|right"
    r"|bilateral|bibasilar|biapical|basilar|basal|base|bases|apical|upper|middle|mid|lower|lobe|lung|pleural"
    r"|pulmonary|focal"
    r"|patchy|acute|associated|adjacent|underlying|linear|interstitial|stable|unchanged|persistent|probable|overt"
    r"|frank|early"
    r"|definite|sided|possible|suspicious|displaced|rib|visible|residual|subsegmental|streaky|compressive)"
)
_LIST = re.compile(rf" ?,?(?: (?:and|or|nor|and or|,|{_MODIFIER}))* ")
# "No pneumothorax, small left effusion": behind a negated finding these words begin a new statement.
_NEW = re.compile(
    r"(?: ?,(?: and)?| and(?! (?:left|right|bilateral)))?(?: an?)?(?: (?:stable|unchanged|persistent|mildly"
    r"|moderately|severely))*"
    r"(?: (?:small|mild|minimal|tiny|trace|slight|moderate|marked|severe|stable|unchanged|persistent|bibasilar"
    r"|bilateral|left|right))"
    rf"+(?: {_MODIFIER})* "
)
_OR = re.compile(r"\b(?:or|nor|versus|vs)\b")
# What stands between a finding and one in the same place: "left base opacity, which may represent atelectasis".
_INHERITS = re.compile(
    r" ?(?:(?:,|and|or|versus|vs|which|that|may|might|could|likely|probabl[ey]|possibl[ey]|presumed|represents?"
    r"|representing"
    r"|reflect\w*|be|due|to|(?:consistent|compatible|in keeping) with|with(?= (?:adjacent|associated|underlying))"
    r"|concerning"
    r"|suspicious|worrisome|suggest\w*|for|of|adjacent|associated|underlying|compressive|mild|either|also|the|early"
    r"|focal"
    r"|indicat\w+|is|most) )*"
)
_CONNECTOR = re.compile(
    r"(?:^|(?<= )|(?=,))(?:,|and|or|with|but|may|could|might|versus|however|which|while|likely|possibl\w+"
    r"|probabl\w+|is now"
    r"|consistent|compatible|concerning|suspicious|worrisome|suggest\w*|represent\w*|reflect\w*|due)(?= |$)"
)
_TIED = re.compile(rf" (?:\w+ )?{_PREPOSITION}\b")
_JOINED = re.compile(r"(?: (?:and|or|and or|small|mild|adjacent|associated))* ")
_BREAK = re.compile(r"\b(?:in|with|is|are|has|there|by|for|(?:worsen|improv|increas|decreas|chang)\w*(?= (?:of|in)))\b")
_SIDE_BY_SIDE = re.compile(r"(?: (?!(?:with|by|is|are|but|appears?)\b)[\w,]+){0,5} ")
_APPEARS = re.compile(r" (?:(?:is|are|appears?|be|all|both|to) )*")
_OF_THE = re.compile(r"(?: (?:of|in|the|and|overall|size|superior|upper))* ")
_AS_AN_ALTERNATIVE = re.compile(r" (?:, )?(?:and )?or(?: \w+){0,3} ")
_BARE = re.compile(rf"(?:(?:completely|fully|since) )?(?:{_GONE}|absent)")
_CLEAR_LUNGS = _Term("Lung Opacity", None, _CLEAR)
_REACH = 200
"""Characters that are looked at behind a mention."""


@dataclass
class _Mention:
    term: _Term
    value: int
    start: int
    end: int
    side: str | None = None
    degree: str | None = None


@dataclass
class _Reading:
    """One pass over a plain sentence, from rule to rule.

    Attributes:
        sentence: lower case, commas apart.
        found: mentions so far, in order; what comes behind may change their values.
        polarity: the value of the next mention; None where the past is told.
        cue: where the words end that set it.
        listed: whether a differential diagnosis is told, which goes on behind commas.
        structures: those that wait for a state.
        state: value, start and end of a state that waits for its structure.
        maybe: how many mentions there were when doubt was said that falls on the last of them if none follows.
    """

    sentence: str
    found: list[_Mention] = field(default_factory=list)
    polarity: int | None = 1
    cue: int = 0
    listed: bool = False
    structures: list[tuple[_Term, re.Match[str]]] = field(default_factory=list)
    state: tuple[int, int, int] | None = None
    maybe: int | None = None

    def read(self) -> list[_Mention]:
        for match in _RULES.finditer(self.sentence):
            rule = match.lastgroup or ""
            if rule.startswith("term"):
                self._mention(_TERMS[int(rule[4:])], match)
            elif rule.startswith("structure"):
                self._structure(_STRUCTURES[int(rule[9:])], match)
            elif rule in _STATES:
                self._state(rule, match)
            else:
                self._cue(rule, match.group(), match.start(), match.end())
        self._close()
        return self.found

    def _mention(self, term: _Term, match: re.Match[str]) -> None:
        sentence, start, end = self.sentence, match.start(), match.end()
        before = sentence[self.found[-1].end : start] if self.found else None
        behind = sentence[end : end + _REACH]
        if self.polarity is None:
            if "," not in sentence[self.cue : start]:
                return
            self.polarity = 1
        if before is not None and self.polarity != 1 and self.found[-1].end >= self.cue and not _OR.search(behind):
            # "Likely atelectasis, left effusion"; "no pneumothorax, small effusion".
            said = self.polarity == -1 and not self.listed and "," in before and not _OR.search(before)
            if said or _NEW.fullmatch(before):
                self.polarity = 1
        value = self.polarity
        if value == 1 and before is not None and _AS_AN_ALTERNATIVE.fullmatch(before):
            self.found[-1].value, value = -abs(self.found[-1].value), -1
        if value == 1 and (behind.startswith((" or ", " and or ")) or "blunt" in match.group()):
            value = -1
        self.found.append(_Mention(term, 0 if term.name == "Extubated" else value, start, end))

    def _structure(self, term: _Term, match: re.Match[str]) -> None:
        start, end = match.span()
        if self.state is not None and _OF_THE.fullmatch(self.sentence, self.state[2], start):
            self.found.append(_Mention(term, self.state[0], self.state[1], end))
            self.state = (self.state[0], self.state[1], end)
            return
        self.polarity = 1
        if self.structures and not _SIDE_BY_SIDE.fullmatch(self.sentence, self.structures[-1][1].end(), start):
            self.structures = []
        self.structures.append((term, match))

    def _state(self, rule: str, match: re.Match[str]) -> None:
        start, end = match.span()
        value = {"big": self.polarity or 0, "borderline": -1, "normal": 0}[rule]
        last = self.found[-1] if self.found else None
        if rule == "normal" and last and last.term.name in ("Edema", "Lung Opacity"):
            # "Interstitial markings are normal."
            last.value = 0 if _APPEARS.fullmatch(self.sentence, last.end, start) else last.value
        between = self.sentence[self.structures[-1][1].end() : start].split() if self.structures else []
        if self.structures and len(between) <= (9 if rule == "normal" else 6) and "with" not in between:
            self.found += [_Mention(term, value, at.start(), end) for term, at in self.structures]
            self.polarity = 1
        else:
            self.state = (value, start, end)
            if rule == "borderline":
                self.polarity, self.cue = -1, end
        self.structures = []

    def _cue(self, rule: str, words: str, start: int, end: int) -> None:
        found = self.found
        if rule == "clear":
            found.append(_Mention(_CLEAR_LUNGS, 0, start, end))
            self.polarity = 1
        elif rule in ("neutral", "end"):
            # "Likely due to atelectasis" doubts the cause.
            if not (self.polarity == -1 and words.endswith(" to")):
                self._close()
                self.polarity = 1
        elif rule == "negation":
            self._close()
            self.polarity, self.cue = 0, end
        elif rule == "history":
            self.polarity, self.cue = None, end
        elif rule == "gone":
            between = self.sentence[found[-1].end : start] if found else ""
            far = _BARE.fullmatch(words) and ("," in between or len(between.split()) > 4)
            if found and not far:
                self._look_back(0)
                self.polarity = 1
            else:
                self.polarity, self.cue = 0, end
        elif rule == "open":
            self._look_back(-1)
            self.polarity, self.cue = (1 if found and not words.endswith("over") else -1), end
        elif not (self.polarity == 0 and words.startswith(("suggest", "suspici", "concern", "worrisome"))):
            # "No opacity to suggest pneumonia" denies both.
            if words in ("versus", "vs") and found and self.polarity != 0:
                found[-1].value = -abs(found[-1].value)
            if rule == "maybe":
                self.maybe = len(found)
            self.polarity, self.cue, self.listed = -1, end, words.startswith("differential")

    def _look_back(self, value: int) -> None:
        """Gives the last mention, and those of its list, another value."""
        listed = False
        for i in range(len(self.found) - 1, -1, -1):
            self.found[i].value = -abs(self.found[i].value) if value else 0
            gap = self.sentence[self.found[i - 1].end : self.found[i].start] if i else ""
            listed = listed or gap == " " or " and " in gap or " or " in gap
            if not listed or not _LIST.fullmatch(gap):
                break

    def _close(self) -> None:
        if self.maybe == len(self.found):
            self._look_back(-1)
        self.maybe = None


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]


def _plain(sentence: str) -> str:
    plain = " ".join(sentence.lower().translate(_MARKS).split())
    return _BOTH_SIDES.sub(r"\1 bilateral", plain) if "left" in plain and "right" in plain else plain


# Most sentences of a collection of reports stand in many of them.
@lru_cache(maxsize=2**16)
def _read(sentence: str) -> tuple[tuple[str, int, str | None, str | None], ...]:
    plain = _plain(sentence)
    found = _Reading(plain).read()
    _locate(plain, found)
    return tuple(
        (name, m.value, m.side, m.degree) for m in found for name in _PARTS.get(m.term.name, (m.term.name,))
    )


def _locate(sentence: str, found: Sequence[_Mention]) -> None:
    """Fills in sides and degrees: each mention looks at the words between its neighbours that belong to it."""
    gaps = [
        sentence[a.end if a else 0 : b.start if b else len(sentence)]
        for a, b in zip([None, *found], [*found, None], strict=True)
    ]
    ends = [_share(gap) for gap in gaps]
    for i, mention in enumerate(found):
        before = gaps[i][ends[i][1] :] if i else gaps[0]
        before = _BREAK.split(before)[-1]
        last = i == len(found) - 1
        behind = gaps[i + 1] if last else gaps[i + 1][: ends[i + 1][0]]
        own = sentence[mention.start : mention.end]
        mention.side = _side(before) or _side(own)
        if mention.side is None and (last or re.match(rf"(?: ?,)?(?: \w+){{0,4}}? (?:{_PREPOSITION}|both"
        rf"|bilateral\w*|is|are)\b", behind)):
            mention.side = _side(behind)
        degrees = [degree.lastgroup for degree in _DEGREE.finditer(f"{before} {own}")]
        if (later := _DEGREE_BEHIND.match(behind)) and (not degrees or " now " in later.group()):
            degrees.append(later.lastgroup)
        mention.degree = degrees[-1] if degrees else None
    for i in range(1, len(found)):
        if found[i].side is None and _INHERITS.fullmatch(gaps[i][ends[i][1] :]):
            found[i].side = found[i - 1].side
    for i in range(len(found) - 1, 0, -1):
        if found[i - 1].side is None and _JOINED.fullmatch(gaps[i]):
            found[i - 1].side = found[i].side


def _side(words: str) -> str | None:
    sides = {match.lastgroup for match in _SIDE.finditer(words)}
    return "bilateral" if len(sides) > 1 else sides.pop() if sides else None


def _share(gap: str) -> tuple[int, int]:
    """Of the words between two mentions: where the first one's end, and where the second one's begin."""
    cut = _CONNECTOR.search(gap)
    if cut:
        return cut.start(), cut.start()
    # "Pneumothorax small left effusion": what no preposition ties to the first is the second's.
    return (len(gap) if _TIED.match(gap) else 0), 0
