"""What holds of any text: what cleaning may leave, that it is done once, and that nothing of it falls over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medxray.data.text import RULES, SECTIONS, clean, is_empty, sections, without_marks

CLEANING = [rule for rule in RULES if rule != "none"]
REMOVED = {rule: set("\"'/\\,?;*!%^&_+()[]{}") | (set() if rule == "r2gencsr-mimic" else set(":<=>@")) for rule in CLEANING}

words = st.text("abcdefgh", min_size=1, max_size=6)
# Pieces that the rules look for, in any order.
pieces = st.sampled_from([
    "1. ", "2. ", ".3. ", "..", ". ", ".", " ", "  ", "\n", "XXX", "xxxx", "___", "[** ", " **]", "<unk>", "[redacted]", "-", "/",
    "(", ")", "[", "]", "*", "_", ":", ";", ",", "'", "FINDINGS:", "IMPRESSION", "INDICATION: ", "Heart", "a", "Ⅻ", "İ", "ß",
    "\ue000", "\x00", "\r\n",
])  # fmt: skip
texts = st.text(max_size=60) | st.lists(pieces, max_size=20).map("".join)


@pytest.mark.parametrize("rule", CLEANING)
@given(text=texts)
def test_what_cleaning_leaves(rule: str, text: str) -> None:
    cleaned = clean(text, rule)
    assert cleaned == cleaned.lower() and cleaned.endswith(" .")
    assert not REMOVED[rule] & set(cleaned)
    # A stop stands for itself, so that it is a word to a score.
    assert cleaned.count(".") == cleaned.count(" . ") + 1
    assert set(cleaned) <= set(text.lower()) | set(" .")


@pytest.mark.parametrize("rule", CLEANING)
@given(text=texts)
def test_cleaning_twice_changes_no_word(rule: str, text: str) -> None:
    once = clean(text, rule)
    assert clean(once, rule).split() == once.split()
    assert is_empty(once) == (not once.replace(".", " ").split())


@pytest.mark.parametrize("rule", CLEANING)
@given(sentences=st.lists(st.lists(words, min_size=1, max_size=5), min_size=1, max_size=5))
def test_plain_sentences_keep_their_words(rule: str, sentences: list[list[str]]) -> None:
    text = " ".join(" ".join(sentence).capitalize() + "." for sentence in sentences)
    assert clean(text, rule) == " . ".join(" ".join(sentence) for sentence in sentences) + " ."


@given(text=texts)
def test_marks_are_dropped_once(text: str) -> None:
    once = without_marks(text)
    assert without_marks(once) == once
    assert "\0" not in once
    assert len(once) <= len(text)


@given(told=st.lists(st.tuples(words, st.sampled_from(["", "XXXX", "___", "[**Name**]", "<unk>", "xxx ___"])), max_size=8))
def test_marks_take_no_word_along(told: list[tuple[str, str]]) -> None:
    text = " ".join(f"{word} {mark}".strip() for word, mark in told)
    assert without_marks(text).split() == [word for word, _ in told]


@given(text=texts)
def test_sections_of_anything(text: str) -> None:
    found = sections(text)
    assert tuple(found) == SECTIONS
    for body in found.values():
        assert body == body.strip() and "\n" not in body and "  " not in body


@given(bodies=st.lists(st.lists(words, min_size=2, max_size=6), min_size=5, max_size=5), order=st.permutations(SECTIONS),
       gap=st.sampled_from(["\n", "\n\n", "\r\n"]), capitals=st.booleans())  # fmt: skip
def test_sections_come_back_in_any_order(bodies: list[list[str]], order: list[str], gap: str, capitals: bool) -> None:
    told = {name: f"{' '.join(body).capitalize()}." for name, body in zip(SECTIONS, bodies, strict=True)}
    heads = {name: name.upper() if capitals else name.capitalize() for name in SECTIONS}
    assert sections(gap.join(f"{heads[name]}: {told[name]}" for name in order)) == told
