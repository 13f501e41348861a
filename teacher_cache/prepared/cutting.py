"""Raw rows cut into parts by their content, so that a row that is mended, removed or added changes only its own
part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shared.data.files import Place, Raw

_FEWEST, _MOST = 64, 1024
_ONE_IN = 256
_MOST_BYTES = 16 << 20


@dataclass
class RawPart:
    """A stretch of raw rows with their places; `digest` is a hash over the rows' content."""

    places: list[Place] = field(default_factory=list)
    rows: list[Raw] = field(default_factory=list)
    size: int = 0
    digest: str = ""


def cut(rows: Iterable[tuple[Place, Raw]]) -> Iterator[RawPart]:
    """Parts of 64 to 1,024 rows, 256 on average; a part ends behind a row whose hash says so."""
    part, digest = RawPart(), hashlib.sha256()
    for place, raw in rows:
        content = raw if isinstance(raw, bytes) else _canonical(raw)
        own = hashlib.blake2b(content, digest_size=8).digest()
        digest.update(own + len(content).to_bytes(8, "big"))
        part.places.append(place)
        part.rows.append(raw)
        part.size += len(content)
        ends = int.from_bytes(own, "big") % _ONE_IN == 0 and len(part.rows) >= _FEWEST
        if ends or len(part.rows) >= _MOST or part.size >= _MOST_BYTES:
            part.digest = digest.hexdigest()
            yield part
            part, digest = RawPart(), hashlib.sha256()
    if part.rows:
        part.digest = digest.hexdigest()
        yield part


def _canonical(row: object) -> bytes:
    return json.dumps(row, ensure_ascii=False, sort_keys=True, default=str).encode(
        "utf-8", "surrogatepass"
    )
