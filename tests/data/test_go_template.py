"""Ollama's template says what the model's own does, or is refused."""

from typing import Any

import pytest

from preftune.data.go_template import go_template
from preftune.errors import UserError
from preftune.models.tiny import CHAT_TEMPLATE, byte_tokenizer

LED = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe \"good\".<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
TRIMMING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
REFUSED = {
    "merges the system's": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 %}{{ messages[0].content }} "
        "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "counts": "{% for m in messages %}<{{ loop.index }}>{{ m.content }}\n{% endfor %}",
    "forgets": "{% for m in messages[-3:] %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}",
}


def render_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return lambda messages, reply: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LED, TRIMMING])
def test_it_renders_what_the_models_own_does(template: str):
    render = render_with(template)
    made = go_template(render)
    for roles in ("user", "system user", "user assistant user", "system user assistant user assistant user"):
        messages = [
            {"role": role, "content": f"{{{{ {place} }}}} é\n"[:-1]} for place, role in enumerate(roles.split())
        ]
        assert made.render(messages) == render(messages, True)
    assert made.trims == (template == TRIMMING)


def test_its_text_is_gos():
    text = go_template(render_with(LED)).text()
    assert (
        '{{- if ne (index .Messages 0).Role "system" }}{{- "<|im_start|>system\\nBe \\"good\\".<|im_end|>\\n" }}'
        in text
    )
    assert text.count("{{- end }}") == text.count("{{- if") + text.count("{{- range")
    assert (
        '{{- else if eq .Role "assistant" }}{{- "<|im_start|>assistant\\n" }}{{- .Content }}{{- if not $last }}' in text
    )
    assert '"""' not in text and "\n" not in text


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_sequence_of_messages_is_refused(why: str):
    with pytest.raises(UserError, match="chat template"):
        go_template(render_with(REFUSED[why]))


def test_a_template_without_a_systems_turn_has_none():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE

    def render(messages: Any, reply: bool) -> str:
        try:
            return render_with(refusing)(messages, reply)
        except Exception as error:
            raise ValueError(str(error)) from error

    assert list(go_template(render).around) == ["user", "assistant"]
