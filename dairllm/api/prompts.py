"""From a request to an order: its prompt as token ids, its sampling with what the settings say where it says nothing."""

import secrets
import time
from dataclasses import dataclass, field

from dairllm.api.api_error import ApiError
from dairllm.api.schema import ChatRequest, CompletionRequest
from dairllm.config import Sampling
from dairllm.nodes.reply import Order
from dairllm.text.chat_renderer import ChatRenderer
from dairllm.text.tokenizer import Tokenizer

__all__ = ["ServedModel", "order_of"]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is served, as far as a request can see it.

    Attributes:
        name: what clients call it.
        tokenizer: of the model.
        renderer: of its chat template; closed by whoever made it.
        seq_len: its context.
        vocab_size: of the model, which may be wider than the tokenizer's.
        sampling: of a request that says nothing.
        request_bytes: the longest body that is read.
        created: when it was first served, seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    renderer: ChatRenderer
    seq_len: int
    vocab_size: int
    sampling: Sampling = field(default_factory=Sampling)
    request_bytes: int = 8 << 20
    created: int = field(default_factory=lambda: int(time.time()))

    def check_name(self, name: str | None) -> None:
        """ApiError unless `name` is the model's, or nothing was said."""
        if name is not None and name != self.name:
            raise ApiError(404, f"the model {name[:100]!r} does not exist; {self.name!r} does", code="model_not_found", param="model")


def order_of(call: ChatRequest | CompletionRequest, served: ServedModel) -> Order:
    """What the model is to do for a request. Rendering and encoding take a moment where the prompt is long: not for the event loop.

    Raises:
        ApiError: the prompt cannot be, or is longer than the context.
        ChatTemplateError: the model's template does not take this conversation.
    """
    prompt_ids = _chat_ids(call, served) if isinstance(call, ChatRequest) else _prompt_ids(call, served)
    if len(prompt_ids) > served.seq_len:
        raise _too_long(f"{len(prompt_ids)} tokens", served, _field(call))
    sampling, steps = served.sampling, call.most_tokens
    seed = sampling.seed if call.seed is None else call.seed
    return Order(
        prompt_ids=prompt_ids,
        steps=sampling.steps if steps is None else steps,
        temperature=sampling.temperature if call.temperature is None else call.temperature,
        top_p=sampling.top_p if call.top_p is None else call.top_p,
        seed=secrets.randbits(64) if seed is None else seed,
        stop=call.stop,
    )


def _chat_ids(call: ChatRequest, served: ServedModel) -> list[int]:
    tokenizer = served.tokenizer
    if tokenizer.chat_template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template", param="messages")
    messages = [message.fields for message in call.messages]
    text = served.renderer.render(messages)
    _check_length(text, served, "messages")
    prompt_ids = tokenizer.encode(text)
    if not prompt_ids:
        raise ApiError(400, "messages: the chat template makes nothing of them", code="invalid_value", param="messages")
    return prompt_ids


def _prompt_ids(call: CompletionRequest, served: ServedModel) -> list[int]:
    if isinstance(call.prompt, str):
        _check_length(call.prompt, served, "prompt")
        prompt_ids = served.tokenizer.encode_prompt(call.prompt)
    else:
        prompt_ids = list(call.prompt)
    if not prompt_ids:
        raise ApiError(400, "prompt: it has no tokens; there is nothing to continue", code="invalid_value", param="prompt")
    for place, token in enumerate(prompt_ids):
        if not 0 <= token < served.vocab_size:
            message = f"prompt: token {place} is {token}; the model knows ids 0 to {served.vocab_size - 1}"
            raise ApiError(400, message, code="invalid_value", param="prompt")
    return prompt_ids


def _check_length(text: str, served: ServedModel, param: str) -> None:
    """Spare the tokenizer a text that is too long in any case."""
    least = len(text) // max(map(len, served.tokenizer.pieces))
    if least > served.seq_len:
        raise _too_long(f"at least {least} tokens", served, param)


def _too_long(found: str, served: ServedModel, param: str) -> ApiError:
    # litellm and LangChain know this error by these words, not by its code
    message = f"prompt is too long: it has {found}, and this model's maximum context length is {served.seq_len} tokens, the answer included"
    return ApiError(400, message, code="context_length_exceeded", param=param)


def _field(call: ChatRequest | CompletionRequest) -> str:
    return "messages" if isinstance(call, ChatRequest) else "prompt"
