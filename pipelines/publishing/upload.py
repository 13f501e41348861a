"""One commit on the hub, and a look at what arrived."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipelines.publishing.contents import Contents
from shared.system.errors import TideError
from student_train.model.card import CARD

_SCHEME = "hf://"


def parse_target(target: str) -> str:
    """OWNER/NAME out of hf://OWNER/NAME. TideError where it is none."""
    name = target.removeprefix(_SCHEME)
    try:
        if not target.startswith(_SCHEME) or name.count("/") != 1:
            raise HFValidationError("it is not of that form")
        validate_repo_id(name)
    except HFValidationError as error:
        raise TideError(
            f"{target!r} is no place for a model: {str(error).splitlines()[0]}",
            expected="hf://OWNER/NAME",
        ) from error
    return name


def upload(contents: Contents, name: str, private: bool, message: str) -> str:
    """Send everything in one commit; return its address. Files that are there already are not sent again.

    TideError where the hub cannot be reached, refuses, or holds something else afterwards.
    """
    operations = [CommitOperationAdd(file, str(path)) for file, path in contents.files.items()]
    operations.append(CommitOperationAdd(CARD, contents.card.encode()))
    api = HfApi()
    with _explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message=message)
        arrived = api.get_paths_info(name, [*contents.sizes], revision=commit.oid)
    found = {info.path: info for info in arrived}
    for file, size in contents.sizes.items():
        info = found.get(file)
        lfs = getattr(info, "lfs", None)
        if getattr(info, "size", None) != size or (
            lfs is not None and lfs.sha256 != _sha256(contents.files.get(file))
        ):
            raise TideError(
                f"{file} did not arrive at {name} as it was sent", fix="run the same command again"
            )
    return str(commit.commit_url)


def _sha256(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """The hub's errors in words."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        said = (str(error).splitlines() or ["?"])[0]
        if status in (401, 403):
            raise TideError(
                f"the hub does not let you write to {name}: {said}",
                expected="a token that may write there",
                fix="`hf auth login`, or set HF_TOKEN",
            ) from error
        raise TideError(
            f"the hub did not take {name}: {said}", fix="run the same command again later"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreachable(name, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "requests",
            "urllib3",
        ):
            raise _unreachable(name, error) from error
        raise


def _unreachable(name: str, error: Exception) -> TideError:
    return TideError(
        f"{name} could not be reached: {type(error).__name__}: {(str(error).splitlines() or ['?'])[0]}",
        expected="the hub, or the server that HF_ENDPOINT names",
        fix="check the network (and that HF_HUB_OFFLINE is not set); what arrived is not sent again",
    )
