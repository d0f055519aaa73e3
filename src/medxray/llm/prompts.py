"""The words around image and context tokens, literal as released."""

from typing import NamedTuple


class Prompt(NamedTuple):
    """Pieces of text; visual tokens stand between `before` and `after`.

    Attributes:
        before, after: around the study's image tokens.
        context: pool -> (before, after) a context vector.
    """

    before: str
    after: str
    context: dict[str, tuple[str, str]]


PROMPTS: dict[str, Prompt] = {
    # R2GenGPT's main prompt, which R2GenCSR keeps; `desease` is the release's spelling, which its weights need.
    "r2gengpt": Prompt(
        before="Human: <Img>",
        after="</Img> Generate a comprehensive and detailed diagnosis report for this chest xray image. \nAssistant:",
        context={
            "positive": ("Note: <Img>", "</Img> with desease. "),
            "negative": ("Note: <Img>", "</Img> normal. "),
        },
    ),
    # For language models that are trained from nothing: no words to read, so none are spent.
    "bare": Prompt(before="", after="", context={"positive": ("", ""), "negative": ("", "")}),
}
