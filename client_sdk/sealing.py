"""Text that only who has the key can read: XChaCha20-Poly1305 (libsodium's)."""

from __future__ import annotations

import os

from pocketfed.client_sdk.errors import ConfigurationError

KEY_BYTES = 32
NONCE_BYTES = 24  # random: no two texts will ever share one
BLOCK_BYTES = 64  # texts are filled up to a multiple of it, or a label would be known by its length


class Unreadable(Exception):  # noqa: N818 - of one text, not of the store
    """Sealed with another key, for another place, or changed since."""


class Seal:
    """One key, held in memory only.

    Args:
        key: 32 random bytes.

    Raises:
        ConfigurationError: it is none.
    """

    def __init__(self, key: bytes) -> None:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            given = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
            raise ConfigurationError(f"the key is {given}; give {KEY_BYTES} random bytes, as secrets.token_bytes makes")
        self._key = key

    def seal(self, text: str, place: str) -> bytes:
        """Nonce, then ciphertext and tag. `text` holds no NUL; it can be opened as of the same `place` only."""
        from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt

        data = text.encode()
        nonce = os.urandom(NONCE_BYTES)
        padded = data + bytes(-len(data) % BLOCK_BYTES)
        return nonce + crypto_aead_xchacha20poly1305_ietf_encrypt(padded, place.encode(), nonce, self._key)

    def open(self, sealed: bytes, place: str) -> str:
        """
        Raises:
            Unreadable: it is not what `seal` gave for this key and place.
        """
        from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt
        from nacl.exceptions import CryptoError

        try:
            nonce, rest = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
            data = crypto_aead_xchacha20poly1305_ietf_decrypt(rest, place.encode(), nonce, self._key)
            return data.rstrip(b"\0").decode()
        except (CryptoError, ValueError, TypeError) as error:
            raise Unreadable(place) from error
