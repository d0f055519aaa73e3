"""Numbers that follow from names alone: the same on every machine, in every process and Python version."""

import hashlib


def seed_of(*parts: object) -> int:
    """A whole number in [0, 2**63) that is fixed by the text of `parts`."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
