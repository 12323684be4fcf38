"""Answers, as OpenAI's API has them: whole, and in chunks."""

import secrets
import time
from abc import ABC, abstractmethod
from typing import Any

from dairllm.nodes.reply import Reply

__all__ = ["ChatShape", "CompletionShape", "Shape"]


class Shape(ABC):
    """One answer's id and forms.

    Args:
        model: the name of who answers.

    Attributes:
        fingerprint: for as long as it stays the same seed gives the same answer. Known when the answer has begun.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str) -> None:
        self._model = model
        self.fingerprint = ""
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, text: str, reply: Reply) -> dict[str, Any]:
        """The answer, complete."""
        return {**self._head(self.whole_object), "choices": [self._choice(text, reply.finish_reason)], "usage": usage(reply)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def chunk(self, piece: str) -> dict[str, Any]:
        """A piece of it."""
        return {**self._head(self.chunk_object), "choices": [self._chunk_choice(piece, None)]}

    def closing(self, reply: Reply) -> dict[str, Any]:
        """Why it ends."""
        return {**self._head(self.chunk_object), "choices": [self._chunk_choice("", reply.finish_reason)]}

    def usage(self, reply: Reply) -> dict[str, Any]:
        """The chunk for `stream_options.include_usage`."""
        return {**self._head(self.chunk_object), "choices": [], "usage": usage(reply)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "system_fingerprint": self.fingerprint}

    @abstractmethod
    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """The text, and why it ends."""

    def _chunk_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A part of the text, empty in the last chunk, which alone says why it ends."""
        return self._choice(text, finish_reason)


class ChatShape(Shape):
    """`POST /v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        return [{**self._head(self.chunk_object), "choices": [self._delta({"role": "assistant", "content": ""}, None)]}]

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}

    def _chunk_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return self._delta({"content": text} if text else {}, finish_reason)

    def _delta(self, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class CompletionShape(Shape):
    """`POST /v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}


def usage(reply: Reply) -> dict[str, Any]:
    n_prompt = len(reply.order.prompt_ids)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": reply.n_ids,
        "total_tokens": n_prompt + reply.n_ids,
        "prompt_tokens_details": {"cached_tokens": reply.cached_tokens},
    }
