"""Sentences of two reports: which agree, differ, are missed or unsupported."""

import pytest

from medxray.visual.agreement import compare_reports


def marks(reference: str, prediction: str) -> tuple[list[str], list[str]]:
    compared = compare_reports(reference, prediction)
    assert "".join(s.text for s in compared[0]) == reference and "".join(s.text for s in compared[1]) == prediction
    return [s.mark for s in compared[0]], [s.mark for s in compared[1]]


@pytest.mark.parametrize(
    ("reference", "prediction", "expected"),
    [
        # The same finding in other words.
        ("The heart is enlarged.", "There is cardiomegaly.", (["agreed"], ["agreed"])),
        # The same denial.
        ("No pneumothorax or effusion.", "There is no pleural effusion.", (["agreed"], ["agreed"])),
        # One finds what the other does not mention, or denies.
        ("Left pleural effusion.", "Clear sky.", (["missed"], [""])),
        ("Left pleural effusion.", "No pleural effusion.", (["missed"], ["unsupported"])),
        ("The lungs are clear.", "There is a large pneumothorax.", ([""], ["unsupported"])),
        ("No pneumothorax.", "There is a large pneumothorax.", (["missed"], ["unsupported"])),
        # A denial that the other does not mention had not to be said.
        ("No pneumothorax.", "No pleural effusion.", ([""], [""])),
        # Side and doubt.
        ("Left pleural effusion.", "Right pleural effusion.", (["differs"], ["differs"])),
        ("Left pleural effusion.", "Pleural effusion.", (["agreed"], ["agreed"])),
        ("Possible pneumonia.", "There is pneumonia.", (["differs"], ["differs"])),
        ("Left effusion. Right effusion.", "Bilateral pleural effusions.", (["agreed", "agreed"], ["agreed"])),
        ("No right effusion. Left effusion.", "Left effusion.", (["", "agreed"], ["agreed"])),
        # The gravest of several.
        ("Cardiomegaly and edema.", "Cardiomegaly.", (["missed"], ["agreed"])),
        # By words, where no observation is named.
        ("The aorta is tortuous.", "the aorta is tortuous", (["agreed"], ["agreed"])),
        ("The aorta is tortuous.", "The aorta is calcified.", ([""], [""])),
        ("The trachea is midline today.", "Trachea is midline.", (["agreed"], ["agreed"])),
        ("No bony abnormality today.", "Bony abnormality today.", ([""], [""])),
        # Nothing to compare with, or nothing said.
        ("", "Left pleural effusion.", ([], [""])),
        ("Left pleural effusion.", "", (["missed"], [])),
        ("...", " . ", ([""], [""])),
    ],
)
def test_marks(reference, prediction, expected):
    assert marks(reference, prediction) == expected


def test_cleaned_text_decimals_and_lines_are_cut_into_sentences_as_they_stand():
    text = "a nodule of 2.5 cm . no effusion ;\nheart size is normal \u2028 .Clear lungs.No edema"
    reference, _ = compare_reports(text, text)
    assert [s.text for s in reference] == [
        "a nodule of 2.5 cm . ", "no effusion ;\n", "heart size is normal \u2028 .Clear lungs.", "No edema",
    ]  # fmt: skip
    assert {s.mark for s in reference} == {"agreed"}


def test_a_report_agrees_with_itself_whatever_it_says():
    text = "No right effusion. Left effusion. Possible pneumonia. The aorta is tortuous. XXXX."
    assert marks(text, text) == (["agreed"] * 5, ["agreed"] * 5)
