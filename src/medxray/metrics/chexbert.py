"""CheXpert's observations by CheXbert (Smit et al., EMNLP 2020): BERT with a head for each, from a local file."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from medxray.metrics.findings import Clinical, Uncertain
from medxray.metrics.learned import device, folder_with, read_once
from medxray.types import WeightsError
from medxray.weights import load_into, load_state

WEIGHTS, VOCABULARY = "chexbert.pth", "vocab.txt"
NEEDED = {
    WEIGHTS: "CheXbert's published checkpoint, linked from stanfordmlgroup/CheXbert on GitHub and in StanfordAIMI/RRG_scorers "
    "on the Hugging Face hub",
    VOCABULARY: "of bert-base-uncased on the Hugging Face hub",
}
CONDITIONS: tuple[str, ...] = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
"""In the order of the file's heads."""
_CLASSES = (None, 1, 0, -1)
"""Of a head: not mentioned, present, absent, in doubt. That of No Finding has the first two."""
_HEAD_WIDTH = 64
_LENGTH = 512


class Chexbert(Clinical):
    """Precision, recall and F1 of CheXpert's 14 observations, labelled by CheXbert in both texts.

    Values and their rules are those of `clinical`, named chexbert-MEASURE-MEAN-SET. Nothing is downloaded.

    Args:
        weights: folder with chexbert.pth, as its authors publish it, and the vocab.txt of bert-base-uncased.
        uncertain: what an observation in doubt counts as, in both texts.
        full: all 18 values instead of micro and macro F1.
        batch_size: reports at a time.

    Raises:
        WeightsError: a file is missing, or is not CheXbert's.
    """

    prefix = "chexbert"

    def __init__(
        self, weights: str, uncertain: Uncertain = "positive", full: bool = False, batch_size: int = 32
    ) -> None:
        super().__init__(uncertain, full)
        self.folder = folder_with("metrics.chexbert.weights", weights, NEEDED)
        self.batch_size = batch_size
        self._labeller: _Labeller | None = None
        self._found: dict[str, dict[str, int]] = {}

    def label(self, texts: Sequence[str]) -> list[dict[str, int]]:
        """Labels of each text: 1 present, 0 absent, -1 in doubt; what is not mentioned is left out."""
        if self._labeller is None:
            self._labeller = _Labeller(self.folder)
        return read_once(texts, self._found, self._labeller, self.batch_size, "chexbert")


class _Labeller:
    """Texts -> labels."""

    def __init__(self, folder: Path) -> None:
        self.network = _load(folder)
        self.tokenizer = BertWordPieceTokenizer(str(folder / VOCABULARY), lowercase=True)
        self.tokenizer.enable_truncation(_LENGTH)
        self.tokenizer.enable_padding()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> list[dict[str, int]]:
        where = device()
        encoded = self.tokenizer.encode_batch([" ".join(text.split()) for text in texts])
        ids = torch.tensor([e.ids for e in encoded], device=where)
        mask = torch.tensor([e.attention_mask for e in encoded], device=where)
        choices = torch.stack([head.argmax(1) for head in self.network.to(where)(ids, mask)], 1).tolist()
        return [
            {
                name: value
                for name, choice in zip(CONDITIONS, row, strict=True)
                if (value := _CLASSES[choice]) is not None
            }
            for row in choices
        ]


class _Network(nn.Module):
    """BERT's vector of [CLS] under a linear head for each condition; parameters are named as in the file."""

    def __init__(self, config: BertConfig, pooler: bool) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=pooler)
        self.linear_heads = nn.ModuleList(
            nn.Linear(config.hidden_size, 2 if name == "No Finding" else len(_CLASSES)) for name in CONDITIONS
        )

    def forward(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Token ids and mask (B, L) -> 14 times logits (B, classes)."""
        first = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
        return [head(first) for head in self.linear_heads]


def _load(folder: Path) -> _Network:
    source = folder / WEIGHTS
    # Some versions of transformers save these numbers 0, 1, 2 ... with a model.
    state = {key: value for key, value in load_state(source).items() if not key.endswith("position_ids")}
    embeddings = "bert.embeddings.{}_embeddings.weight"
    first = "bert.encoder.layer.0.intermediate.dense.weight"
    needed = (*(embeddings.format(kind) for kind in ("word", "position", "token_type")), first)
    lacking = [key for key in needed if key not in state]
    if lacking:
        raise WeightsError(f"weights {source} are not CheXbert's: no {lacking[0]}; take the checkpoint of its authors")
    words, width = state[embeddings.format("word")].shape
    lines = len((folder / VOCABULARY).read_text(encoding="utf-8").splitlines())
    if lines != words:
        raise WeightsError(
            f"{folder / VOCABULARY} has {lines} tokens, and {WEIGHTS} was made with {words}; "
            "take that of bert-base-uncased"
        )
    config = BertConfig(
        vocab_size=words,
        hidden_size=width,
        num_hidden_layers=len({key.split(".")[3] for key in state if key.startswith("bert.encoder.layer.")}),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        intermediate_size=state[first].shape[0],
        max_position_embeddings=state[embeddings.format("position")].shape[0],
        type_vocab_size=state[embeddings.format("token_type")].shape[0],
    )
    network = _Network(config, pooler=any(key.startswith("bert.pooler.") for key in state))
    load_into(network, state, str(source))
    return network.eval()
