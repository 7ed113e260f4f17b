"""Templates that only fill in blanks: which they are, and that filling in says what Jinja says."""

from pathlib import Path

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from preftune.data.pattern import fills_in, read_pattern
from preftune.data.pieces import Pieces, fewest_tokens, pieces_of
from preftune.data.template import DEFAULT_CHAT_TEMPLATE, Templater

SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for message in loop_messages %}{% set content = message.content %}"
    "{% if loop.first and system %}{{ '<<SYS>>' ~ system | trim ~ '<</SYS>>' }}{% endif %}"
    "{{ '[' + message.role + ']' + content.strip() + eos_token }}{% endfor %}"
)
FILL = [
    DEFAULT_CHAT_TEMPLATE,
    "{% for m in messages %}{{ m.get('content') }}|{% endfor %}",
    "{% set ns = namespace(c='') %}{% for m in messages %}{% set ns.c = m.content %}{{ ns.c }}-{% endfor %}",
    "{% for m in messages %}{% if 'a' in m %}x{% elif m.content is string %}{{ m['content'] }}{% endif %}{% endfor %}",
]
DEPEND = [
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{{ (' ' + m.content) | trim }}{% endfor %}",
    "{% for m in messages %}{% if 'x' in m.content %}a{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.content == 'x' %}a{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content.split('x')[-1] }}{% endfor %}",
    "{% for m in messages %}{{ m.content[0] }}{% endfor %}",
    "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m['con' ~ 'tent'] | upper }}{% endfor %}",
    "{% for m in messages %}{% for key, value in m.items() %}{{ value | upper }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{{ m['values']() | list }}{% endfor %}",
    "{{ messages | tojson }}",
    "{{ messages }}",
    "{% set ns = namespace(c='') %}{% for m in messages %}{% set ns.c = m.content %}{% endfor %}{{ ns.c | upper }}",
    "{% set n = namespace() %}{% set a = n %}{% for m in messages %}{% set n.c = m.content %}{{ a.c + 1 }}{% endfor %}",
    "{% macro say(m) %}{{ m.content | upper }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{% for m in messages | selectattr('content') %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if loop.nextitem.content == 'a' %}b{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x | upper }}{% endfor %}",
    "{% filter upper %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfilter %}",
    "{% for m in messages %}{{ raise_exception('no') if m.content != 'a' }}{{ m.content }}{% endfor %}",
    "{% for m in messages",
]
texts = st.text(min_size=1).filter(lambda text: text.strip() and text.isprintable())


def known() -> list[str]:
    """Those of TRL's collection of templates that are taken for such."""
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return [text for text in (file.read_text(encoding="utf-8") for file in files) if fills_in(text)]


@pytest.mark.parametrize("template", [SYSTEM_FIRST, *FILL])
def test_templates_that_only_write_what_is_said_are_known(kit, template):
    assert fills_in(kit.CHATML) and fills_in(template)


@pytest.mark.parametrize("template", DEPEND)
def test_whatever_looks_at_what_is_said_is_none_of_those(template):
    assert not fills_in(template)


def test_the_usual_templates_are_among_them():
    assert len(known()) >= 5


# the texts leave out a good many, and some runs more than hypothesis likes
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(texts, min_size=3, max_size=3), st.sampled_from(["", " ", "\n", " \n\t"]))
def test_filling_in_says_what_the_template_says(kit, said, space):
    contents = [space + text + space for text in said]
    roles = ("system", "user", "assistant")
    for template in (kit.CHATML, SYSTEM_FIRST, *FILL, *known()):
        tokenizer = kit.tokenizer(template)
        templater = Templater(tokenizer)
        for messages in (
            [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)],
            [{"role": role, "content": text} for role, text in zip(roles[1:], contents[1:], strict=True)],
        ):
            for prompt in (False, True):
                shown = messages[: -1 if prompt else None]
                try:
                    plain = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=prompt)
                except TemplateError:
                    continue  # no system turn, say
                assert templater.filled(shown, None, prompt) in (plain, None)
                assert templater.text(shown, None, prompt) == plain


def test_a_content_that_is_left_out_is_no_pattern():
    assert read_pattern(lambda contents: contents[0], 2) is None
    pattern = read_pattern(lambda contents: f"<{contents[1].strip()}|{contents[0]}>", 2)
    assert pattern is not None and pattern.fill([" a ", " b "]) == "<b| a >"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "<s>", "ab", " a", "\n", "é", "<|im_", "end|>"]), max_size=9
    )
)
def test_ids_of_pieces_are_those_of_the_whole(kit, parts):
    tokenizer, text = kit.tokenizer(merges=["a b", "Ġ a"]), "".join(parts)
    pieces = pieces_of(tokenizer)
    assert pieces is not None and pieces.lossless
    (ids,) = pieces.ids([text])
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert fewest_tokens(tokenizer, text) <= len(ids) <= len(text.encode())


def test_a_tokenizer_whose_special_tokens_take_white_space_is_not_cut(kit):
    from tokenizers import AddedToken

    tokenizer = kit.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<mask>", lstrip=True, special=True)]})
    assert pieces_of(tokenizer) is None


def test_a_byte_without_a_token_is_not_covered(kit):
    pieces = pieces_of(kit.tokenizer())
    assert pieces is not None and pieces.covers("\x04é")
    poor = Pieces(None, {}, absent=b"\x04")
    assert poor.lossless and poor.covers("é") and not poor.covers("\x04é")
