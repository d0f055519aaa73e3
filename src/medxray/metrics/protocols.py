"""What reports out of a table are scored against: how both texts are cleaned and how much of a reference counts.

A fitted run has its own cleaning and its decoder's own limit: there the protocol is `full` or `r2gen` (`Pipeline.evaluate`).
"""

from dataclasses import dataclass, replace

from medxray.data.text import clean
from medxray.registry import nearest
from medxray.types import SpecError


@dataclass(frozen=True)
class Protocol:
    """How two texts are read before they are compared.

    Attributes:
        name: as people call it.
        cleaning: rule of `medxray.data.text.clean`, for predictions and references. What is clean stays as it is, so that
            reports of a model that was trained on cleaned ones lose nothing.
        limit: words of a reference that count; None for all. Predictions are never cut.
    """

    name: str
    cleaning: str = "none"
    limit: int | None = None

    @property
    def words(self) -> str:
        """What is done, for a reader of scores."""
        if self.cleaning == "none" and self.limit is None:
            return f"{self.name}: texts neither cleaned nor cut"
        cleaned = "nothing cleaned" if self.cleaning == "none" else f"predictions and references cleaned by {self.cleaning}"
        # What R2Gen does beside needs its training reports.
        cut = "whole" if self.limit is None else f"cut after {self.limit} words, rare words kept"
        return f"{self.name}: {cleaned}; references {cut}"

    def prediction(self, text: str) -> str:
        """A generated report as it is scored."""
        return clean(text, self.cleaning)

    def reference(self, text: str) -> str:
        """A person's report as it is scored."""
        text = clean(text, self.cleaning)
        return text if self.limit is None else " ".join(text.split()[: self.limit])


AS_IT_STANDS = Protocol("as it stands")
PROTOCOLS = {
    one.name: one
    for one in (
        Protocol("r2gen-iu", "r2gen-iu", 59),
        Protocol("r2gen-mimic", "r2gen-mimic", 99),
        Protocol("full-iu", "r2gen-iu"),
        Protocol("full-mimic", "r2gen-mimic"),
        Protocol("full-r2gencsr-mimic", "r2gencsr-mimic"),
    )
}
"""Name -> protocol. R2Gen scores against the ids of its references, cut at 60 (IU X-Ray) or 100 (MIMIC-CXR) with its start
sign among them, so 59 or 99 words; words that are rare in its training reports are `<unk>` there, which a table cannot
tell. R2GenGPT and R2GenCSR cut at as many tokens of their language model, which is fewer words."""


def protocol(name: str | None, limit: int | None = None) -> Protocol:
    """A protocol by its name; None leaves texts as they stand.

    Args:
        name: one of `PROTOCOLS`.
        limit: words of a reference that count, in place of the protocol's own.

    Raises:
        SpecError: no such protocol, or a limit below 1.
    """
    if name is not None and name not in PROTOCOLS:
        raise SpecError(f"protocol: no {name!r}{nearest(name, PROTOCOLS)}; expected one of {', '.join(PROTOCOLS)}")
    if limit is not None and limit < 1:
        raise SpecError(f"words: expected 1 or more, found {limit}; leave it out for the protocol's own limit")
    found = AS_IT_STANDS if name is None else PROTOCOLS[name]
    return found if limit is None else replace(found, limit=limit)
