"""Chat templates: what Hugging Face's templates count on is there, what a template must not do it cannot, and its errors are one line."""

from datetime import datetime

import pytest

from dairllm.text.chat import MAX_PROMPT_CHARACTERS, ChatTemplateError, render_chat

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
        ("{% if tools is defined %}tools{% endif %}x", "x"),
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
    assert render_chat(template, MESSAGES, bos="<s>", eos="</s>") == text


def test_the_date() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", MESSAGES) in {str(datetime.now().year), str(datetime.now().year + 1)}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model has no chat template"),
        ("", "the model has no chat template"),
        ("{{ raise_exception('roles must\\nalternate') }}", "the chat template refuses this conversation: roles must alternate"),
        ("{% for %}", r"the chat template fails \(line 1\): "),
        ("a\n\n{{ x | nofilter }}", r"the chat template fails \(line 3\): No filter named 'nofilter'\."),
        ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError: division by zero"),
        ("{{ messages[5].content }}", "the chat template fails: list object has no element 5"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template fails: RecursionError"),
        ("{{ messages[0].content.nothing() }}", "the chat template fails: 'str object' has no attribute 'nothing'"),
    ],
)
def test_a_template_that_fails(template: str | None, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message) as failure:
        render_chat(template, MESSAGES)
    assert "\n" not in str(failure.value)


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
    with pytest.raises(ChatTemplateError):
        render_chat(template, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 10 ** 9 * [1] }}",
        "{% set big = 10 ** 1000 %}{{ big ** 1000 }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10 ** 9) }}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_little_does_not_become_much(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render_chat(template, MESSAGES)


def test_a_long_conversation_is_none_of_that() -> None:
    long = "word " * 200_000
    assert len(render_chat(CHATML, [{"role": "user", "content": long}])) > len(long)
    assert len(long) < MAX_PROMPT_CHARACTERS


def test_messages_stay_as_they_were() -> None:
    messages = [dict(message) for message in MESSAGES]
    render_chat("{% set messages = messages[1:] %}{{ messages | length }}", messages)
    assert messages == MESSAGES
