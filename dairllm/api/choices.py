"""The answers to one request, asked of the model one after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dairllm.serving.reply import Order, Reply
from dairllm.serving.service import Service

__all__ = ["Choice", "Choices"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers.

    Attributes:
        index: its number.
        prompt: the number of its prompt, which it may have in common with others.
        order: what the model is to do.
        echo: the prompt's text, where the answer begins with that; else None.
        unwritten: so many tokens at the prompt's beginning are none of its text.
    """

    index: int
    prompt: int
    order: Order
    echo: str | None = None
    unwritten: int = 0


class Choices:
    """Takes a place in line for the first answer; for each of the others when the one before is complete, so that a request for many does
    not keep the model from other requests.

    Args:
        wanted: at least one.
        whole: each is read when it is complete.
        request_id: who asks, in the log.

    Raises:
        UnavailableError, QueueFullError: as `Service.ask`.
    """

    def __init__(self, wanted: Sequence[Choice], service: Service, *, whole: bool, request_id: str = "") -> None:
        self._wanted, self._service, self._whole, self._request_id = wanted, service, whole, request_id
        self._abandoned = False
        self.replies = [self._ask(wanted[0], again=False)]

    def answered(self) -> Iterator[tuple[Choice, Reply]]:
        """Each choice and its reply, when it is its turn; the one before must have been read.

        Raises:
            UnavailableError: the model has been lost meanwhile.
        """
        for choice in self._wanted:
            if choice.index:
                self.replies.append(self._ask(choice, again=True))
                if self._abandoned:
                    self.abandon()
            yield choice, self.replies[-1]

    def abandon(self) -> None:
        """Nobody reads any more."""
        self._abandoned = True
        self.replies[-1].abandon()

    def usage(self) -> dict[str, Any]:
        """Tokens of all answers; of a prompt that several answers have in common, once."""
        of_prompts = {choice.prompt: reply for choice, reply in reversed([*zip(self._wanted, self.replies, strict=False)])}
        n_prompt = sum(len(reply.order.prompt_ids) for reply in of_prompts.values())
        n_ids = sum(reply.n_ids for reply in self.replies)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_ids,
            "total_tokens": n_prompt + n_ids,
            "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in of_prompts.values())},
        }

    def _ask(self, choice: Choice, *, again: bool) -> Reply:
        return self._service.ask(choice.order, whole=self._whole, request_id=self._request_id, again=again)
