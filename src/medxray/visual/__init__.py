"""What a run looks like: charts and the HTML page of a run folder."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class ContextCard:
    """A training study that a prediction was given as context.

    Attributes:
        study_id: its name.
        pool: where it was drawn from, such as "diseased" or "normal".
        image: (H, W) float32 in 0..1, or None; a page keeps the first image that it gets of a study.
        report: its report.
        similarity: the cosine of its features with the study's, or None.
    """

    study_id: str
    pool: str
    image: np.ndarray | None
    report: str
    similarity: float | None = None


@dataclass(repr=False)
class StudyCard:
    """One study as the page shows it; what is empty is left out.

    Attributes:
        study_id: its name.
        images: (H, W) float32 each, in 0..1; of pre-training the input, masked, reconstruction and error.
        captions: one an image.
        reference: the report that was written.
        prediction: the report that was generated.
        scores: name -> number, by which studies can be sorted; with `labels` they are probabilities, drawn as bars.
        context: the training studies that the prediction was given.
        labels: name -> 1, 0, -1 uncertain, None missing, shown beside the scores of the same names.
        confidence: the probability of each word of `prediction.split()`.
        attention: for each image, or for the first few, the share (words, h, w) of each word's attention on its regions;
            those of one word sum to one over all images.
        pointed: words whose attention is shown until a reader chooses one; empty for all words.
        remark: a sentence on the attention, such as why there is none.
    """

    study_id: str
    images: list[np.ndarray]
    captions: list[str]
    reference: str = ""
    prediction: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    context: list[ContextCard] = field(default_factory=list)
    labels: dict[str, int | None] = field(default_factory=dict)
    confidence: list[float] = field(default_factory=list)
    attention: list[np.ndarray] = field(default_factory=list)
    pointed: list[int] = field(default_factory=list)
    remark: str = ""

    def _repr_html_(self) -> str:
        """For a notebook: as a page shows it; point at a word to see where it looked."""
        from medxray.visual.study_list import card_of

        return card_of(self)

    def __repr__(self) -> str:
        return f"StudyCard({self.study_id}: {', '.join(self.captions)})"
