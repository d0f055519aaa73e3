"""Words of a report: what each looked at, which tokens it is made of, and how sure the model was of it."""

import math

import pytest
import torch
from torch import nn

from medxray.llm import REPORT_DECODERS, Generated, ReportDecoder
from medxray.llm.attention import spelled, word_rows
from medxray.types import Prediction, token_words

REPORTS = ["the heart is enlarged . no effusion .", "lungs are clear . the heart is normal ."]
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}


def causal_lm(config: dict = LLAMA, **settings) -> ReportDecoder:
    made = {"config": config, "vocabulary": 300, "trainable": True, "prompt": "bare", **settings}
    decoder = REPORT_DECODERS.build(REPORT_DECODERS.settings_of("causal-lm")(name="causal-lm", **made), 0)
    decoder.prepare(REPORTS)
    return decoder.eval()


def image(batch: int = 2, tokens: int = 6, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prompt", ["bare", "r2gengpt"])
@pytest.mark.parametrize("words", [True, False])
@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_a_word_has_its_share_of_attention_for_every_image_token(config, words, prompt):
    decoder = causal_lm(config, words=words, prompt=prompt)
    found = decoder.attend(image(), torch.ones(2, 3, 32), REPORTS)
    for report, weights in zip(REPORTS, found, strict=True):
        assert weights.shape == (len(report.split()), 6) and weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    assert not torch.allclose(found[0][0], found[0][3])


def test_attention_is_that_of_the_upper_half_of_layers_where_each_token_was_predicted():
    decoder = causal_lm(words=True)
    visual, context = image(1), torch.ones(1, 3, 32)
    embeddings, mask, _ = decoder.assemble(visual, context, REPORTS[:1])
    decoder.llm.set_attn_implementation("eager")
    layers = decoder.llm(inputs_embeds=embeddings, attention_mask=mask, output_attentions=True).attentions
    decoder.llm.set_attn_implementation("sdpa")
    start = embeddings.shape[1] - len(REPORTS[0].split()) - 1
    upper = torch.stack(layers[2:])[:, 0].mean((0, 1))[start - 1 : -2, start - 6 : start]
    expected = upper / upper.sum(1, keepdim=True)
    torch.testing.assert_close(decoder.attend(visual, context, REPORTS[:1])[0], expected)
    assert decoder.llm.config._attn_implementation == "sdpa"


def test_a_word_does_not_depend_on_later_words_or_on_other_studies():
    decoder = causal_lm(words=True)
    both = decoder.attend(image(), None, REPORTS)
    alone = decoder.attend(image()[:1], None, ["the heart is"])
    torch.testing.assert_close(both[0][:3], alone[0])


def test_an_empty_report_has_no_words():
    assert [len(weights) for weights in causal_lm().attend(image(), None, ["", REPORTS[0]])] == [0, 8]


def test_a_decoder_need_not_have_attention():
    class Silent(ReportDecoder):
        width = 8

        def loss(self, visual, context, reports): ...
        def count(self, reports): ...
        def generate(self, visual, context, generation, seed=0): ...

    assert Silent().attend(image(), None, REPORTS) is None


def test_a_language_model_without_attention_says_so():
    decoder = causal_lm()
    for layer in decoder.llm.model.layers:
        layer.self_attn = Mixer()
    assert decoder.attend(image(), None, REPORTS) is None


class Mixer(nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states.cumsum(1), None


def test_rows_of_tokens_become_means_over_the_tokens_of_each_word():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 0.8], [9.0, 9.0]])
    found = word_rows("hearts big", [(0, 5), (5, 6), (6, 10), (10, 10)], rows)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5], [0.2, 0.8]]))


@pytest.mark.parametrize("words", [True, False])
def test_tokens_of_a_learned_tokenizer_join_to_the_report(words):
    decoder = causal_lm(words=words)
    ids = [*decoder.tokenizer(REPORTS[0], add_special_tokens=False).input_ids, decoder.tokenizer.eos_token_id]
    tokens = spelled(ids, lambda part: decoder.tokenizer.decode(part, skip_special_tokens=True))
    assert "".join(tokens) == REPORTS[0] and len(tokens) == len(ids) and tokens[-1] == ""
    if words:
        assert [token.strip() for token in tokens[:-1]] == REPORTS[0].split()


def test_tokens_that_are_half_a_character_or_are_tidied_up_still_join():
    parts = [b"caf", b"\xc3", b"\xa9", b" ", b"au lait", b" ."]

    def decode(ids):
        return b"".join(parts[i] for i in ids).decode(errors="replace").replace(" .", ".")

    assert spelled(range(6), decode) == ["caf", "", "é", " ", "au lait", "."]
    assert spelled([], decode) == []


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["the", " heart", " is"], [[0], [1], [2]]),
        (["car", "dio", "meg", "aly", " .", ""], [[0], [0], [0], [0], [1], []]),
        (["caf", "", "é", " ", "au", ""], [[0], [0], [0], [1], [1], []]),
        (["no ", "effusion. The", " end"], [[0], [1, 2], [3]]),
        (["", " ", ""], [[], [], []]),
        ([], []),
    ],
)
def test_each_token_knows_its_words(tokens, words):
    assert token_words(tokens) == words


def test_a_words_probability_is_the_product_over_its_tokens():
    logs = [math.log(p) for p in (0.5, 0.5, 0.9, 0.1)]
    made = Prediction("s", "opacity .", log_probabilities=logs, tokens=["opa", "city", " .", ""])
    assert [(word.text, round(word.probability, 6)) for word in made.words] == [("opacity", 0.25), (".", 0.9)]
    assert Prediction("s", "opacity .", log_probabilities=logs).words == []


def test_generated_tokens_join_to_the_text():
    from medxray.spec import GenerationSpec

    for words in (True, False):
        decoder = causal_lm(words=words)
        for beams in (1, 2):
            reports = decoder.generate(image(), None, GenerationSpec(beams=beams, max_new_tokens=12))
            for report in reports:
                assert isinstance(report, Generated) and len(report.tokens) == len(report.log_probabilities)
                assert "".join(report.tokens) == report.text
