"""R2Gen's report decoder: an encoder-decoder with a relational memory that conditions the decoder's norms."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medxray import disk
from medxray.llm import Generated, ReportDecoder, StudyTexts
from medxray.llm.decoding import Writer, decode
from medxray.types import DataError, RunError, WeightsError
from medxray.weights import load_into
from medxray.weights.families import rename

if TYPE_CHECKING:
    from medxray.spec import GenerationSpec

IGNORED = -100
END, UNKNOWN = 0, "<unk>"
WORDS = "vocabulary.json"
Count = Annotated[int, Field(gt=0)]


class MemoryTransformer(ReportDecoder):
    """R2Gen (EMNLP 2020): a Transformer learned from nothing over visual tokens, with words as its tokens.

    A memory of a few slots reads the words as they come, and tells every norm of the decoder its scale and shift. Context
    tokens stand before the visual ones in the encoder.

    Args:
        width: D of its tokens.
        hidden: width inside the feed-forward layers.
        heads: of every attention, the memory's too.
        layers: of the encoder, and of the decoder.
        slots: of the memory.
        dropout: of the layers, their attention and the memory's.
        threshold: how often a word must stand in the training reports to be learned; 3 for IU X-Ray, 10 for MIMIC-CXR.
        max_length: tokens of a report that are learned at most, its start sign with them; what is cut has no end sign.
    """

    def __init__(
        self,
        seed: int,
        width: Count = 512,
        hidden: Count = 512,
        heads: Count = 8,
        layers: Count = 3,
        slots: Count = 3,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        threshold: Count = 3,
        max_length: Annotated[int, Field(gt=1)] = 60,
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"width must be even and divisible by heads, found {width} and {heads}")
        self.width, self.threshold, self.max_length = width, threshold, max_length
        self.words: list[str] = []
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(width, hidden, heads, dropout) for _ in range(layers))
        self.encoder_norm = Norm(width)
        self.memory = RelationalMemory(width, slots, heads, dropout)
        self.decoder = nn.ModuleList(DecoderLayer(width, hidden, heads, slots * width, dropout) for _ in range(layers))
        self.decoder_norm = Norm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self._take([])

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """Those of `decoder`, by their type."""
        return list(self.decoder)  # type: ignore[arg-type]

    def _take(self, words: list[str]) -> None:
        """Makes the layers that a vocabulary needs: ids from 1, and 0 for start, end and padding."""
        device = next(self.memory.parameters()).device
        self.words = words
        self.ids = {word: i for i, word in enumerate(words, 1)}
        self.embedding = nn.Embedding(len(words) + 1, self.width, device=device)
        nn.init.xavier_uniform_(self.embedding.weight)
        self.head = nn.Linear(self.width, len(words) + 1, device=device)

    def prepare(self, reports: Sequence[str]) -> None:
        """Learns the vocabulary.

        Raises:
            DataError: no word is frequent enough.
        """
        count = Counter(word for report in reports for word in report.split())
        words = [word for word, n in count.items() if n >= self.threshold]
        if not words:
            most = max(count.values(), default=0)
            raise DataError(
                f"decoder.threshold {self.threshold}: no word stands so often in the {len(reports)} training reports "
                f"(the most frequent one {most} times); lower it"
            )
        self._take(sorted({*words, UNKNOWN}))

    def save(self, folder: Path) -> None:
        disk.write(folder / WORDS, json.dumps(self._ready(), ensure_ascii=False, indent=0))

    def restore(self, folder: Path) -> None:
        try:
            words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{folder / WORDS} cannot be read: {error}; restore the file, or fit again") from None
        if not (isinstance(words, list) and UNKNOWN in words and all(isinstance(word, str) for word in words)):
            raise RunError(f"{folder / WORDS}: expected a list of words with {UNKNOWN!r}; restore the file, or fit again")
        self._take(words)

    def count(self, reports: Sequence[str]) -> int:
        return sum(len(ids) for ids in self._targets(reports))

    @property
    def limit(self) -> str:  # type: ignore[override]
        return f"{self.max_length - 1} words, words that it does not know as {UNKNOWN}"

    def cut(self, reports: Sequence[str]) -> list[str]:
        words = self._ready()
        return [" ".join(words[i - 1] for i in ids if i != END) for ids in self._targets(reports)]

    def loss(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> Tensor:
        pieces = [torch.tensor(ids) for ids in self._targets(reports)]
        targets = nn.utils.rnn.pad_sequence(pieces, batch_first=True, padding_value=IGNORED).to(visual.device)
        before = F.pad(targets[:, :-1].clamp(min=END), (1, 0), value=END)
        logits = self(visual, context, before)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def forward(self, visual: Tensor, context: Tensor | None, ids: Tensor) -> Tensor:
        """Logits (B, L, K) of the words that follow ids (B, L), the first of which is the start sign.

        Args:
            visual: (B, N, D).
            context: (B, T, D) or None.
            ids: int64; 0 after the first one is padding, which no word looks at.
        """
        L = ids.shape[1]
        source = self.encode(visual, context)
        seen = (ids > END).index_fill(1, torch.zeros(1, dtype=torch.long, device=ids.device), True)
        mask = seen[:, None, None] & torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
        memory = self.memory(self._embed(ids, 0))[0]
        x = self._embed(ids, 0)
        for layer in self.decoder_layers:
            x, _ = layer(x, memory, layer.source(source), mask=mask)
        logits: Tensor = self.head(self.decoder_norm(x))
        return logits

    def encode(self, visual: Tensor, context: Tensor | None) -> Tensor:
        """visual (B, N, D) after context (B, T, D) -> (B, T + N, D), what the decoder reads."""
        x = visual if context is None else torch.cat([context.to(visual.dtype), visual], dim=1)
        for layer in self.encoder:
            x = layer(x)
        encoded: Tensor = self.encoder_norm(x)
        return encoded

    @torch.no_grad()
    def generate(
        self,
        visual: Tensor,
        context: Tensor | None,
        generation: GenerationSpec,
        seeds: Sequence[int] = (),
        texts: StudyTexts | None = None,
    ) -> list[Generated]:
        words = self._ready()
        reports = []
        for ids, log_probabilities in decode(MemoryWriter(self, visual, context), generation, END, seeds):
            text = [words[i - 1] if i != END else "" for i in ids]
            tokens = [f" {word}" if word and i else word for i, word in enumerate(text)]
            reports.append(Generated("".join(tokens), log_probabilities, tokens))
        return reports

    @torch.no_grad()
    def attend(
        self, visual: Tensor, context: Tensor | None, reports: Sequence[str], texts: StudyTexts | None = None
    ) -> list[Tensor]:
        """The last layer's attention to the image, the mean over its heads (R2Gen, section 5.4)."""
        taken: list[tuple[Tensor, KeysValues]] = []
        last = self.decoder_layers[-1]
        hook = last.cross.register_forward_pre_hook(lambda _, inputs: taken.append((inputs[0], inputs[1])))
        lines = [self._encoded(report) for report in reports]
        ids = nn.utils.rnn.pad_sequence([torch.tensor([END, *line]) for line in lines], batch_first=True)
        try:
            self(visual, context, ids.to(visual.device))
        finally:
            hook.remove()
        (x, (keys, _)), = taken
        weights = last.cross.weights(x, keys).mean(1)[..., -visual.shape[1] :].float()
        weights = weights / weights.sum(-1, keepdim=True)
        return [row[: len(line)] for row, line in zip(weights, lines, strict=True)]

    def adopt(self, state: dict[str, Tensor], source: str = "the checkpoint") -> set[str]:
        """Takes the decoder's part of R2Gen's own checkpoint. It holds no words: they are learned before, by `prepare`.

        Args:
            state: tensors by R2Gen's names; those of other parts are left alone.
            source: what messages call it.

        Returns:
            The keys that were taken.

        Raises:
            WeightsError: keys that are missing, or shapes that disagree, such as those of another vocabulary.
        """
        names = own_names(state)
        words = state.get("encoder_decoder.logit.bias")
        if words is not None and len(words) != len(self.words) + 1:
            raise WeightsError(
                f"weights {source}: made for {len(words) - 1} words, and the training reports give {len(self.words)}; "
                "the annotation, data.cleaning and decoder.threshold must be those that it was trained with"
            )
        load_into(self, {name: state[key] for key, name in names.items()}, source)
        return set(names)

    def _embed(self, ids: Tensor, place: int) -> Tensor:
        """ids (B, L), the first at `place` of its report -> (B, L, D)."""
        L, D = ids.shape[1], self.width
        positions = _positions(_power_of_two(place + L), D, ids.device)[place : place + L]
        embedded: Tensor = self.dropout(self.embedding(ids) * math.sqrt(D) + positions)
        return embedded

    def _ready(self) -> list[str]:
        if not self.words:
            raise RunError("the decoder has no vocabulary yet; fit the pipeline or load a run folder first")
        return self.words

    def _encoded(self, report: str) -> list[int]:
        unknown = self.ids[UNKNOWN]
        return [self.ids.get(word, unknown) for word in report.split()]

    def _targets(self, reports: Sequence[str]) -> list[list[int]]:
        self._ready()
        return [[*self._encoded(report), END][: self.max_length - 1] for report in reports]


class KeysValues(NamedTuple):
    """What an attention looks at: two of (B, heads, N, d)."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Multi-head attention whose keys and values may have been computed before."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def look_at(self, x: Tensor) -> KeysValues:
        """x (B, N, D) -> its keys and values."""
        return KeysValues(self.split(self.key(x)), self.split(self.value(x)))

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, heads, N, d)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, at: KeysValues, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) looks at N places, where mask (B or 1, 1, L, N) is True -> (B, L, D)."""
        out: Tensor = self.out(self.mix(self.split(self.query(x)), at, mask))
        return out

    def mix(self, queries: Tensor, at: KeysValues, mask: Tensor | None = None) -> Tensor:
        """queries (B, heads, L, d) -> values by their weights, (B, L, D)."""
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(queries, at.keys, at.values, attn_mask=mask, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def weights(self, x: Tensor, keys: Tensor) -> Tensor:
        """x (B, L, D), keys (B, heads, N, d) -> (B, heads, L, N), which sum to 1 over N."""
        return (self.split(self.query(x)) @ keys.mT / math.sqrt(keys.shape[-1])).softmax(-1)


class Norm(nn.Module):
    """gamma (x - mean) / (std + 1e-6) + beta with the unbiased deviation, which is not torch's LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.gamma * standardise(x) + self.beta


class ConditionalNorm(Norm):
    """A norm to whose gamma and beta the memory adds (R2Gen, section 3.3)."""

    def __init__(self, width: int, memory: int) -> None:
        super().__init__(width)
        self.to_gamma, self.to_beta = (
            nn.Sequential(nn.Linear(memory, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2)
        )
        for mlp in (self.to_gamma, self.to_beta):
            for layer in mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.constant_(layer.bias, 0.1)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, L, D), memory (B, L, slots * D) -> (B, L, D)."""
        gamma, beta = self.gamma + self.to_gamma(memory), self.beta + self.to_beta(memory)
        out: Tensor = gamma * standardise(x) + beta
        return out


def standardise(x: Tensor) -> Tensor:
    """(..., D) with mean 0 and unbiased deviation 1."""
    std, mean = torch.std_mean(x, dim=-1, keepdim=True)
    return (x - mean) / (std + 1e-6)


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norms = nn.ModuleList(Norm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        normed = self.norms[0](x)
        x = x + self.dropout(self.attention(normed, self.attention.look_at(normed)))
        out: Tensor = x + self.dropout(self.feed_forward(self.norms[1](x)))
        return out


class DecoderLayer(nn.Module):
    """Self-attention, attention to the source, feed-forward, each after a norm that the memory conditions."""

    # `source` is another way in than `forward`, where the weights of a block that is divided are gathered.
    blocks_apart = False

    def __init__(self, width: int, hidden: int, heads: int, memory: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norms = nn.ModuleList(ConditionalNorm(width, memory) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def source(self, encoded: Tensor) -> KeysValues:
        """Keys and values of the encoder's output (B, N, D), the same for every word."""
        return self.cross.look_at(encoded)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        source: KeysValues,
        past: KeysValues | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """L words, and the P before them.

        Args:
            x: (B, L, D).
            memory: (B, L, slots * D), after each of these words.
            source: as `source` gives it, of B studies, or of B / k of them with k rows each, side by side.
            past: keys and values of the P words before; None at the beginning.
            mask: (B, 1, L, P + L), True where a word may look; None for everywhere.

        Returns:
            (B, L, D), and keys and values of all P + L words.
        """
        normed = self.norms[0](x, memory)
        own = self.attention.look_at(normed)
        if past is not None:
            own = KeysValues(*(torch.cat(pair, dim=2) for pair in zip(past, own, strict=True)))
        x = x + self.dropout(self.attention(normed, own, mask))
        studies = len(source.keys)
        normed = self.norms[1](x, memory).reshape(studies, -1, x.shape[2])
        x = x + self.dropout(self.cross(normed, source)).view_as(x)
        x = x + self.dropout(self.feed_forward(self.norms[2](x, memory)))
        return x, own


class RelationalMemory(nn.Module):
    """A few slots that look at themselves and the next word, and pass a gate (R2Gen, section 3.2)."""

    def __init__(self, width: int, slots: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.slots, self.width = slots, width
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.gate_word, self.gate_memory = (nn.Linear(width, 2 * width) for _ in range(2))

    def start(self, rows: int) -> Tensor:
        """(rows, slots, D): rows of the identity."""
        weight = self.gate_word.weight
        eye = torch.eye(self.slots, self.width, device=weight.device, dtype=weight.dtype)
        return eye.expand(rows, -1, -1)

    def forward(self, words: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reads words (B, L, D), from `memory` (B, slots, D) on or from the start.

        Returns:
            The memory after each word (B, L, slots * D), and after the last (B, slots, D).
        """
        attention = self.attention
        memory = self.start(len(words)) if memory is None else memory
        # What a word brings along does not wait for the memory: it is computed for all words at once.
        brought = [part.split(1, dim=2) for part in attention.look_at(words)]
        gates = self.gate_word(words).split(1, dim=1)
        parts = (attention.query, attention.key, attention.value)
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([part.bias for part in parts])
        after = []
        for key, value, word_gate in zip(*brought, gates, strict=True):
            q, k, v = (attention.split(part) for part in F.linear(memory, weight, bias).chunk(3, dim=2))
            at = KeysValues(torch.cat([k, key], 2), torch.cat([v, value], 2))
            new = memory + attention.out(attention.mix(q, at))
            new = new + self.mlp(new)
            let_in, keep = (word_gate + self.gate_memory(memory.tanh())).sigmoid().chunk(2, dim=2)
            memory = let_in * new.tanh() + keep * memory
            after.append(memory)
        return torch.stack(after, 1).flatten(2), memory


class MemoryWriter(Writer):
    """R2Gen's decoder in the middle of reports: keys and values of its words, and the memory, are kept for each row; what
    it looks at in the image, for each study."""

    def __init__(self, decoder: MemoryTransformer, visual: Tensor, context: Tensor | None) -> None:
        self.model, self.visual, self.context = decoder, visual, context

    def start(self) -> Tensor:
        encoded = self.model.encode(self.visual, self.context)
        layers = self.model.decoder_layers
        self.layers, self.all_sources = layers, [layer.source(encoded) for layer in layers]
        B = len(encoded)
        self.study = torch.arange(B, device=encoded.device)
        self.sources = self.all_sources
        self.memory = self.model.memory.start(B)
        self.past: list[KeysValues | None] = [None] * len(layers)
        self.place = 0
        return self._read(torch.full((B,), END, device=encoded.device))

    def step(self, rows: Tensor, tokens: Tensor) -> Tensor:
        study = self.study[rows]
        if not torch.equal(study, self.study):
            self._regroup(study)
        self.memory = self.memory[rows]
        self.past = [KeysValues(past.keys[rows], past.values[rows]) for past in self.past if past is not None]
        return self._read(tokens)

    def _regroup(self, study: Tensor) -> None:
        """Rows of one study side by side share its keys and values; nothing is copied for a beam."""
        self.study = study
        studies, counts = study.unique_consecutive(return_counts=True)
        if (counts != counts[0]).any():
            studies = study
        self.sources = [KeysValues(source.keys[studies], source.values[studies]) for source in self.all_sources]

    def _read(self, tokens: Tensor) -> Tensor:
        x = self.model._embed(tokens[:, None], self.place)
        memory, self.memory = self.model.memory(x, self.memory)
        for i, layer in enumerate(self.layers):
            x, self.past[i] = layer(x, memory, self.sources[i], self.past[i])
        self.place += 1
        logits: Tensor = self.model.head(self.model.decoder_norm(x[:, 0])).float()
        return logits


# R2Gen's names, piece by piece; what is not renamed is called alike.
RENAMED: tuple[tuple[str, str], ...] = (
    (r"^model\.", ""),
    (r"^logit\.", "head."),
    (r"^tgt_embed\.0\.lut\.", "embedding."),
    (r"^rm\.W\.", "memory.gate_word."),
    (r"^rm\.U\.", "memory.gate_memory."),
    (r"^rm\.", "memory."),
    (r"^(encoder|decoder)\.norm\.", r"\1_norm."),
    (r"^(encoder|decoder)\.layers\.", r"\1."),
    (r"\.(self_attn|attn)\.", ".attention."),
    (r"\.src_attn\.", ".cross."),
    (r"\.linears\.0\.", ".query."),
    (r"\.linears\.1\.", ".key."),
    (r"\.linears\.2\.", ".value."),
    (r"\.linears\.3\.", ".out."),
    (r"\.w_1\.", ".0."),
    (r"\.w_2\.", ".3."),
    (r"\.sublayer\.(\d)\.norm\.", r".norms.\1."),
    (r"\.mlp_(gamma|beta)\.", r".to_\1."),
)
PREFIX = "encoder_decoder."
# The projector's, and the table of positions, which is computed here.
NOT_DECODER = (f"{PREFIX}att_embed.", f"{PREFIX}model.tgt_embed.1.")


def own_names(keys: Iterable[str]) -> dict[str, str]:
    """R2Gen's names of its decoder's tensors -> those of `MemoryTransformer`."""
    return {
        key: rename(key.removeprefix(PREFIX), RENAMED)
        for key in keys
        if key.startswith(PREFIX) and not key.startswith(NOT_DECODER)
    }


def _power_of_two(length: int) -> int:
    return 1 << max(6, (length - 1).bit_length())


@functools.lru_cache(maxsize=32)
def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width) float32: sin and cos in turn, p 10000^(-2k / width) at place p."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).float().to(device)
