"""Texts on which metrics of words go wrong."""

from collections.abc import Sequence

import numpy as np
import pytest

TEXT = """the heart is normal in size . no focal airspace opacity , effusion or pneumothorax seen within lungs IN IT improved
enlarged opacities clear größe naïve 心 胸部 ❤ e\u0301dema"""


@pytest.fixture(scope="session")
def hard_pairs() -> tuple[list[str], list[str]]:
    """500 predictions and references, random and adversarial, without what the caption evaluation cannot take."""
    rng = np.random.default_rng(0)

    def text(shortest: int, longest: int, words: Sequence[str] = TEXT.split()) -> str:
        return " ".join(rng.choice(words, rng.integers(shortest, longest)))

    references = [text(1, 60) for _ in range(500)]
    predictions = [text(0, 60) if i % 3 else " ".join(references[i].split()[::2]) for i in range(500)]
    for i in range(20, 30):
        predictions[i] = references[i]
    for i in range(30, 40):
        predictions[i] = ""
    many = [f"word{i}" for i in range(400)]
    odd = {
        0: ("", ""), 1: ("heart", "heart"), 2: ("heart", "lungs are clear"), 3: ("the " * 60, "the heart"),
        4: ("the the the", "the " * 40), 5: (" ", "no effusion ."), 6: ("   ", "  \t "), 7: ("\u00a0", "clear"),
        8: (". . , !", ". ! ?"), 9: (".", "."), 10: ("heart  is  normal", "the heart  is normal "),
        11: ("\tlungs\tclear", "lungs clear"), 12: ("心 胸部 größe", "größe 心 胸部"), 13: ("e\u0301dema", "édema"),
        14: (text(1000, 1001, many), text(1000, 1001, many)), 15: (text(1, 5), text(1000, 1001)), 16: ("x" * 5000, "x" * 5000),
        17: ("IMPRESSION IS IN IT", "impression is in it"), 18: ("3.5 cm x 2,4 cm", "3.5cm x 2.4 cm"), 19: ("clear", ""),
    }  # fmt: skip
    for i, pair in odd.items():
        predictions[i], references[i] = pair
    return predictions, references
