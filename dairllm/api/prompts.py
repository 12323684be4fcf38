"""From a request to what the model is to do: its prompts as token ids, its sampling with what the settings say where it says nothing."""

import secrets
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from dairllm.api.api_error import ApiError
from dairllm.api.choices import Choice
from dairllm.api.fields import Prompt
from dairllm.api.schema import ChatRequest, CompletionRequest
from dairllm.config import Sampling
from dairllm.errors import printable
from dairllm.serving.reply import Order
from dairllm.text.chat_renderer import ChatRenderer
from dairllm.text.tokenizer import Tokenizer

__all__ = ["ServedModel", "choices_of"]

MAX_SCORED = 1 << 17
"""Logprobs of prompts in one answer: some megabytes."""


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


def choices_of(call: ChatRequest | CompletionRequest, served: ServedModel) -> list[Choice]:
    """What the model is to do for a request. Rendering and encoding take a moment where the prompt is long: not for the event loop.

    Raises:
        ApiError: a prompt cannot be, or is longer than the context.
        ChatTemplateError: the model's template does not take this conversation.
    """
    prompts = [_chat_prompt(call, served)] if isinstance(call, ChatRequest) else _text_prompts(call, served)
    for prompt in prompts:
        if len(prompt.ids) > served.seq_len:
            raise _too_long(f"{len(prompt.ids)} tokens", served, prompt.field)
    _check_bias(call, served)
    sampling, said, n = served.sampling, call.sampling(served.sampling), call.n or 1
    seed = sampling.seed if call.seed is None else call.seed
    seed = secrets.randbits(64) if seed is None else seed
    scores_prompt = isinstance(call, CompletionRequest) and bool(call.echo) and call.n_top is not None
    if scores_prompt:
        _check_scored(sum(len(prompt.ids) for prompt in prompts) * n * (1 + (call.n_top or 0)))
    steps = sampling.steps if call.most_tokens is None else call.most_tokens
    return [
        Choice(
            index=number * n + turn,
            prompt=number,
            order=Order(
                prompt_ids=prompt.ids,
                steps=steps,
                seed=seed + turn,
                stop=call.stop,
                logit_bias=call.logit_bias,
                ignore_eos=bool(call.ignore_eos),
                logprobs=call.n_top,
                scores_prompt=scores_prompt,
                **said,
            ),
            echo=prompt.text if isinstance(call, CompletionRequest) and call.echo else None,
            unwritten=prompt.unwritten,
        )
        for number, prompt in enumerate(prompts)
        for turn in range(n)
    ]


class _Prompt(NamedTuple):
    """Attributes:
    ids: its tokens.
    text: itself.
    unwritten: tokens at its beginning that are none of the text.
    field: of the request.
    """

    ids: list[int]
    text: str
    unwritten: int
    field: str


def _chat_prompt(call: ChatRequest, served: ServedModel) -> _Prompt:
    tokenizer = served.tokenizer
    if tokenizer.chat_template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template", param="messages")
    messages = [message.fields for message in call.messages]
    goes_on = bool(call.continue_final_message)
    add_generation_prompt = not goes_on and call.add_generation_prompt is not False
    text = served.renderer.render(messages, add_generation_prompt=add_generation_prompt, variables=call.chat_template_kwargs)
    if goes_on:
        text = _open_end(text, call.messages[-1].content)
    _check_length(text, served, "messages")
    prompt_ids = tokenizer.encode(text)
    if not prompt_ids:
        raise ApiError(400, "messages: the chat template makes nothing of them", code="invalid_value", param="messages")
    return _Prompt(prompt_ids, text, 0, "messages")


def _open_end(text: str, content: str) -> str:
    """A rendered conversation up to the end of its last message, as transformers' `continue_final_message` has it."""
    bare = content.strip()
    after = text[::-1].find(bare[::-1])  # in linear time, which `rfind` does not promise
    if after < 0:
        message = "continue_final_message: the chat template changes the last message, so that its end cannot be found"
        raise ApiError(400, message, code="invalid_value", param="continue_final_message")
    at, whole = len(text) - after - len(bare), content.lstrip()
    return text[:at] + (whole if text.startswith(whole, at) else bare)


def _text_prompts(call: CompletionRequest, served: ServedModel) -> list[_Prompt]:
    one = len(call.prompt) == 1
    return [_text_prompt(prompt, "prompt" if one else f"prompt[{number}]", served) for number, prompt in enumerate(call.prompt)]


def _text_prompt(prompt: Prompt, field: str, served: ServedModel) -> _Prompt:
    tokenizer = served.tokenizer
    if isinstance(prompt, str):
        _check_length(prompt, served, field)
        prompt_ids, text = tokenizer.encode_prompt(prompt), prompt
    else:
        prompt_ids, text = list(prompt), ""
    if not prompt_ids:
        raise ApiError(400, f"{field}: it has no tokens; there is nothing to continue", code="invalid_value", param=field)
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < served.vocab_size:
        place = next(place for place, token in enumerate(prompt_ids) if not 0 <= token < served.vocab_size)
        message = f"{field}: token {place} is {printable(prompt_ids[place])}; the model knows ids 0 to {served.vocab_size - 1}"
        raise ApiError(400, message, code="invalid_value", param=field)
    if not isinstance(prompt, str):
        return _Prompt(prompt_ids, tokenizer.decode(prompt_ids, show_special=True), 0, field)
    begun = prompt_ids[0] == tokenizer.bos_id and not (tokenizer.bos_text and prompt.startswith(tokenizer.bos_text))
    return _Prompt(prompt_ids, text, int(begun), field)


def _check_bias(call: ChatRequest | CompletionRequest, served: ServedModel) -> None:
    wrong = next((token for token in call.logit_bias if token >= served.vocab_size), None)
    if wrong is not None:
        message = f"logit_bias: token {wrong}; the model knows ids 0 to {served.vocab_size - 1}"
        raise ApiError(400, message, code="invalid_value", param="logit_bias")


def _check_scored(n_entries: int) -> None:
    if n_entries > MAX_SCORED:
        message = f"logprobs: {n_entries} of them (prompts' tokens x answers x (1 + logprobs)); expected up to {MAX_SCORED} a request"
        raise ApiError(400, message, code="invalid_value", param="logprobs")


def _check_length(text: str, served: ServedModel, param: str) -> None:
    """Spare the tokenizer a text that is too long in any case."""
    least = len(text) // max(map(len, served.tokenizer.pieces))
    if least > served.seq_len:
        raise _too_long(f"at least {least} tokens", served, param)


def _too_long(found: str, served: ServedModel, param: str) -> ApiError:
    # litellm and LangChain know this error by these words, not by its code
    message = f"prompt is too long: it has {found}, and this model's maximum context length is {served.seq_len} tokens, the answer included"
    return ApiError(400, message, code="context_length_exceeded", param=param)
