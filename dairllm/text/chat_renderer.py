"""Conversations become prompts, by the model's own chat template.

A template is a program that came with a file from somewhere, and is treated like one: it runs in a process of its own, which has so much
time and so much memory for each conversation, whatever it does. The process is kept for the next conversation; where it was ended, or its
template failed so that it had to be, the next one gets a new one.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from dairllm.errors import DairllmError
from dairllm.text.chat_process import ChatProcess, EndedError

__all__ = ["PROCESS_BYTES", "ChatRenderer", "ChatTemplateError"]

PROCESS_BYTES = 32 << 20
"""Memory of the process between conversations, for whoever plans."""


class ChatTemplateError(DairllmError):
    """The template does not suit the conversation, is broken, or wants more than it may have."""


class ChatRenderer:
    """Owns the process; may be used from several threads, one conversation at a time. A context manager that closes it.

    Args:
        template: the model's Jinja template; None where it has none.
        bos: what the template writes for `bos_token`.
        eos: what it writes for `eos_token`.
    """

    def __init__(self, template: str | None, *, bos: str = "", eos: str = "") -> None:
        self._template = template
        self._known = {"tools": None, "documents": None, "bos_token": bos, "eos_token": eos}
        self._turn = threading.Lock()
        self._process: ChatProcess | None = None
        self._closed = False

    def __enter__(self) -> "ChatRenderer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The number of the process, where there is one."""
        process = self._process
        return None if process is None or process.has_ended else process.pid

    def start(self) -> None:
        """Start the process, where there is a template; else the first conversation does it.

        Raises:
            DairllmError: it cannot be started.
        """
        if self._template:
            with self._turn:
                self._at_hand(self._template)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None
    ) -> str:
        """The prompt for a conversation. Blocks, for some seconds at most once it is its turn: not for an event loop.

        Args:
            messages: {"role": ..., "content": ...} in order; what JSON can say.
            add_generation_prompt: end with the words after which the assistant speaks.
            variables: what else the template is to see.

        Raises:
            ChatTemplateError: there is no template, or it fails; one line says why, and where in the template.
            DairllmError: the process cannot be started, or this was closed.
        """
        if not self._template:
            raise ChatTemplateError("the model has no chat template; give it a plain prompt instead")
        seen = {**self._known, **(variables or {}), "messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            request = json.dumps(seen).encode()
        except (TypeError, ValueError, RecursionError) as error:  # a number of 5000 digits, or objects within objects within objects
            raise ChatTemplateError(f"the conversation cannot be told the chat template: {error}") from None
        with self._turn:
            try:
                rendered, text = self._at_hand(self._template).ask(request)
            except EndedError as error:
                if self._closed:
                    raise DairllmError("the program is shutting down") from None
                raise ChatTemplateError(f"the chat template {error}") from None
        if not rendered:
            raise ChatTemplateError(text)
        return text

    def close(self) -> None:
        """End the process, and whatever it is at."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:
            if self._process is not None:
                self._process.end()
                self._process = None

    def _at_hand(self, template: str) -> ChatProcess:
        if self._closed:
            raise DairllmError("the program is shutting down")
        if self._process is not None and self._process.has_ended:
            self._process.end()
            self._process = None
        if self._process is None:
            self._process = ChatProcess(template)
        return self._process
