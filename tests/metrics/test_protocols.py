"""Protocols of scoring: what the releases score against, composed here from their own steps."""

from typing import Any

import pytest

from medxray.data.text import RULES, clean
from medxray.llm import REPORT_DECODERS
from medxray.llm.causal_lm import CausalLM
from medxray.llm.memory_transformer import MemoryTransformer
from medxray.metrics.protocols import AS_IT_STANDS, PROTOCOLS, protocol
from medxray.types import RunError, SpecError

RAW = [
    "1. The heart is normal. 2. Lungs: clear, no effusion.",
    "Heart size is enlarged. " * 30,
    "the 'tortuous' aorta.. No pneumothorax!",
]
TRAIN = ["the heart is normal . lungs clear .", "the heart is normal . heart size is enlarged .", "no effusion ."]
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def test_a_table_is_read_as_r2gen_reads_its_annotation() -> None:
    """R2Gen keeps 60 (IU X-Ray) or 100 ids of a report, the first of which is its start sign."""
    for name, most in {"r2gen-iu": 60, "r2gen-mimic": 100}.items():
        read = [" ".join(["<start>", *clean(text, name).split(), "<end>"][:most][1:]).removesuffix(" <end>") for text in RAW]
        assert [protocol(name).reference(text) for text in RAW] == read
        assert [protocol(name).prediction(text).split() for text in RAW] == [clean(text, name).split() for text in RAW]
    assert len(protocol("r2gen-iu").reference(RAW[1]).split()) == 59 and len(clean(RAW[1], "r2gen-iu").split()) == 150


def test_whole_references_and_other_limits() -> None:
    for name, rule in {"full-iu": "r2gen-iu", "full-mimic": "r2gen-mimic", "full-r2gencsr-mimic": "r2gencsr-mimic"}.items():
        assert [protocol(name).reference(text) for text in RAW] == [clean(text, rule) for text in RAW]
    assert protocol("r2gen-iu", 3).reference(RAW[0]) == "the heart is"
    assert "3 words" in protocol("r2gen-iu", 3).words and "59 words" in protocol("r2gen-iu").words
    assert protocol(None) is AS_IT_STANDS
    assert [AS_IT_STANDS.reference(text) for text in RAW] == [AS_IT_STANDS.prediction(text) for text in RAW] == RAW
    assert protocol(None, 2).reference("a b  c") == "a b" and protocol(None, 2).prediction("a b  c") == "a b  c"


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "none"])
def test_a_report_that_is_clean_stays_so(rule: str) -> None:
    """So a model that was trained on cleaned reports loses nothing when its predictions are cleaned too."""
    for text in RAW:
        assert clean(clean(text, rule), rule).split() == clean(text, rule).split()


def test_unknown_protocol() -> None:
    with pytest.raises(SpecError, match=r"protocol: no 'r2gen-ui'; did you mean 'r2gen-iu'.*expected one of r2gen-iu"):
        protocol("r2gen-ui")
    with pytest.raises(SpecError, match="words: expected 1 or more, found 0"):
        protocol("r2gen-iu", 0)
    assert all(name == one.name for name, one in PROTOCOLS.items())


def test_memory_transformer_cuts_as_r2gen_decodes_its_ids() -> None:
    decoder = MemoryTransformer(0, width=8, hidden=8, heads=1, layers=1, slots=1, threshold=2, max_length=6)
    decoder.prepare(TRAIN)
    # Words that stand twice: ".", "heart", "is", "normal", "the"; five ids remain beside the start sign.
    reports = ["the heart is normal .", "the lungs is normal . heart", "heart", ""]
    assert decoder.cut(reports) == ["the heart is normal .", "the <unk> is normal .", "heart", ""]
    assert decoder.limit == "5 words, words that it does not know as <unk>"


@pytest.mark.parametrize("words", [True, False])
def test_causal_lm_cuts_at_its_tokens(words: bool) -> None:
    settings: dict[str, Any] = {"config": LLAMA, "trainable": True, "vocabulary": 600, "words": words}
    decoder = CausalLM(0, **settings, max_length=4)
    decoder.prepare(TRAIN)
    tokenizer: Any = decoder.tokenizer
    reports = [*TRAIN, "", "heart"]
    expected = []
    for report in reports:
        # R2GenGPT and R2GenCSR: tokens truncated at max_length without special ones, decoded, stripped.
        ids = tokenizer(report, truncation=True, max_length=4, add_special_tokens=False).input_ids
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert decoder.cut(reports) == expected
    assert len(expected[0]) < len(TRAIN[0]) and decoder.limit == "4 tokens"


def test_a_decoder_without_a_limit_says_so() -> None:
    class Endless(REPORT_DECODERS.base):  # type: ignore[misc,name-defined]
        def loss(self, *_: Any) -> Any: ...
        def count(self, *_: Any) -> Any: ...
        def generate(self, *_: Any) -> Any: ...

    with pytest.raises(RunError, match="protocol r2gen: decoder Endless has no token limit; take protocol full"):
        Endless().cut(["a"])
