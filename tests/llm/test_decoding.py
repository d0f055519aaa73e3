"""Decoding: the ids of transformers' `generate`, the same text in any company, and what is not computed."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medxray import build
from medxray.llm import StudyTexts
from medxray.llm.causal_writer import CausalWriter, common_beginning
from medxray.llm.decoding import Decoded, Writer, decode, draw
from medxray.spec import GenerationSpec, Spec
from medxray.types import RunError, SpecError

EOS, K, D = 2, 40, 32


def tiny(kind: str, seed: int = 0, **settings: Any) -> Any:
    """A random language model whose distributions are far from even."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": K, "initializer_range": 0.4, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    of_kind = {
        "llama": {
            "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128,
        },
        "mistral": {
            "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 9,
        },
        "gpt2": {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 128},
    }[kind]  # fmt: skip
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **of_kind, **settings)).eval()
    with torch.no_grad():
        llm.get_output_embeddings().weight[EOS] *= 3  # some texts end early
    return llm


def prefixes(studies: int, length: int = 6, seed: int = 0) -> Tensor:
    """Embeddings (B, S, D) that begin alike."""
    x = torch.randn(studies, length, D, generator=torch.Generator().manual_seed(seed)) * 0.5
    x[:, :2] = x[:1, :2]
    return x


def by_transformers(llm: Any, prefix: Tensor, g: GenerationSpec) -> list[list[int]]:
    output = llm.generate(
        inputs_embeds=prefix,
        attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long),
        max_new_tokens=g.max_new_tokens,
        min_new_tokens=g.min_new_tokens,
        num_beams=g.beams,
        do_sample=False,
        repetition_penalty=g.repetition_penalty,
        length_penalty=g.length_penalty if g.beams > 1 else None,
        no_repeat_ngram_size=g.no_repeat_ngram,
    )
    return [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in output.tolist()]


def written(llm: Any, prefix: Tensor, g: GenerationSpec, seeds: Sequence[int] = (), mask: Any = None) -> list[Decoded]:
    return decode(CausalWriter(llm, prefix, mask, g.max_new_tokens), g, EOS, seeds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_ids_of_transformers(kind: str, beams: int) -> None:
    pick, ended = random.Random(f"{kind}{beams}"), 0
    for seed in range(8):
        generation = GenerationSpec(
            beams=beams,
            min_new_tokens=pick.choice([0, 0, 5]),
            max_new_tokens=pick.choice([5, 12, 20]),
            repetition_penalty=pick.choice([1.0, 1.0, 2.0, 0.7]),
            length_penalty=pick.choice([1.0, 0.0, 2.0, -1.0]),
            no_repeat_ngram=pick.choice([0, 0, 1, 2, 3]),
        )
        llm, prefix = tiny(kind, seed), prefixes(pick.choice([1, 4, 6]), seed=seed)
        found = [text.ids for text in written(llm, prefix, generation)]
        assert found == by_transformers(llm, prefix, generation), generation
        ended += sum(EOS in ids and len(ids) < generation.max_new_tokens for ids in found)
    assert ended > 3  # texts of unequal lengths were among them


@pytest.mark.parametrize("settings", [{}, {"beams": 3}, {"beams": 3, "length_penalty": 2.0, "no_repeat_ngram": 2}])
def test_log_probabilities_are_the_model_s_own(settings: dict[str, Any]) -> None:
    llm, prefix = tiny("llama", 1), prefixes(4)
    texts = written(llm, prefix, GenerationSpec(max_new_tokens=12, repetition_penalty=1.5, min_new_tokens=4, **settings))
    for start, (ids, values) in zip(prefix, texts, strict=True):
        tokens = torch.tensor(ids)
        sequence = torch.cat([start, llm.get_input_embeddings()(tokens)])[None]
        with torch.no_grad():
            logits = llm(inputs_embeds=sequence).logits[0, len(start) - 1 : -1]
        expected = F.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(values), expected, atol=1e-5, rtol=1e-5)


SETTINGS = [
    {},
    {"beams": 3, "no_repeat_ngram": 3},
    {"beams": 3, "rule": "r2gen"},
    {"sample": True, "temperature": 0.8, "top_p": 0.9},
]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_text_hangs_on_its_study_alone(kind: str, settings: dict[str, Any]) -> None:
    """Prefixes of 5 to 16 tokens, padded to the longest of their batch."""
    llm, generation = tiny(kind, 3), GenerationSpec(max_new_tokens=16, **settings)
    lengths = [5 + (7 * i) % 12 for i in range(16)]
    prefix = prefixes(16, 16, seed=4)
    prefix[:, 3:] += torch.randn(16, 1, D, generator=torch.Generator().manual_seed(5))
    seeds = list(range(100, 116))

    def batch(rows: list[int]) -> list[list[int]]:
        longest = max(lengths[row] for row in rows)
        x, mask = torch.full((len(rows), longest, D), 7.0), torch.zeros(len(rows), longest, dtype=torch.long)
        for i, row in enumerate(rows):
            x[i, longest - lengths[row] :] = prefix[row, : lengths[row]]
            mask[i, longest - lengths[row] :] = 1
        return [text.ids for text in written(llm, x, generation, [seeds[row] for row in rows], mask)]

    alone = [batch([row])[0] for row in range(16)]
    assert len({tuple(ids) for ids in alone}) > 4
    assert batch(list(range(16))) == alone
    assert [ids for i in range(0, 16, 3) for ids in batch(list(range(i, min(i + 3, 16))))] == alone
    assert batch(list(range(15, -1, -1))) == alone[::-1]


def test_common_beginning_is_found_behind_padding() -> None:
    x = torch.randn(3, 8, D)
    x[1, 2:5] = x[0, :3]  # two fewer tokens, the first three the same
    x[2, 1:5] = x[0, :4]
    lengths = torch.tensor([8, 6, 7])
    assert common_beginning(x, lengths) == 3
    assert common_beginning(x[:1], lengths[:1]) == 0
    assert common_beginning(x[:1].repeat(4, 1, 1), torch.full((4,), 8)) == 7
    assert common_beginning(x.flip(1), lengths) == 0


class Counting(Writer):
    """Study i ends after i tokens. Notes the rows of each step."""

    def __init__(self, studies: int, beams: int) -> None:
        self.left, self.beams = torch.arange(studies), beams
        self.rows: list[int] = []

    def logits(self) -> Tensor:
        scores = torch.linspace(0, 1, K).expand(len(self.left), -1).clone()
        scores[:, EOS] = torch.where(self.left <= 0, 20.0, -20.0)
        return scores

    def start(self) -> Tensor:
        return self.logits()

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        assert (tokens != EOS).all()
        self.left = self.left[rows] - 1
        self.rows.append(len(rows))
        return self.logits()


def test_studies_that_are_done_are_not_computed() -> None:
    writer = Counting(4, 1)
    texts = decode(writer, GenerationSpec(max_new_tokens=10), EOS)
    assert [len(text.ids) for text in texts] == [1, 2, 3, 4]
    assert writer.rows == [3, 2, 1]
    writer = Counting(4, 3)
    texts = decode(writer, GenerationSpec(max_new_tokens=10, beams=3), EOS)
    assert [len(text.ids) for text in texts] == [1, 2, 3, 4]
    # A few steps more than the best text, until no running beam can gain on the worst of three.
    assert writer.rows[0] <= 12 and writer.rows[-1] == 3 and len(writer.rows) < 9
    assert writer.rows == sorted(writer.rows, reverse=True)


def test_prefix_is_read_once_a_study_and_its_beginning_once_for_all() -> None:
    llm, read = tiny("llama"), []
    llm.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    written(llm, prefixes(4, 9), GenerationSpec(max_new_tokens=5, min_new_tokens=5, beams=3))
    assert read == [(1, 2), (4, 7), (12, 1), (12, 1), (12, 1), (12, 1)]


def test_draws_follow_the_distribution_cut_at_top_p() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]]
    n = 20_000
    uniform = (torch.arange(n) + 0.5) / n
    rows = scores.expand(n, -1)
    shares = draw(rows, uniform, 1.0, 1.0).bincount(minlength=4) / n
    torch.testing.assert_close(shares, torch.tensor([0.15, 0.5, 0.05, 0.3]), atol=2e-3, rtol=0)
    # 0.5 + 0.3 reach 0.7, so that two tokens are left.
    shares = draw(rows, uniform, 1.0, 0.7).bincount(minlength=4) / n
    torch.testing.assert_close(shares, torch.tensor([0, 0.625, 0, 0.375]), atol=2e-3, rtol=0)
    shares = draw(rows, uniform, 0.5, 1.0).bincount(minlength=4) / n
    expected = torch.tensor([0.15, 0.5, 0.05, 0.3]) ** 2
    torch.testing.assert_close(shares, expected / expected.sum(), atol=2e-3, rtol=0)
    # The ends of [0, 1) take tokens that can come, also among forbidden ones and at a temperature near zero.
    blocked = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert draw(blocked, ends, 1.0, 1.0).tolist() == [1, 2]
    assert draw(blocked, ends, 1e-30, 0.5).tolist() == [2, 2]


def test_samples_of_two_seeds_differ_and_of_one_do_not() -> None:
    llm, prefix = tiny("llama", 2), prefixes(1).expand(4, -1, -1)
    generation = GenerationSpec(max_new_tokens=12, sample=True)
    a, b, c, d = (text.ids for text in written(llm, prefix, generation, [5, 6, 5, 7]))
    assert a == c and len({tuple(a), tuple(b), tuple(d)}) == 3
    with pytest.raises(ValueError, match="4 were expected, found 0"):
        written(llm, prefix, generation)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_new_tokens": 61, "max_new_tokens": 60}, "generation: min_new_tokens 61 is more than max_new_tokens 60"),
        ({"sample": True, "beams": 3}, "generation: beams 3 keep the likeliest texts, and sample draws one"),
        ({"top_p": 0.0}, "generation.top_p"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Spec.read("r2gencsr-phantom", {"generation": {"min_new_tokens": 0, **settings}})


def small_decoder(tmp_path: Path, prompt: str = "bare") -> Any:
    spec = {
        "task": "report",
        "data": {"reader": {"name": "csv", "root": str(tmp_path)}, "image_size": 32},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "decoder": {
            "name": "causal-lm", "trainable": True, "words": True, "prompt": prompt, "vocabulary": K,
            "config": {"model_type": "gpt2", "n_embd": D, "n_layer": 1, "n_head": 2, "n_positions": 64},
        },
        "training": {"steps": 1},
    }  # fmt: skip
    decoder = build(spec).task.eval().decoder
    decoder.prepare(["the heart is normal .", "no effusion is seen ."])
    return decoder


@pytest.mark.parametrize("rule", ["transformers", "r2gen"])
def test_more_beams_than_tokens_are_refused(rule: Any) -> None:
    llm, prefix = tiny("llama"), prefixes(2)
    assert len(written(llm, prefix, GenerationSpec(beams=K, max_new_tokens=3, rule=rule))) == 2
    with pytest.raises(RunError, match=f"generation.beams: {K + 1} .* vocabulary of {K} tokens; lower it"):
        written(llm, prefix, GenerationSpec(beams=K + 1, max_new_tokens=3, rule=rule))


def test_reports_of_a_decoder(tmp_path: Path) -> None:
    decoder = small_decoder(tmp_path)
    visual = torch.randn(5, 4, D, generator=torch.Generator().manual_seed(0))
    for settings in SETTINGS:
        generation = GenerationSpec(max_new_tokens=8, **settings)
        together = decoder.generate(visual, None, generation, list(range(5)))
        for i, report in enumerate(together):
            (alone,) = decoder.generate(visual[i : i + 1], None, generation, [i])
            assert report.text == alone.text
            assert len(report.log_probabilities) == len(report.tokens) <= 8
            assert "".join(report.tokens).split() == report.text.split()


def test_reading_lengths_are_those_of_a_study_s_own_words(tmp_path: Path) -> None:
    decoder = small_decoder(tmp_path, prompt="normal {indication} heart {image} the")
    texts = StudyTexts(indications=["the heart", "", "no effusion is seen ."])
    short, none, long = decoder.reading_lengths(texts, 3)
    assert none < short < long
    masks = decoder.prefix(torch.zeros(3, 4, D), None, texts)[1].sum(1)
    assert (masks - torch.tensor([short, none, long])).unique().numel() == 1
    assert small_decoder(tmp_path).reading_lengths(texts, 3) == [0, 0, 0]


def test_prompt_and_text_that_do_not_fit(tmp_path: Path) -> None:
    decoder = small_decoder(tmp_path)
    with pytest.raises(RunError, match=r"a prompt of 5 tokens and generation.max_new_tokens 60 .* which takes 64"):
        decoder.generate(torch.zeros(1, 4, D), None, GenerationSpec(max_new_tokens=60))
