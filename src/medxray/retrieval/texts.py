"""Similarity of report texts: the cosine of their words, weighted by how rare they are (TF-IDF)."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

WORD = re.compile(r"[a-z]+|\d+")


class TextIndex:
    """n texts, to be compared with others.

    A word counts 1 + log of its number in a text, times log((1 + n) / (1 + texts with it)) + 1. Kept as a sparse matrix,
    12 bytes a different word of each text.

    Args:
        texts: n of them.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(WORD.findall(text.lower())) for text in texts]
        holders = Counter(word for count in counts for word in count)
        self.column = {word: i for i, word in enumerate(sorted(holders))}
        self.rarity = torch.tensor([math.log((1 + len(texts)) / (1 + holders[w])) + 1 for w in self.column])
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + len(count))
        columns = torch.tensor([self.column[word] for count in counts for word in count], dtype=torch.int32)
        values = torch.tensor([1 + math.log(times) for count in counts for times in count.values()])
        values = values * self.rarity[columns.long()]
        rows = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(ends).diff())
        norms = torch.zeros(len(texts)).index_add_(0, rows, values**2).sqrt()
        shape = (len(texts), max(1, len(self.column)))
        # Within a row in the order of columns, as the format wants it.
        order = torch.argsort(rows * shape[1] + columns)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.table = torch.sparse_csr_tensor(
                torch.tensor(ends, dtype=torch.int32),
                columns[order],
                (values / norms[rows])[order],
                size=shape,
                check_invariants=False,
            )

    def similarity(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, n) float32 in [0, 1]; zeros where no word is known."""
        queries = torch.zeros(len(texts), self.table.shape[1])
        for row, text in enumerate(texts):
            count = Counter(WORD.findall(text.lower()))
            known = [(self.column[word], 1 + math.log(times)) for word, times in count.items() if word in self.column]
            for column, value in known:
                queries[row, column] = value
        queries[:, : len(self.rarity)] *= self.rarity
        queries = torch.nn.functional.normalize(queries, dim=1)
        found: Tensor = (self.table @ queries.T).T
        return found
