"""The bytes that a vocabulary's words stand for: byte-level alphabets and SentencePiece."""

from __future__ import annotations


def byte_level_alphabet() -> dict[str, int]:
    """The GPT-2 alphabet: the printable character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    table.update(
        {chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    )
    return table


_ALPHABET = byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes | None:
    """Bytes of a token written in the byte-level alphabet; None where a character is not of it."""
    try:
        return bytes(_ALPHABET[c] for c in token)
    except KeyError:
        return None


def sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a SentencePiece token: `<0xE4>` is a byte, U+2581 is a space."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
