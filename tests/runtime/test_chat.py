"""Chat templates: the defaults, the Jinja dialect, and templates that fail."""

from __future__ import annotations

from typing import Any

import pytest

from rlxc.errors import FormatError, OptionError, SessionError
from rlxc.runtime.chat import ChatTemplate
from rlxc.vocab import DEFAULT_TEMPLATES

HELLO = [{"role": "user", "content": "Hello"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: bool) -> str:
    return ChatTemplate(source, bos_token="<bos>", eos_token="<eos>").render(messages, **options)


class TestDefaults:
    def test_gemma(self) -> None:
        assert render(DEFAULT_TEMPLATES["<start_of_turn>"], TALK) == (
            "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
            "<start_of_turn>model\nHello!<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n"
            "<start_of_turn>model\n"
        )

    def test_gemma_without_system_message(self) -> None:
        assert render(DEFAULT_TEMPLATES["<start_of_turn>"]) == (
            "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
        )

    def test_chatml(self) -> None:
        assert render(DEFAULT_TEMPLATES["<|im_start|>"], TALK[:2]) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_llama_3(self) -> None:
        assert render(DEFAULT_TEMPLATES["<|start_header_id|>"]) == (
            "<bos><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )

    @pytest.mark.parametrize("source", DEFAULT_TEMPLATES.values(), ids=DEFAULT_TEMPLATES.keys())
    def test_the_generation_prompt_can_be_left_out(self, source: str) -> None:
        full, without = render(source), render(source, add_generation_prompt=False)
        assert full.startswith(without) and len(full) > len(without)

    @pytest.mark.parametrize("source", DEFAULT_TEMPLATES.values(), ids=DEFAULT_TEMPLATES.keys())
    def test_a_conversation_may_be_empty(self, source: str) -> None:
        assert "user" not in render(source, [])


class TestDialect:
    def test_block_lines_leave_no_trace(self) -> None:
        assert render("  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\nend") == "Hello\nend"

    def test_tokens_are_given(self) -> None:
        assert render("{{ bos_token }}{{ eos_token }}") == "<bos><eos>"

    def test_tojson_does_not_escape_for_html(self) -> None:
        assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'

    def test_tojson_indents(self) -> None:
        assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"

    def test_strftime_now_gives_the_date(self) -> None:
        assert int(render("{{ strftime_now('%Y') }}")) >= 2024

    def test_loops_can_be_left_early(self) -> None:
        assert render("{% for i in [1, 2] %}{{ i }}{% break %}{% endfor %}") == "1"

    def test_unknown_names_are_false(self) -> None:
        assert render("{% if tools %}tools{% else %}none{% endif %}") == "none"


class TestFailures:
    def test_a_template_that_does_not_parse_is_refused(self) -> None:
        with pytest.raises(FormatError, match="not a valid template"):
            ChatTemplate("{% for %}")

    def test_raise_exception_gives_its_message(self) -> None:
        with pytest.raises(SessionError, match="roles must alternate"):
            render("{{ raise_exception('roles must alternate') }}")

    @pytest.mark.parametrize(
        "source",
        [
            "{{ messages[0].content + 1 }}",
            "{{ 1 / 0 }}",
            "{{ missing.attribute }}",
            "{{ messages[9].content }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ strftime_now(1) }}",
            "{{ 'a' * 10**18 }}",
        ],
    )
    def test_an_error_while_rendering_is_one_line(self, source: str) -> None:
        with pytest.raises(SessionError, match="cannot render") as caught:
            render(source)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ render.__globals__ }}",
            "{{ messages.append(1) }}",
            "{{ raise_exception.__globals__['json'] }}",
        ],
    )
    def test_the_sandbox_holds(self, source: str) -> None:
        with pytest.raises(SessionError):
            render(source)

    def test_a_runaway_loop_is_stopped(self) -> None:
        with pytest.raises(SessionError, match="cannot render"):
            render("{% for i in range(10**9) %}{% endfor %}")

    def test_a_runaway_prompt_is_stopped(self) -> None:
        with pytest.raises(SessionError, match="longer than"):
            render("{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}")

    @pytest.mark.parametrize("message", [{}, {"role": "user"}, {"role": 3, "content": "x"}, "Hello"])
    def test_a_message_without_role_or_content_is_refused(self, message: Any) -> None:
        with pytest.raises(OptionError, match="message 1 needs"):
            ChatTemplate("").render([*HELLO, message])
