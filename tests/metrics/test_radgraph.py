"""RadGraph F1: rewards by their definition, and annotations by a small random model that is saved as the published ones.

The package radgraph is compared with where it is installed.
"""

import itertools
import json
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

import medxray.metrics
from medxray.metrics.radgraph import Entity, RadGraph, rewards, words_v1, words_xl
from medxray.types import WeightsError

V1 = ["ANAT-DP", "OBS-DP", "OBS-U", "OBS-DA"]
XL = ["Observation::definitely present", "Anatomy::definitely present", "Observation::definitely absent"]
RELATIONS = ["modify", "located_at", "suggestive_of"]
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "left", "effusion", "edema", "heart", "large", "small", "is",
    "##s", ".", ",", "(", ")", "/", "%", "?", ":", "2", "5", "'",
]  # fmt: skip
TEXTS = [
    "Large left effusions.", "No edema, heart is large.", "edema", "zebra", "no no no", "left/left (small) 2.5 %.",
    "heart is large left edema . " * 9, "small\n\nleft  effusion: edema?", "Heart is large, no effusion (left). No edema.",
    "effusion effusion effusion effusion", "\x00 \x01", "no \x00 edema", "left ). %, '", "is",
]  # fmt: skip


def some_graph(rng: np.random.Generator) -> list[Entity]:
    size = int(rng.integers(0, 7))
    entities = []
    for place in range(size):
        others = rng.integers(0, size, int(rng.integers(0, 4)))
        related = tuple((RELATIONS[rng.integers(3)], int(other)) for other in others)
        entities.append(
            Entity(str(rng.choice(["lung", "Lung", "left lung", "edema"])), str(rng.choice(V1)), place, place, related)
        )
    return entities


def f1(own: list[tuple[object, ...]], true: list[tuple[object, ...]]) -> float:
    """Of two lists in which nothing stands twice, by counting."""
    hits = len([x for x in own if x in true])
    precision = hits / len(own) if own else 0.0
    recall = hits / len(true) if true else 0.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def facts(graph: list[Entity], level: str) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for e in graph:
        if level == "complete" and e.relations:
            found += [(e.tokens.lower(), e.label, kind, graph[other].tokens.lower()) for kind, other in e.relations]
        elif level == "partial" and e.relations:
            found.append((e.tokens, e.label, True))
        else:
            found.append((e.tokens, e.label))
    return list(dict.fromkeys(found))


def as_published(graph: list[Entity]) -> dict[str, dict[str, dict[str, object]]]:
    return {
        "entities": {
            str(i + 1): {
                "tokens": e.tokens, "label": e.label, "start_ix": e.start, "end_ix": e.end,
                "relations": [[kind, str(other + 1)] for kind, other in e.relations],
            }
            for i, e in enumerate(graph)
        }
    }  # fmt: skip


def test_rewards_are_f1_of_what_two_graphs_hold():
    rng = np.random.default_rng(0)
    graphs = [some_graph(rng) for _ in range(600)]
    pairs = [
        *itertools.pairwise(graphs),
        *((graph, graph) for graph in graphs),
        ([], []),
        (graphs[0], []),
        ([], graphs[0]),
    ]
    for own, true in pairs:
        expected = [
            f1(facts(own, level), facts(true, level)) if own and true else 0
            for level in ("simple", "partial", "complete")
        ]
        assert rewards(own, true) == pytest.approx(expected, abs=1e-12)
    assert {rewards(graph, graph) for graph in graphs} == {(0, 0, 0), (1, 1, 1)}


def test_rewards_of_one_pair():
    report = [Entity("effusion", "OBS-DP", 1, 1, (("located_at", 1),)), Entity("Left", "ANAT-DP", 0, 0)]
    assert rewards(report, [report[0], Entity("left", "ANAT-DP", 0, 0)]) == (0.5, 0.5, 0.5)
    assert rewards(report, [Entity("effusion", "OBS-DP", 1, 1), report[1]]) == (1, 0.5, 0.5)
    other = [Entity("effusion", "OBS-DP", 1, 1, (("modify", 1),)), report[1]]
    assert rewards(report, other) == (1, 1, 0.5)


def test_rewards_equal_the_package():
    theirs = pytest.importorskip("radgraph.rewards")
    rng = np.random.default_rng(1)
    for _ in range(5000):
        own, true = some_graph(rng), some_graph(rng)
        expected = theirs.compute_reward(as_published(own), as_published(true), "all")
        assert rewards(own, true) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "v1", "xl"),
    [
        ("No  edema.", "No edema .", "No edema ."),
        ("2.5cm (left)/right", "2 . 5cm ( left ) / right", "2 . 5cm ( left )/ right"),
        ("x-ray: 50%. T11-L2", "x-ray : 50% . T11-L2", "x - ray : 50 % . T11 - L2"),
        ("(small). ends.' 5%, (6%)", "( small ) . ends . ' 5% , ( 6% )", "( small ) . ends . ' 5 % , ( 6 % )"),
        (r"a\nb\f c\u2122d \"e", r"a\nb\f c\u2122d \"e", "a b c d `` e"),
        ("", "", ""),
        (" \n\t", "", ""),
        ("œdème?!", "œdème ? !", "œdème ?!"),
    ],
)
def test_words(text, v1, xl):
    assert " ".join(words_v1(text)) == v1
    assert " ".join(words_xl(text)) == xl


def published(folder: Path, kinds: list[str], seed: int = 0, length: int = 24, packed: bool = False) -> Path:
    """A small random model in the files and names of the published ones."""
    torch.manual_seed(seed)
    dataset, D, F, H = "radgraph", 32, 5, 12
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    state = {
        f"_embedder.token_embedder_bert._matched_embedder.transformer_model.{key}": value
        for key, value in BertModel(config).state_dict().items()
    }
    state["_embedder.token_embedder_bert._matched_embedder.transformer_model.embeddings.position_ids"] = torch.arange(
        64
    )[None]
    span = 2 * D + F
    state["_endpoint_span_extractor._span_width_embedding.weight"] = torch.randn(4, F)

    def linear(name: str, inner: int, outer: int, scale: float = 1.0) -> None:
        state[f"{name}.weight"] = torch.randn(outer, inner) * scale / math.sqrt(inner)
        state[f"{name}.bias"] = torch.randn(outer) * 0.3 - 0.1

    ner, relation = f"{dataset}__ner_labels", f"{dataset}__relation_labels"
    linear(f"_ner._ner_scorers.{ner}.0._module._linear_layers.0", span, H)
    linear(f"_ner._ner_scorers.{ner}.0._module._linear_layers.1", H, H)
    linear(f"_ner._ner_scorers.{ner}.1._module", H, len(kinds))
    linear(f"_relation._mention_pruners.{relation}._scorer.0._module._linear_layers.0", span, H)
    linear(f"_relation._mention_pruners.{relation}._scorer.0._module._linear_layers.1", H, H)
    linear(f"_relation._mention_pruners.{relation}._scorer.1._module", H, 1)
    linear(f"_relation._relation_feedforwards.{relation}._linear_layers.0", 3 * span, H)
    linear(f"_relation._relation_feedforwards.{relation}._linear_layers.1", H, H)
    linear(f"_relation._relation_scorers.{relation}", H, len(RELATIONS))
    linear("_coref._mention_pruner._scorer.0._module._linear_layers.0", span, H)
    transformer = {"model_name": str(folder / "encoder"), "max_length": length}
    plain = folder / "plain" if packed else folder
    (plain / "vocabulary").mkdir(parents=True)
    torch.save(state, plain / "weights.th")
    (plain / "vocabulary" / f"{ner}.txt").write_text("\n".join(["", *kinds]) + "\n")
    (plain / "vocabulary" / f"{relation}.txt").write_text("\n".join(RELATIONS))
    (plain / "vocabulary" / "non_padded_namespaces.txt").write_text("*labels\n*tags")
    settings = {
        "dataset_reader": {"type": "dygie", "max_span_width": 4, "token_indexers": {"bert": transformer}},
        "model": {
            "type": "dygie", "embedder": {"token_embedders": {"bert": transformer}}, "initializer": {},
            "module_initializer": {}, "feature_size": F, "max_span_width": 4, "target_task": "relation",
            "feedforward_params": {"num_layers": 2, "hidden_dims": H, "dropout": 0.4},
            "loss_weights": {"ner": 0.2, "relation": 1.0, "coref": 0.0, "events": 0.0},
            "modules": {"coref": {"coref_prop": 0}, "relation": {"spans_per_word": 0.5}},
        },
    }  # fmt: skip
    (plain / "config.json").write_text(json.dumps(settings))
    if packed:
        with tarfile.open(folder / "radgraph.tar.gz", "w:gz") as archive:
            for file in ("config.json", "weights.th", "vocabulary"):
                archive.add(plain / file, file)
    config.save_pretrained(folder / "encoder")
    (folder / "encoder" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def pieces(word: str) -> list[int]:
    """Of a word in the small vocabulary; an s at its end is a piece of its own, and control characters are nothing."""
    word = word.lower().replace("\x00", "").replace("\x01", "")
    parts = re.findall(r"\w+|[^\w\s]", word)
    found = []
    for part in parts:
        if part not in WORDS and part.endswith("s") and part[:-1] in WORDS:
            found += [WORDS.index(part[:-1]), WORDS.index("##s")]
        else:
            found.append(WORDS.index(part) if part in WORDS else 1)
    return found


@torch.no_grad()
def by_hand(folder: Path, report: list[str], kinds: list[str], length: int = 24) -> list[Entity]:
    """One report at a time, one span at a time."""
    state = torch.load(folder / "weights.th")
    prefix = "_embedder.token_embedder_bert._matched_embedder.transformer_model."
    bert = BertModel(BertConfig.from_pretrained(folder / "encoder")).eval()
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    bert.load_state_dict({key: value for key, value in own.items() if "position_ids" not in key})
    ids = [i for word in report for i in pieces(word)]
    vectors = []
    for start in range(0, len(ids), length - 2):
        part = torch.tensor([[2, *ids[start : start + length - 2], 3]])
        vectors += list(bert(input_ids=part).last_hidden_state[0, 1:-1])
    words, place = [], 0
    for word in report:
        many = len(pieces(word))
        words.append(torch.stack(vectors[place : place + many]).mean(0) if many else torch.zeros(32))
        place += many

    def scores(vector: torch.Tensor, inner: str, last: str) -> torch.Tensor:
        for i in range(2):
            vector = (
                state[f"{inner}_linear_layers.{i}.weight"] @ vector + state[f"{inner}_linear_layers.{i}.bias"]
            ).relu()
        return state[f"{last}.weight"] @ vector + state[f"{last}.bias"]

    ner, relation = "_ner._ner_scorers.radgraph__ner_labels", "radgraph__relation_labels"
    pruner = f"_relation._mention_pruners.{relation}._scorer"
    spans = [(a, b) for a in range(len(report)) for b in range(a, min(a + 4, len(report)))]
    widths = state["_endpoint_span_extractor._span_width_embedding.weight"]
    vector = {span: torch.cat([words[span[0]], words[span[1]], widths[span[1] - span[0]]]) for span in spans}
    mention = {span: float(scores(vector[span], f"{pruner}.0._module.", f"{pruner}.1._module")) for span in spans}
    kind = {}
    for span in spans:
        score = scores(vector[span], f"{ner}.0._module.", f"{ner}.1._module")
        if score.max() > 0:
            kind[span] = kinds[int(score.argmax())]
    kept = sorted(spans, key=lambda span: -mention[span])[: math.ceil(len(report) / 2)]
    found, entities = [], list(kind)
    for span in entities:
        related = []
        for number, other in enumerate(entities):
            if span in kept and other in kept:
                pair = torch.cat([vector[span], vector[other], vector[span] * vector[other]])
                score = scores(
                    pair, f"_relation._relation_feedforwards.{relation}.", f"_relation._relation_scorers.{relation}"
                ) + (mention[span] + mention[other])
                if score.max() > 0:
                    related.append((RELATIONS[int(score.argmax())], number))
        found.append(Entity(" ".join(report[span[0] : span[1] + 1]), kind[span], *span, tuple(related)))
    return found


@pytest.mark.parametrize(("kinds", "cut"), [(V1, words_v1), (XL, words_xl)], ids=["radgraph", "radgraph-xl"])
def test_annotations_are_those_of_the_model(tmp_path, kinds, cut):
    folder = published(tmp_path, kinds)
    found = RadGraph(str(folder), batch_size=5).annotate(TEXTS)
    assert found == [by_hand(folder, cut(text), kinds) for text in TEXTS]
    entities = [entity for one in found for entity in one]
    assert len({entity.label for entity in entities}) > 1 and any(entity.relations for entity in entities)
    assert any(entity.end > entity.start for entity in entities) and any(not entity.relations for entity in entities)
    assert len(words_v1(TEXTS[6])) > 24  # longer than the encoder takes at once


def test_an_archive_is_read_as_it_is(tmp_path):
    packed = published(tmp_path / "packed", V1, packed=True)
    plain = published(tmp_path / "plain", V1)
    assert RadGraph(str(packed)).annotate(TEXTS) == RadGraph(str(plain)).annotate(TEXTS)


def test_scores(tmp_path):
    metric = medxray.metrics.get("radgraph")(weights=str(published(tmp_path, V1)))
    changed = [text if i % 2 else f"{text} left" for i, text in enumerate(TEXTS)]
    predictions, references = [*TEXTS, "", "", "edema", " "], [*changed, "", "edema", "", "edema"]
    rows = metric.statistics(predictions, references)
    found = metric.annotate([*predictions, *references])
    n = len(predictions)
    assert rows.tolist() == [list(rewards(a, b)) for a, b in zip(found[:n], found[n:], strict=True)]
    assert (rows[-4:] == 0).all() and len(np.unique(rows)) > 3
    scores = metric.compute(predictions=predictions, references=references)
    assert list(scores) == ["radgraph-simple", "radgraph-partial", "radgraph-complete"]
    assert list(scores.values()) == pytest.approx(rows.mean(0))
    assert list(metric.compute(predictions=["no edema"], references=["no edema"]).values()) in ([1, 1, 1], [0, 0, 0])
    assert metric.statistics([], []).shape == (0, 3)


def test_equal_texts_are_read_once(tmp_path):
    metric = RadGraph(str(published(tmp_path, V1)), batch_size=4)
    expected = metric.annotate(TEXTS)
    read: list[str] = []
    annotator = metric._annotator
    assert annotator is not None
    metric._annotator = lambda texts: read.extend(texts) or annotator(texts)  # type: ignore[assignment]
    assert metric.annotate([*TEXTS[::-1], "left heart", "left heart"]) == [
        *expected[::-1],
        *annotator(["left heart"] * 2),
    ]
    assert read == ["left heart"]


def test_what_is_missing_is_named_with_its_source(tmp_path):
    with pytest.raises(WeightsError, match=r"no folder .*absent; .*StanfordAIMI/RRG_scorers.*PhysioNet"):
        RadGraph(str(tmp_path / "absent"))
    folder = published(tmp_path, V1, packed=True)
    (folder / "encoder" / "vocab.txt").rename(tmp_path / "kept")
    with pytest.raises(
        WeightsError, match=r"lacks encoder/tokenizer.json or encoder/vocab.txt; fetch .*the same encoder"
    ):
        RadGraph(str(folder))
    (tmp_path / "kept").rename(folder / "encoder" / "vocab.txt")
    (folder / "encoder" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"lacks encoder/config.json; .*BiomedNLP-PubMedBERT"):
        RadGraph(str(folder))
    BertConfig(vocab_size=8, hidden_size=32, num_attention_heads=2).save_pretrained(folder / "encoder")
    with pytest.raises(WeightsError, match="do not fit"):
        RadGraph(str(folder)).annotate(["edema"])
    (folder / "second.tar.gz").write_bytes(b"no archive")
    with pytest.raises(WeightsError, match=r"holds 2 archives \(radgraph.tar.gz, second.tar.gz\); keep one"):
        RadGraph(str(folder)).annotate(["edema"])
    (folder / "radgraph.tar.gz").unlink()
    with pytest.raises(WeightsError, match=r"second.tar.gz cannot be unpacked"):
        RadGraph(str(folder)).annotate(["edema"])
    (folder / "second.tar.gz").unlink()
    with pytest.raises(WeightsError, match=r"lacks \*.tar.gz or weights.th; .*radgraph-xl.tar.gz"):
        RadGraph(str(folder))


def broken(folder: Path, what: str) -> str:
    """Breaks one thing, and tells what the message shall say."""
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "weights.th")
    if what == "config.json":
        (folder / what).unlink()
        return r"lacks config.json"
    if what == "no json":
        (folder / "config.json").write_text("{")
        return "does not hold RadGraph: Expecting"
    if what == "setting":
        del config["model"]["feature_size"]
        (folder / "config.json").write_text(json.dumps(config))
        return "config.json .* no 'feature_size'"
    if what == "coreference":
        config["model"]["modules"]["coref"]["coref_prop"] = 2
        (folder / "config.json").write_text(json.dumps(config))
        return "coreference"
    if what == "labels":
        (folder / "vocabulary" / "radgraph__ner_labels.txt").unlink()
        return r"0 files \*__ner_labels.txt, expected one"
    if what == "no empty label":
        (folder / "vocabulary" / "radgraph__ner_labels.txt").write_text("OBS-DP\n")
        return "begins with 'OBS-DP'"
    if what == "relations":
        (folder / "vocabulary" / "radgraph__relation_labels.txt").unlink()
        return "does not hold RadGraph: .*radgraph__relation_labels.txt"
    if what == "tensor":
        del state["_relation._relation_scorers.radgraph__relation_labels.bias"]
        torch.save(state, folder / "weights.th")
        return r"1 missing keys \(relation.4.bias\)"
    if what == "label more":
        with (folder / "vocabulary" / "radgraph__ner_labels.txt").open("a") as file:
            file.write("OTHER\n")
        return r"entity.4.weight is \(4, 12\) in the file and \(5, 12\)"
    if what == "tokens":
        with (folder / "encoder" / "vocab.txt").open("a") as file:
            file.write("more\nand more\n")
        return f"has {len(WORDS) + 2} tokens, and the weights have fewer"
    if what == "tokenizer":
        (folder / "encoder" / "vocab.txt").unlink()
        (folder / "encoder" / "tokenizer.json").write_text("{}")
        return "encoder cannot be read"
    torch.save({"a": Trap()}, folder / "weights.th")
    return "not opened"


class Trap:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    "what",
    [
        "config.json", "no json", "setting", "coreference", "labels", "no empty label", "relations", "tensor", "label more",
        "tokens", "tokenizer", "trap",
    ],
)  # fmt: skip
def test_what_is_not_radgraph_is_refused(tmp_path, what):
    folder = published(tmp_path, V1)
    message = broken(folder, what)
    with pytest.raises(WeightsError, match=message):
        RadGraph(str(folder)).annotate(["edema"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["radgraph", "radgraph-xl"])
def test_annotations_and_scores_equal_the_package(tmp_path, monkeypatch, kind):
    package = pytest.importorskip("radgraph")
    from transformers import PreTrainedTokenizerBase

    # Two methods that the package calls and transformers 5 has no more.
    monkeypatch.setattr(PreTrainedTokenizerBase, "encode_plus", lambda own, *a, **k: own(*a, **k), raising=False)
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "build_inputs_with_special_tokens",
        lambda own, ids: [own.cls_token_id, *ids, own.sep_token_id], raising=False,
    )  # fmt: skip
    kinds = V1 if kind == "radgraph" else XL
    folder = published(tmp_path / kind, kinds)
    for file in (folder / "vocabulary").glob("radgraph__*"):
        file.rename(file.with_name(file.name.replace("radgraph__", f"{kind}__")))
    state = torch.load(folder / "weights.th")
    state = {
        key.replace("radgraph__", f"{kind}__"): value for key, value in state.items() if not key.startswith("_coref")
    }
    config = json.loads((folder / "config.json").read_text())
    config["model"]["modules"] = {
        "coref": {"spans_per_word": 0.3, "max_antecedents": 100, "coref_prop": 0}, "ner": {},
        "relation": {"spans_per_word": 0.5},
        "events": {"trigger_spans_per_word": 0.3, "argument_spans_per_word": 0.8, "loss_weights": {"trigger": 1, "arguments": 1}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "weights.th")
    # What the package has and does not use keeps its random values.
    load = torch.nn.Module.load_state_dict
    monkeypatch.setattr(
        torch.nn.Module, "load_state_dict", lambda own, given, strict=True: load(own, given, strict=False)
    )
    theirs = package.F1RadGraph(reward_level="all", model_type=kind, model_cache_dir=str(tmp_path))
    rng = np.random.default_rng(0)
    texts = [*(text for text in TEXTS if "\x00" not in text)]
    texts += [" ".join(rng.choice(" ".join(texts).split(), rng.integers(2, 60))) for _ in range(40)]
    _, scores, predicted, referred = theirs(refs=texts[::-1], hyps=texts)
    ours = RadGraph(str(folder))
    np.testing.assert_allclose(ours.statistics(texts, texts[::-1]), np.array(scores).T, atol=1e-12)
    assert [as_published(graph)["entities"] for graph in ours.annotate(texts)] == [one["entities"] for one in predicted]
    assert [as_published(graph)["entities"] for graph in ours.annotate(texts[::-1])] == [
        one["entities"] for one in referred
    ]
