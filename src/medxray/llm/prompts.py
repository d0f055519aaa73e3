"""The words around image and context tokens: literal as released, a model's own chat template, or the user's."""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from medxray.registry import nearest
from medxray.types import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE, CONTEXT = "{image}", "{context}"
TEXTS = ("indication", "prior")
"""Slots that are filled with a text of the study."""
SLOTS = ("image", "context", *TEXTS)

# `desease` is the release's spelling, which its weights need.
RELEASED = {"positive": ("Note: <Img>", "</Img> with desease. "), "negative": ("Note: <Img>", "</Img> normal. ")}
CORRECT = {"positive": ("Note: <Img>", "</Img> with disease. "), "negative": ("Note: <Img>", "</Img> normal. ")}
ASKED = "<Img>{image}</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image."


@dataclass(frozen=True)
class Prompt:
    """A template, and the words around what stands at its slot `{context}`.

    Attributes:
        template: text with the slots `{image}`, once, and `{context}`, `{indication}`, `{prior}` where wanted.
        context: pool -> the words (before, after) its context vectors.
        reports: pool -> the words (before, after) the report of a context study.
        chat: True where the template holds the model's own special tokens, that of the beginning with them.
    """

    template: str
    context: dict[str, tuple[str, str]] = field(default_factory=lambda: CORRECT)
    reports: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {
            "positive": ("Report of a study with disease: ", "\n"),
            "negative": ("Report of a normal study: ", "\n"),
        }
    )
    chat: bool = False

    @property
    def parts(self) -> list[str]:
        """The template cut at `{image}` and `{context}`, which are parts of their own. Context comes first of all where
        a template has no place for it."""
        parts = [part for part in re.split(r"(\{image\}|\{context\})", self.template) if part]
        return parts if CONTEXT in parts else [CONTEXT, *parts]


PROMPTS: dict[str, Prompt] = {
    # R2GenGPT's main prompt, which R2GenCSR keeps.
    "r2gengpt": Prompt("{context}Human: " + ASKED + " \nAssistant:", RELEASED),
    # For language models that are trained from nothing: no words to read, so none are spent.
    "bare": Prompt(
        "{context}{image}",
        {"positive": ("", ""), "negative": ("", "")},
        {"positive": ("", "\n"), "negative": ("", "\n")},
    ),
}
NAMES = (*PROMPTS, "chat")


def check_prompt(prompt: str) -> str:
    """A prompt's name, or a template that can be filled, as it is.

    Raises:
        ValueError: it is neither, with what is wrong.
    """
    if prompt in NAMES:
        return prompt
    slots = re.findall(r"\{(\w*)\}", prompt)
    if not slots and not re.search(r"\s", prompt):
        raise ValueError(
            f"no such prompt{nearest(prompt, NAMES)} (known: {', '.join(NAMES)}, or a template with {IMAGE})"
        )
    for slot in slots:
        if slot not in SLOTS:
            known = ", ".join(f"{{{name}}}" for name in SLOTS)
            raise ValueError(f"no slot {{{slot}}}{nearest(slot, SLOTS)} (known: {known})")
    for slot, least in (("image", 1), ("context", 0)):
        if not least <= slots.count(slot) <= 1:
            times = "once" if least else "once at most"
            raise ValueError(f"the slot {{{slot}}} must stand in a template {times}; it stands there {slots.count(slot)} times")
    return prompt


def prompt_of(name: str, tokenizer: "PreTrainedTokenizerBase | None") -> Prompt:
    """The prompt of a name or template that `check_prompt` has passed.

    Raises:
        SpecError: `chat` for a tokenizer without a chat template, or with one that cannot be used.
    """
    if name in PROMPTS:
        return PROMPTS[name]
    return Prompt(name) if name != "chat" else _chat(tokenizer)


def _chat(tokenizer: Any) -> Prompt:
    """R2GenGPT's words as the user's message. Nothing in it hangs on the day, and no room is left to think aloud."""
    if tokenizer is None or not tokenizer.chat_template:
        raise SpecError(
            "decoder.prompt: chat needs a model whose tokenizer has a chat template, and this one has none; take prompt: "
            "r2gengpt, or write a template with {image}"
        )
    message = {"role": "user", "content": CONTEXT + ASKED}
    try:
        text = tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024", enable_thinking=False
        )
    except Exception as error:  # whatever the template's own program raises
        raise SpecError(f"decoder.prompt: the model's chat template fails: {error}; write a template with {{image}}") from error
    if text.count(IMAGE) != 1 or text.count(CONTEXT) != 1:
        raise SpecError(
            "decoder.prompt: the model's chat template does not hold the user's message once; write a template with {image}"
        )
    return Prompt(text, RELEASED, chat=True)
