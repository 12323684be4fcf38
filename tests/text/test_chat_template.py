"""Chat templates: what Hugging Face's templates count on is there, what a template must not do it cannot, and its errors are one line."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dairllm.text.chat_template import ChatTemplate, failure

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "chat_templates.json").read_text(encoding="utf-8"))

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé <b>&amp;</b>"}]

CHATML = """{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
        {{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""


class FailedError(Exception):
    """What a user would be told."""


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], *, most: int = 1 << 20, **variables: object) -> str:
    seen = {"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    try:
        return ChatTemplate(template).render({**seen, "messages": list(messages), **variables}, most).decode("utf-8", "surrogatepass")
    except Exception as error:
        raise FailedError(failure(error, "64 MiB")) from error


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_real_templates_are_rendered_as_by_transformers(name: str) -> None:
    template = ChatTemplate(GOLDEN["templates"][name])
    rendered = GOLDEN["sha256 of the rendered text, null where it is refused, by template|conversation|add_generation_prompt"]
    special = {"bos_token": GOLDEN["bos_token"], "eos_token": GOLDEN["eos_token"], "tools": None, "documents": None}
    for conversation, messages in GOLDEN["conversations"].items():
        for add in (True, False):
            try:
                text = template.render({**special, "messages": messages, "add_generation_prompt": add}, 1 << 20)
            except Exception:
                found = None
            else:
                found = hashlib.sha256(text).hexdigest()
            assert found == rendered[f"{name}|{conversation}|{add}"], conversation


def test_a_conversation() -> None:
    """Blocks leave no blank lines and no indentation (trim_blocks, lstrip_blocks); nothing is escaped for HTML."""
    text = "<|im_start|>system\nBe brief.<|im_end|>\n\n<|im_start|>user\nHé <b>&amp;</b><|im_end|>\n\n"
    assert render_chat(CHATML, MESSAGES) == text + "<|im_start|>assistant\n\n"
    assert render_chat(CHATML, MESSAGES, add_generation_prompt=False) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}x{{ eos_token }}", "<s>x</s>"),
        ("{{ nothing_of_this_name }}x", "x"),
        ("{% if tools is defined and tools is none and documents is none %}none{% endif %}", "none"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Be brief."),
        ("{{ {'b': [1, 2]} | tojson(separators=(',', ':')) }}", '{"b":[1,2]}'),
        ("{{ '\ud83d' }}", "\ud83d"),
        ("{% for n in range(9) %}{% if n == 2 %}{% continue %}{% endif %}{% if n == 4 %}{% break %}{% endif %}{{ n }}{% endfor %}", "013"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ messages[1].content | tojson }}", '"Hé <b>&amp;</b>"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": [\n    2\n  ]\n}'),
        ("{{ messages[0]['content'].split(' ')[-1].strip() | upper }}", "BRIEF."),
        ("{{ messages[::-1][0].role }}", "user"),
        ("{{ '%s-%03d' % ('a', 7) }} {{ '{:>3}'.format(1) }} {{ '%s' | format(5) }}", "a-007   1 5"),
        ("{{ 2 ** 10 * 3 % 7 + 1 }} {{ 'ab' * 2 + 'c' }} {{ ([1] + [2]) * 2 }}", "7 ababc [1, 2, 1, 2]"),
        ("{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say(1) }}{{ say(2) }}", "[1][2]"),
    ],
)
def test_what_templates_count_on(template: str, text: str) -> None:
    assert render_chat(template, MESSAGES) == text


def test_the_date() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", MESSAGES) in {str(datetime.now().year), str(datetime.now().year + 1)}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\\nalternate') }}", "the chat template refuses this conversation: roles must alternate"),
        ("{% for %}", r"the chat template fails \(line 1\): Expected an expression, got 'end of statement block'$"),
        ("a\n\n{{ x | nofilter }}", r"the chat template fails \(line 3\): No filter named 'nofilter'\.$"),
        ("a\n{% if true %}\n\n{{ 1 / 0 }}\n{% endif %}", r"the chat template fails \(line 4\): ZeroDivisionError: division by zero"),
        ("{{ messages[5].content }}", r"the chat template fails \(line 1\): list object has no element 5"),
        ("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", r"the chat template fails \(line 2\): RecursionError"),
        ("{{ messages[0].content.nothing() }}", r"the chat template fails \(line 1\): 'str object' has no attribute 'nothing'"),
    ],
)
def test_a_template_that_fails(template: str, message: str) -> None:
    with pytest.raises(FailedError, match=message) as told:
        render_chat(template, MESSAGES)
    assert str(told.value).isprintable()


def test_a_message_of_a_template_is_short_and_harmless() -> None:
    with pytest.raises(FailedError) as told:
        render_chat("{{ raise_exception('\x1b[31m' ~ 'a' * 1000000) }}", MESSAGES)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 400


def test_a_prompt_has_a_longest() -> None:
    assert render_chat("{{ 'é' * 5 }}", MESSAGES, most=10) == "ééééé"
    for text in ("a" * 11, "é" * 6):
        with pytest.raises(FailedError, match="longer than"):
            render_chat("{{ messages[0].content }}", [{"content": text}], most=10)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') or 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'root'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_what_a_template_cannot_reach(template: str) -> None:
    with pytest.raises(FailedError):
        render_chat(template, MESSAGES)


def test_messages_stay_as_they_were() -> None:
    messages = [dict(message) for message in MESSAGES]
    render_chat("{% set messages = messages[1:] %}{{ messages | length }}", messages)
    assert messages == MESSAGES
