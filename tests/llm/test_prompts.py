"""What stands around image and context: words as released, a model's own template, the user's."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medxray import Spec
from medxray.llm.prompts import PROMPTS, check_prompt, prompt_of
from medxray.types import SpecError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ bos_token }}Today: {{ date_string or strftime_now('%d %b %Y') }}\n{{ messages[0].content | trim }}\n"


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", bos_token="<s>")
    made.chat_template = template
    return made


def test_the_released_words() -> None:
    assert PROMPTS["r2gengpt"].parts == [
        "{context}",
        "Human: <Img>",
        "{image}",
        "</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:",
    ]
    assert PROMPTS["r2gengpt"].context["positive"] == ("Note: <Img>", "</Img> with desease. ")
    assert PROMPTS["bare"].parts == ["{context}", "{image}"]


def test_a_template_is_cut_where_vectors_stand() -> None:
    own = prompt_of("Why: {indication}\nBefore: {prior}\n{context}<i>{image}</i> Report {not a slot}:", None)
    assert own.parts == [
        "Why: {indication}\nBefore: {prior}\n", "{context}", "<i>", "{image}", "</i> Report {not a slot}:"
    ]  # fmt: skip
    assert prompt_of("See {image}:", None).parts == ["{context}", "See ", "{image}", ":"], "context comes first of all"
    assert "disease" in own.context["positive"][1]


def test_the_models_own_chat_template() -> None:
    prompt = prompt_of("chat", tokenizer(CHATML))
    assert prompt.chat and prompt.parts[:3] == ["<|im_start|>user\n", "{context}", "<Img>"]
    assert prompt.parts[4].startswith("</Img> Generate a comprehensive")
    assert prompt.parts[4].endswith("chest xray image.<|im_end|>\n<|im_start|>assistant\n")
    assert "Today: 26 Jul 2024\n" in prompt_of("chat", tokenizer(DATED)).template, "no report hangs on the day"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "has none; take prompt: r2gengpt"),
        (tokenizer(), "has none; take prompt: r2gengpt"),
        (tokenizer("{{ raise_exception('no system') }}"), "chat template fails: no system"),
        (tokenizer("{{ bos_token }}"), "does not hold the user's message once"),
    ],
)
def test_a_chat_template_that_cannot_be_used(made: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        prompt_of("chat", made)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("r2gengtp", r"decoder.prompt: no such prompt; did you mean 'r2gengpt'\? \(known: r2gengpt, bare, chat, or a template"),
        ("Write a report.", r"the slot \{image\} must stand in a template once; it stands there 0 times"),
        ("{image} and {image}", r"the slot \{image\} must stand in a template once; it stands there 2 times"),
        ("{context}{image}{context}", r"\{context\} must stand in a template once at most; it stands there 2 times"),
        ("{image} {indicaton}", r"no slot \{indicaton\}; did you mean 'indication'\? \(known: \{image\}, \{context\}"),
        ("{image} {}", r"no slot \{\} \(known"),
        (3, "decoder.prompt: expected a valid string"),
    ],
)
def test_a_prompt_that_cannot_be_filled_is_refused_with_the_spec(prompt: Any, message: str) -> None:
    spec = {
        "task": "report",
        "data": {"reader": {"name": "csv", "root": "."}},
        "encoder": "vit",
        "decoder": {"name": "causal-lm", "model": "any", "prompt": prompt},
        "training": {"steps": 1},
    }
    with pytest.raises(SpecError, match=message):
        Spec.read(spec)


@pytest.mark.parametrize("prompt", ["r2gengpt", "bare", "chat", "{image}", "a {prior} b {image} {prior}"])
def test_a_prompt_that_can_be_filled_stays_as_it_is(prompt: str) -> None:
    assert check_prompt(prompt) == prompt
