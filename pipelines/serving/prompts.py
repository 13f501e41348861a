"""From messages or texts to ids: of large requests in a process that is ended if it takes long."""

import asyncio
import multiprocessing
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shared.data.reading import waiting_messages
from shared.text.tokenizers import Tokenizer

_SPAWN = multiprocessing.get_context("spawn")
_HERE: list[Tokenizer] = []  # in the process for large ones: its own


def _begin(tokenizer: Tokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the server
    _HERE.append(tokenizer)


def encode(asked: list[Any], chat: bool, given: Tokenizer | None) -> list[list[int]] | str:
    """Ids of each prompt, or what is wrong: of a chat's messages, or of texts (or ids already)."""
    tokenizer, ids = given or _HERE[0], list[list[int]]()
    try:
        if chat:
            return [tokenizer.encode_prompt(waiting_messages(asked))]
        for prompt in asked:
            if isinstance(prompt, str):
                prompt.encode()  # where that fails it has lone surrogates
                ids += tokenizer.encode([prompt])
            elif isinstance(prompt, list) and all(type(token) is int for token in prompt):
                ids.append(prompt)
            else:
                return f"{prompt!r:.80} is no prompt: a text, or a list of ids"
    except Exception as error:  # of templates' own kinds, too
        return getattr(error, "what", f"{type(error).__name__}: {error}")
    if any(not 0 <= token < len(tokenizer) for prompt in ids for token in prompt):
        return f"the prompt has ids outside 0 … {len(tokenizer) - 1}"
    return ids if all(ids) and ids else "a prompt is empty"


class Prompts:
    """`tokenizing` is held by whoever uses the tokenizer in this process."""

    def __init__(self, tokenizer: Tokenizer, tokenizing: threading.Lock, seconds: float) -> None:
        self._tokenizer, self._tokenizing, self._seconds = tokenizer, tokenizing, seconds
        self._one, self._pool = ThreadPoolExecutor(1, "large prompts"), None

    async def encode(self, asked: list[Any], chat: bool, large: bool) -> list[list[int]] | str:
        """What the function of this name returns."""
        work, where = (self._apart, self._one) if large else (self._here, None)
        return await asyncio.get_running_loop().run_in_executor(where, work, asked, chat)

    def _here(self, asked: list[Any], chat: bool) -> list[list[int]] | str:
        with self._tokenizing:
            return encode(asked, chat, self._tokenizer)

    def _apart(self, asked: list[Any], chat: bool) -> list[list[int]] | str:
        self._pool = self._pool or _SPAWN.Pool(1, _begin, (self._tokenizer,))
        try:
            self._pool.apply_async(len, ("",)).get(60)  # it has begun
            return self._pool.apply_async(encode, (asked, chat, None)).get(self._seconds)
        except multiprocessing.TimeoutError:
            self.close()
            return f"to tokenise it takes more than {self._seconds:g} seconds; send less"

    def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
        self._pool = None
