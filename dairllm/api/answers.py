"""Answers, as OpenAI's API has them: whole, and in chunks."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dairllm.api.choices import Choice
from dairllm.api.logprobs import CompletionLogprobs, chat_logprobs
from dairllm.serving.logprobs import TokenScore
from dairllm.serving.reply import Reply
from dairllm.text.tokenizer import Tokenizer

__all__ = ["ChatShape", "ChoiceShape", "CompletionShape", "Shape"]


class ChoiceShape(ABC):
    """One choice of an answer, while it comes or when it is complete."""

    def __init__(self, choice: Choice, reply: Reply, tokenizer: Tokenizer) -> None:
        self._choice, self._reply, self._tokenizer = choice, reply, tokenizer
        self._told = 0

    @abstractmethod
    def whole(self, text: str) -> dict[str, Any]:
        """The choice, complete."""

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        return []

    def piece(self, piece: str) -> dict[str, Any]:
        """A piece of it, and what is to be told of its tokens."""
        return self._part(piece, None)

    def closing(self) -> dict[str, Any]:
        """Why it ends."""
        return self._part("", self._reply.finish_reason)

    @abstractmethod
    def _part(self, piece: str, finish_reason: str | None) -> dict[str, Any]: ...

    def _untold(self) -> Sequence[TokenScore]:
        """Scores of tokens that have not been told yet."""
        told, self._told = self._told, len(self._reply.scores)
        return self._reply.scores[told:]

    @property
    def _is_scored(self) -> bool:
        return self._choice.order.logprobs is not None


class ChatChoiceShape(ChoiceShape):
    """Of `POST /v1/chat/completions`."""

    def whole(self, text: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._form({"message": message}, self._reply.finish_reason)

    def opening(self) -> list[dict[str, Any]]:
        return [{"index": self._choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]

    def _part(self, piece: str, finish_reason: str | None) -> dict[str, Any]:
        return self._form({"delta": {"content": piece} if piece else {}}, finish_reason)

    def _form(self, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        logprobs = chat_logprobs(self._untold(), self._tokenizer) if self._is_scored else None
        return {"index": self._choice.index, **said, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionChoiceShape(ChoiceShape):
    """Of `POST /v1/completions`."""

    def __init__(self, choice: Choice, reply: Reply, tokenizer: Tokenizer) -> None:
        super().__init__(choice, reply, tokenizer)
        scores_prompt = choice.order.scores_prompt
        self._logprobs = CompletionLogprobs(tokenizer, 0 if scores_prompt else len(choice.echo or ""))

    def whole(self, text: str) -> dict[str, Any]:
        prompt = self._prompt_logprobs()
        logprobs = self._logprobs.answer(self._untold()) if self._is_scored else None
        if prompt is not None and logprobs is not None:
            logprobs = {name: values + logprobs[name] for name, values in prompt.items()}
        return self._form((self._choice.echo or "") + text, logprobs, self._reply.finish_reason)

    def opening(self) -> list[dict[str, Any]]:
        return [] if self._choice.echo is None else [self._form(self._choice.echo, self._prompt_logprobs(), None)]

    def _part(self, piece: str, finish_reason: str | None) -> dict[str, Any]:
        return self._form(piece, self._logprobs.answer(self._untold()) if self._is_scored else None, finish_reason)

    def _form(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self._choice.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _prompt_logprobs(self) -> dict[str, Any] | None:
        order = self._choice.order
        if not order.scores_prompt:
            return None
        return self._logprobs.prompt(order.prompt_ids, self._reply.prompt_scores, unwritten=self._choice.unwritten)


class Shape:
    """One answer's id and forms.

    Args:
        model: the name of who answers.
        tokenizer: of the model.

    Attributes:
        fingerprint: for as long as it stays the same seed gives the same answer. Known when the answer has begun.
    """

    prefix: str
    whole_object: str
    chunk_object: str
    choice_shape: type[ChoiceShape]

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.fingerprint = ""
        self._id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def choice(self, choice: Choice, reply: Reply) -> ChoiceShape:
        """The forms of one of its choices."""
        return self.choice_shape(choice, reply, self._tokenizer)

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer, complete."""
        return {**self._head(self.whole_object), "choices": choices, "usage": usage}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A piece of one of its choices."""
        return {**self._head(self.chunk_object), "choices": [choice]}

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk for `stream_options.include_usage`."""
        return {**self._head(self.chunk_object), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "system_fingerprint": self.fingerprint}


class ChatShape(Shape):
    """`POST /v1/chat/completions`."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    choice_shape = ChatChoiceShape


class CompletionShape(Shape):
    """`POST /v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    choice_shape = CompletionChoiceShape
