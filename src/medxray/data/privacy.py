"""Names that lead back to nobody: keyed hashes in place of what a hospital calls its patients, studies and files.

A hash without a key hides nothing, since all numbers of a hospital can be tried in seconds. With the key the same
thing has the same name in every run; without it a name tells nothing. A table from names back to identifiers is
never written.
"""

import hmac
import os
import secrets
import warnings
from pathlib import Path

from medxray.types import DataError

VARIABLE = "MEDXRAY_KEY"
LEAST = 16
"""Bytes that a key has at least."""

_DIGITS = 24  # 96 bits: among a million names two are equal with a chance of 1 in 10**17


class Names:
    """Keyed hashes as names (HMAC-SHA256, RFC 2104, its first 96 bits as 24 hexadecimal digits).

    Args:
        key: the secret; the same key gives the same names.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __call__(self, kind: str, *parts: str) -> str:
        """The name of a thing: the same for the same kind and parts, and unlike that of any other.

        Args:
            kind: what it is, such as "patient"; things of two kinds never share a name.
            parts: what identifies it.
        """
        # Lengths keep ("a", "bc") from being ("ab", "c").
        text = "".join(f"{len(part)}:{part}" for part in (kind, *parts))
        return hmac.digest(self._key, text.encode("utf-8", "surrogatepass"), "sha256").hex()[:_DIGITS]

    @property
    def mark(self) -> str:
        """Tells two keys apart, and tells nothing of either."""
        return self("key")


def find_key(file: str | Path | None = None) -> bytes:
    """The key of a file, else that of the environment, else the user's own, made when it is first needed.

    Args:
        file: holds the key; all its bytes but white space at its ends.

    Returns:
        At least 16 bytes. The environment variable MEDXRAY_KEY holds a key's text. The user's own is
        medxray/key in `XDG_DATA_HOME` or ~/.local/share, 32 random bytes as hexadecimal digits, for its owner alone.

    Raises:
        DataError: there is no such file, it cannot be read, or the key is short.
    """
    if file is not None:
        return _read(Path(file).expanduser(), "data.reader.key_file")
    text = os.environ.get(VARIABLE, "").strip()
    if text:
        if os.path.isfile(text):
            raise DataError(f"{VARIABLE} holds the path of a file; it takes a key itself: name a file by data.reader.key_file")
        return _checked(text.encode(), VARIABLE)
    path = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "medxray" / "key"
    if not path.is_file():
        _make(path)
    return _read(path, "the key of this user")


def _read(path: Path, what: str) -> bytes:
    try:
        key = path.read_bytes().strip()
        others = os.name == "posix" and path.stat().st_mode & 0o077
    except OSError as error:
        raise DataError(
            f"{what}: {path} cannot be read ({error.strerror}); expected a file with a secret of at least {LEAST} bytes; "
            f"check the path, or make one: (umask 077; openssl rand -hex 32 > {path})"
        ) from None
    if others:
        warnings.warn(f"{path} can be read by others than its owner; run: chmod 600 {path}", stacklevel=2)
    return _checked(key, f"{what} {path}")


def _checked(key: bytes, what: str) -> bytes:
    if len(key) < LEAST:
        raise DataError(
            f"{what}: a key of {len(key)} bytes, which can be guessed; expected at least {LEAST}, such as openssl rand -hex 32 "
            "prints"
        )
    return key


def _make(path: Path) -> None:
    """Writes a new key, whole and once, whoever else does so at the same time."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # Unlike a renaming, a link never replaces the key of another process.
            os.link(staged, path)
        finally:
            staged.unlink(missing_ok=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise DataError(
            f"{path}: no key can be kept there ({error.strerror}); name a file with one by data.reader.key_file, or a key by "
            f"the environment variable {VARIABLE}"
        ) from None
