"""How a student is served."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.system.errors import TideError
from student_train.using.settings import SampleConfig


@dataclass(frozen=True)
class ServeConfig:
    """Limits of the server, and how it samples where a request does not say. TideError where one cannot be."""

    name: str
    """Of the model, as requests must say it."""
    sampling: SampleConfig = field(default_factory=SampleConfig)
    """Its `new_tokens` are those of a response whose request gives no limit."""
    batch: int = 16
    """Responses under way at once."""
    waiting: int = 256
    """Responses that may wait for a place; beyond, requests get status 503."""
    body_bytes: int = 4 << 20
    """Of a request."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: any that is free."""
    api_key: str | None = field(default=None, repr=False)
    """What requests must carry as a bearer token; None: nothing."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("waiting", 0), ("body_bytes", 1)):
            if getattr(self, name) < least:
                raise TideError(f"{name} is {getattr(self, name)}", expected=f"at least {least}")
        if not 0 <= self.port < 65536:
            raise TideError(f"port is {self.port}", expected="0 to 65535; 0 takes one that is free")
        if self.api_key is not None and not self.api_key.strip():
            raise TideError(
                "the API key is empty", fix="give one, or leave the option and TIDE_API_KEY out"
            )
        if not self.name:
            raise TideError("the model's name is empty", fix="give one (--name)")

    @property
    def local(self) -> bool:
        """Whether only this machine can ask."""
        return self.host in ("127.0.0.1", "localhost", "::1")
