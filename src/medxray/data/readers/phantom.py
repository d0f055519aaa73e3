"""Made-up chest X-rays: drawn on first use, then read like any table."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from medxray.data.readers.csv import CSV, read_table
from medxray.types import Study


class Phantom(CSV):
    """Studies of `medxray.data.phantom`, drawn into root when it is absent; the text to learn is the findings.

    Args:
        studies: how many are drawn.
        size: pixels a side.
        seed: decides every byte.
        format: how images are stored; dicom and png16 have 12 bits.
    """

    def __init__(
        self,
        root: Path,
        studies: Annotated[int, Field(gt=0)] = 2000,
        size: Annotated[int, Field(ge=32)] = 256,
        seed: Annotated[int, Field(ge=0)] = 0,
        format: Literal["png8", "png16", "dicom"] = "png8",
    ) -> None:
        super().__init__(root)
        self.studies, self.size, self.seed, self.format = studies, size, seed, format

    def read(self) -> Iterable[Study]:
        """All studies.

        Raises:
            DataError: root holds something else, such as phantoms of other settings.
        """
        # Drawing needs numba, which checking a spec must not wait for.
        from medxray.data.phantom import FINDINGS, generate

        generate(self.root, self.studies, self.size, self.seed, self.format)
        self.label_columns = list(FINDINGS)
        return self.group(read_table(self.file(self.listing)))
