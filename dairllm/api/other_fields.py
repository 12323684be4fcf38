"""Fields of requests that are no part of `dairllm.api.schema`, by one rule:

A field that asks for another answer than it would get is refused by its name, unless it asks for what happens anyway. Any other field is
passed over; where it is none of those that concern nobody's answer, the header `x-dairllm-ignored` names it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from dairllm.api.api_error import ApiError

__all__ = ["HEADER", "check_others", "ignored_header"]

HEADER = b"x-dairllm-ignored"

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    # calls of tools, and forms of the answer
    "tools": (([],), 'or with tool_choice "none"'),
    "functions": (([],), 'or with function_call "none"'),
    "tool_choice": (("none", "auto"), ""),
    "function_call": (("none", "auto"), ""),
    "response_format": (({"type": "text"},), ""),
    "grammar": (("",), ""),
    "json_schema": (({},), ""),
    "guided_json": ((), ""),
    "guided_regex": ((), ""),
    "guided_choice": ((), ""),
    "guided_grammar": ((), ""),
    "structured_outputs": ((), ""),
    "modalities": ((["text"],), ""),
    "audio": ((), ""),
    "web_search_options": ((), ""),
    "suffix": (("",), ""),
    # what the model is told
    "chat_template": ((), ""),
    "documents": (([],), ""),
    "enable_thinking": ((), 'say chat_template_kwargs {"enable_thinking": ...}'),
    "thinking": ((), "say chat_template_kwargs, as the model's template has it"),
    "reasoning_effort": ((), "say chat_template_kwargs, as the model's template has it"),
    "verbosity": ((), ""),
    "add_special_tokens": ((), ""),
    "truncate_prompt_tokens": ((), ""),
    # how tokens are chosen, and where the answer ends
    "use_beam_search": ((False,), ""),
    "length_penalty": ((1,), ""),
    "min_tokens": ((0,), ""),
    "max_new_tokens": ((), "say max_tokens"),
    "n_predict": ((-1,), "say max_tokens"),
    "num_predict": ((-1,), "say max_tokens"),
    "stop_token_ids": (([],), ""),
    "bad_words": (([],), ""),
    "allowed_token_ids": ((), ""),
    "typical_p": ((1,), ""),
    "tfs_z": ((1,), ""),
    "top_a": ((0,), ""),
    "top_n_sigma": ((0, -1), ""),
    "mirostat": ((0,), ""),
    "dynatemp_range": ((0,), ""),
    "xtc_probability": ((0,), ""),
    "dry_multiplier": ((0,), ""),
    "no_repeat_ngram_size": ((0,), ""),
    # what is told of the answer
    "prompt_logprobs": ((), "say echo and logprobs"),
    "skip_special_tokens": ((True,), ""),
    "include_stop_str_in_output": ((False,), ""),
    "return_tokens_as_token_ids": ((False,), ""),
    "return_token_ids": ((False,), ""),
}
"""By name: values that ask for what happens anyway, beside null; what to say instead."""

_IDLE = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "prediction", "cache_prompt", "request_id", "priority",
    }
)  # fmt: skip
"""For bookkeeping or for speed."""

_ENDED_BY = {"tools": "tool_choice", "functions": "function_call"}
"""Which field says that tools are not to be called."""

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_NAMED = 32


def check_others(fields: Mapping[str, Any]) -> list[str]:
    """The names of fields that are passed over, though their sender may count on them.

    Raises:
        ApiError: one asks for what it would not get.
    """
    for name, value in fields.items():
        if name in REFUSED and value is not None and fields.get(_ENDED_BY.get(name, "")) != "none":
            _check(name, value)
    return [name for name, value in fields.items() if name not in REFUSED and name not in _IDLE and value is not None]


def ignored_header(names: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """The header that names them, or none. Names that no field has are said as `?`."""
    found = list(dict.fromkeys(name if _NAME.fullmatch(name) else "?" for name in names))
    if len(found) > _MOST_NAMED:
        found = [*found[:_MOST_NAMED], "..."]
    return [(HEADER, ", ".join(found).encode())] if found else []


def _check(name: str, value: Any) -> None:
    neutral, instead = REFUSED[name]
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
        return
    taken = f" (only {' and '.join(map(json.dumps, neutral))} {'are' if len(neutral) > 1 else 'is'})" if neutral else ""
    message = f"{name}: not supported{taken}; leave it out{', ' if instead else ''}{instead}"
    raise ApiError(400, message, code="unsupported_value", param=name)
