"""R2Gen's decoder: its words, its memory as a plain recurrence, its loss, and its cached decoding beside one that reads
the whole beginning of a report again for every word."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import medxray
from medxray.llm.memory_transformer import MemoryTransformer, RelationalMemory
from medxray.spec import GenerationSpec
from medxray.types import DataError, RunError, WeightsError

REPORTS = [
    "the heart is normal . the lungs are clear .",
    "the heart is enlarged . small effusion on the left .",
    "the lungs are clear .",
    "no effusion .",
]


def decoder(seed: int = 0, scale: float = 3.0, **settings: int) -> MemoryTransformer:
    torch.manual_seed(seed)
    made = MemoryTransformer(seed, **{"width": 16, "hidden": 24, "heads": 2, "layers": 2, "threshold": 1, **settings})
    made.prepare(REPORTS)
    # Sharper than at the start, so that beams differ.
    made.head.weight.data *= scale
    return made.eval()


def visual(studies: int, seed: int = 1, tokens: int = 6, width: int = 16) -> Tensor:
    return torch.randn(studies, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_the_vocabulary_is_that_of_frequent_training_words(tmp_path: Path) -> None:
    made = MemoryTransformer(0, width=16, heads=2, layers=1, threshold=2)
    with pytest.raises(RunError, match="no vocabulary yet"):
        made.count(["the heart ."])
    made.prepare(REPORTS)
    assert made.words == sorted(["the", "heart", "is", "lungs", "are", "clear", "effusion", ".", "<unk>"])
    assert [made.words[i - 1] for i in made._targets(["the left heart ."])[0][:-1]] == ["the", "<unk>", "heart", "."]
    assert made._targets(["the heart ."])[0][-1] == 0
    assert made.embedding.weight.shape == (10, 16) and made.head.weight.shape == (10, 16)
    made.save(tmp_path)
    again = MemoryTransformer(1, width=16, heads=2, layers=1, threshold=9)
    again.restore(tmp_path)
    assert again.words == made.words
    again.load_state_dict(made.state_dict())
    (tmp_path / "vocabulary.json").write_text("[1]")
    with pytest.raises(RunError, match=r"vocabulary\.json: expected a list of words"):
        again.restore(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(RunError, match=r"vocabulary\.json cannot be read"):
        again.restore(tmp_path)
    with pytest.raises(DataError, match=r"decoder.threshold 9: .*the most frequent one 6 times"):
        again.prepare(REPORTS)


def test_the_memory_is_the_recurrence_of_the_paper() -> None:
    torch.manual_seed(0)
    memory, words, heads = RelationalMemory(8, 3, 2, 0.0), torch.randn(2, 5, 8), 2
    found, last = memory(words)
    attention = memory.attention
    for b in range(2):
        M = torch.eye(3, 8)
        for t in range(5):
            x = words[b, t]
            q, kv = attention.query(M), torch.cat([M, x[None]])
            k, v = attention.key(kv), attention.value(kv)
            mixed = torch.cat(
                [
                    (qh @ kh.T / (8 / heads) ** 0.5).softmax(1) @ vh
                    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
                ],
                1,
            )
            new = M + attention.out(mixed)
            new = new + memory.mlp(new)
            let_in, keep = (memory.gate_word(x) + memory.gate_memory(M.tanh())).sigmoid().chunk(2, 1)
            M = let_in * new.tanh() + keep * M
            torch.testing.assert_close(found[b, t], M.flatten(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(last[b], M, atol=1e-6, rtol=1e-5)
    first, middle = memory(words[:, :2])
    second, _ = memory(words[:, 2:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), found, atol=1e-6, rtol=1e-5)


def test_the_loss_is_a_sum_over_the_words_and_ends_of_the_reports() -> None:
    made, images = decoder(), visual(4)
    total = made.loss(images, None, REPORTS)
    single = [made.loss(images[b : b + 1], None, REPORTS[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(total, torch.stack(single).sum())
    assert made.count(REPORTS) == sum(len(report.split()) + 1 for report in REPORTS)
    by_hand = 0.0
    for b, report in enumerate(REPORTS):
        ids = [made.ids[word] for word in report.split()]
        log_p = made(images[b : b + 1], None, torch.tensor([[0, *ids]])).log_softmax(-1)[0]
        by_hand -= sum(log_p[t, i].item() for t, i in enumerate([*ids, 0]))
    assert total.item() == pytest.approx(by_hand, rel=1e-5)
    made.max_length = 5  # the start sign and four words: what is cut has no end
    assert made.count(REPORTS) == 4 + 4 + 4 + 4
    assert made._targets(REPORTS)[2] == [made.ids[word] for word in ("the", "lungs", "are", "clear")]
    assert made._targets(REPORTS)[3][-1] == 0


def test_every_parameter_learns_and_dropout_follows_the_seed() -> None:
    made = decoder().train()
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(made.loss(visual(4), visual(4, 2, 3), REPORTS))
    assert torch.equal(*losses)
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in made.parameters())
    assert made.loss(visual(4), visual(4, 2, 3), REPORTS) != losses[0], "dropout"


def plain(made: MemoryTransformer, images: Tensor, context: Tensor | None, beams: int, longest: int) -> list[list[int]]:
    """R2Gen's beam search, study by study, over logits that are computed from the start sign for every word."""
    found = []
    for b in range(len(images)):
        running: list[tuple[list[int], float]] = [([], 0.0)]
        whole: list[tuple[float, list[int]]] = []
        own = None if context is None else context[b : b + 1]
        for t in range(longest):
            candidates = []
            for ids, total in running:
                log_p = made(images[b : b + 1], own, torch.tensor([[0, *ids]]))[0, -1].log_softmax(-1)
                candidates += [([*ids, k], total + p) for k, p in enumerate(log_p.tolist())]
            running = sorted(candidates, key=lambda c: -c[1])[:beams]
            for n, (ids, total) in enumerate(running):
                if ids[-1] == 0 or t == longest - 1:
                    whole.append((total, ids))
                    running[n] = (ids, total - 1000)
        found.append(max(whole, key=lambda w: w[0])[1])
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_cached_decoding_writes_what_recomputing_writes(seed: int, beams: int) -> None:
    made, images = decoder(seed), visual(5, seed + 10)
    context = visual(5, seed + 20, 2) if seed % 2 else None
    # Ends come at different steps.
    made.head.bias.data[0] += 2.0
    generation = GenerationSpec(rule="r2gen", beams=beams, max_new_tokens=12)
    reports = made.generate(images, context, generation)
    expected = plain(made, images, context, beams, 12)
    found = [[made.ids[token.strip()] if token else 0 for token in report.tokens] for report in reports]
    assert found == expected
    assert len({len(ids) for ids in expected}) > 1, "nothing is tested of studies that end early"
    for b, report in enumerate(reports):
        own = None if context is None else context[b : b + 1]
        ids = torch.tensor([[0, *expected[b]]])
        log_p = made(images[b : b + 1], own, ids[:, :-1].clone()).log_softmax(-1)[0].gather(1, ids[0, 1:, None])[:, 0]
        assert report.log_probabilities == pytest.approx(log_p.tolist(), abs=1e-4)
        assert report.text == " ".join(made.words[i - 1] for i in expected[b] if i) and "".join(report.tokens) == report.text
        alone = made.generate(images[b : b + 1], own, generation)[0]
        assert alone.text == report.text, "hangs on the batch"


@torch.no_grad()
def test_an_earlier_trigram_costs_without_forbidding() -> None:
    """As R2Gen's release: 2 * 0.693 less for each time that it came."""
    made, images = decoder(2), visual(3)
    made.head.bias.data[0] -= 20
    texts = {}
    for n in (0, 3):
        generation = GenerationSpec(rule="r2gen", max_new_tokens=20, no_repeat_ngram=n)
        texts[n] = [report.text.split() for report in made.generate(images, None, generation)]
    for b in range(3):
        words: list[str] = []
        for _ in range(20):
            ids = torch.tensor([[0, *(made.ids[w] for w in words)]])
            log_p = made(images[b : b + 1], None, ids)[0, -1].log_softmax(-1)
            for i in range(len(words) - 2):
                if words[i : i + 2] == words[-2:]:
                    log_p[made.ids[words[i + 2]]] -= 2 * 0.693
            words.append(made.words[int(log_p.argmax()) - 1])
        assert texts[3][b] == words
    assert texts[0] != texts[3]


@torch.no_grad()
def test_attention_tells_where_each_word_looked() -> None:
    made, images = decoder(), visual(2)
    reports = ["the heart is normal .", "no effusion ."]
    rows = made.attend(images, visual(2, 7, 3), reports)
    assert [tuple(row.shape) for row in rows] == [(5, 6), (3, 6)]
    for row in rows:
        torch.testing.assert_close(row.sum(1), torch.ones(len(row)))
    # A word's row does not hang on those after it, nor on the other study.
    torch.testing.assert_close(made.attend(images[:1], visual(2, 7, 3)[:1], ["the heart"])[0], rows[0][:2])
    # Where keys are made equal, it looks everywhere alike.
    made.decoder[-1].cross.key.weight.data.zero_()
    torch.testing.assert_close(made.attend(images, None, reports)[0], torch.full((5, 6), 1 / 6))


def test_a_checkpoint_of_another_vocabulary_is_refused() -> None:
    made = decoder()
    with pytest.raises(WeightsError, match=r"made for 37 words, .* give 15; .*decoder.threshold"):
        made.adopt({"encoder_decoder.logit.bias": torch.zeros(38)}, "model_best.pth")
    with pytest.raises(WeightsError, match="missing keys"):
        made.adopt({"encoder_decoder.logit.bias": torch.zeros(16)}, "model_best.pth")


def test_a_pipeline_fits_saves_and_writes_the_same_again(phantom: Path, tmp_path: Path) -> None:
    spec = {
        "task": "report",
        "output": str(tmp_path / "run"),
        "data": {"reader": {"name": "csv", "root": str(phantom)}, "image_size": 32, "max_studies": 24, "crop_from": 40},
        "encoder": {"name": "vit", "width": 16, "depth": 1, "heads": 2, "patch": 16},
        "projector": "linear-relu",
        "retriever": {"name": "fixed", "positives": 1, "negatives": 1, "pools": {"by": "random"}},
        "decoder": {"name": "memory-transformer", "width": 16, "hidden": 16, "heads": 2, "layers": 1},
        "training": {"steps": 4, "batch_size": 8, "optimiser": "adam", "amsgrad": True, "clip_value": 0.1, "schedule": "step"},
        "generation": {"rule": "r2gen", "beams": 3, "max_new_tokens": 8},
        "metrics": ["bleu"],
    }  # fmt: skip
    pipeline = medxray.build(spec).fit(progress=False)
    losses = [line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert losses
    val = pipeline.images("val")
    batch = val.collate([val[i] for i in range(3)])
    loaded = medxray.load(tmp_path / "run")
    first, second = (p.task.predict(batch) for p in (pipeline, loaded))
    assert [(p.text, p.log_probabilities) for p in first] == [(p.text, p.log_probabilities) for p in second]
    assert loaded.task.decoder.words == pipeline.task.decoder.words
