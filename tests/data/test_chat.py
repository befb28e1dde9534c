import pytest

from grpo_lab.data import chat
from grpo_lab.data.chat import (
    TurnEnd,
    check_messages,
    encode_chat,
    encode_plain,
    known_prompt,
    prefills_thinking,
    render_prompt,
    render_turns,
    template_problems,
    turn_end,
)
from grpo_lab.data.templates import TEMPLATES
from grpo_lab.errors import RecipeError

HI = [{"role": "user", "content": "Hi"}]
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "B?"},
    {"role": "assistant", "content": "<think>hm</think>b"},
    {"role": "user", "content": "bye"},
]
END = TurnEnd(2, "<|im_end|>")
THINKING = TEMPLATES["chatml"].text.replace("assistant\\n'", "assistant\\n<think>\\n'")
FORGETFUL = (  # rewrites earlier turns, as the templates of reasoning models do
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def problem(function, *arguments):
    with pytest.raises(RecipeError) as error:
        function(*arguments)
    return str(error.value)


def test_a_prompt_ends_where_the_assistant_begins(tokenizer):
    assert render_prompt(tokenizer, HI) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_without_a_template_says_what_to_set(tokenizer):
    tokenizer.chat_template = None

    assert problem(render_prompt, tokenizer, HI) == (
        "the tokenizer has no chat template: set model.chat_template: chatml, or data.chat: false"
    )


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str' object is unsafe."),
        ("{{ messages[0].content + 1 }}", 'TypeError: can only concatenate str (not "int") to str'),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        (
            "{% for i in range(10**9) %}{% endfor %}",
            "OverflowError: Range too big. The sandbox blocks ranges larger than ",
        ),
        ("{% for", "TemplateSyntaxError: unexpected 'end of template'"),
        ("{{ messages[0].x.y }}", "UndefinedError: 'dict object' has no attribute 'x'"),
    ],
)
def test_a_hostile_template_is_refused_with_its_cause(tokenizer, template, expected):
    tokenizer.chat_template = template

    assert problem(render_prompt, tokenizer, HI).startswith(
        f"the chat template cannot write messages with the roles user: {expected}"
    )


def test_a_template_that_drops_the_question_is_refused(tokenizer):
    tokenizer.chat_template = "Answer:"

    assert problem(render_prompt, tokenizer, HI) == (
        'the chat template leaves out the last message ("Hi"), so the model would not see it; '
        "set model.chat_template: chatml, or give another template"
    )


def test_turns_joined_are_the_templates_own_text(tokenizer):
    pieces = render_turns(tokenizer, TALK, END)
    joined = "".join(text + ("<|im_end|>" if learnt else "") for text, learnt in pieces)

    assert joined + "\n" == tokenizer.apply_chat_template(TALK[:5], tokenize=False)
    assert [text for text, learnt in pieces if learnt] == ["a", "<think>hm</think>b"]


def test_text_before_each_turn_is_what_sampling_sees_there(tokenizer):
    (first, _), (answer, _), (second, _), _ = render_turns(tokenizer, TALK, END)

    assert first == render_prompt(tokenizer, TALK[:2])
    assert first + answer + "<|im_end|>" + second == render_prompt(tokenizer, TALK[:4])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    turns = [*HI, {"role": "assistant", "content": "<think>hm</think>b"}, *HI, {"role": "assistant", "content": "c"}]

    assert problem(render_turns, tokenizer, turns, END) == (
        "the chat template writes the first 3 messages differently once message 4 follows, so training would not see "
        "what sampling sees; train on prompt and completion, or set model.chat_template: chatml"
    )
    assert len(render_turns(tokenizer, turns[:2], END)) == 2


def test_a_template_that_drops_the_assistants_words_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'user' %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )

    assert problem(render_turns, tokenizer, [*HI, {"role": "assistant", "content": "yes"}], END) == (
        'the chat template leaves out the assistant\'s words ("yes")'
    )


def test_the_end_of_a_turn_is_found(tokenizer):
    assert turn_end(tokenizer) == END


def test_a_template_may_end_turns_with_a_token_that_is_not_eos(tokenizer):
    tokenizer.eos_token = "<|pad|>"

    assert turn_end(tokenizer) == END
    assert template_problems(tokenizer, [0]) == [
        "the chat template ends a turn with <|im_end|> (id 2), but sampling stops at <|pad|> (id 0): answers would run "
        "on to the length limit; add the id to eos_token_id in the model's generation_config.json"
    ]
    assert template_problems(tokenizer, [0, 2]) == []


def test_a_template_may_end_turns_without_a_special_token(tokenizer):
    tokenizer.chat_template = NO_END

    assert turn_end(tokenizer) is None
    assert template_problems(tokenizer, [2]) == []


def test_a_template_that_opens_the_thinking_is_noticed(tokenizer):
    assert not prefills_thinking(tokenizer)
    tokenizer.chat_template = THINKING

    assert prefills_thinking(tokenizer)


def test_templated_text_gets_no_second_bos(bos_tokenizer):
    assert encode_chat(bos_tokenizer, "<|im_start|>user")[:2] == (1, bos_tokenizer.convert_tokens_to_ids("u"))


def test_a_template_that_writes_bos_twice_is_refused(bos_tokenizer):
    assert problem(encode_chat, bos_tokenizer, "<|im_start|><|im_start|>user") == (
        "the chat template writes the token that begins a text (<|im_start|>, id 1) twice; correct the template"
    )


def test_plain_text_gets_bos_once(bos_tokenizer):
    letter = bos_tokenizer.convert_tokens_to_ids("a")

    assert encode_plain(bos_tokenizer, "a") == (1, letter)
    assert encode_plain(bos_tokenizer, "<|im_start|>a") == (1, letter)


def test_plain_text_gets_no_bos_from_a_tokenizer_that_adds_none(tokenizer):
    assert encode_plain(tokenizer, "a") == (tokenizer.convert_tokens_to_ids("a"),)


def test_a_prompt_is_written_once(tokenizer, monkeypatch):
    expected = render_prompt(tokenizer, HI)
    assert known_prompt(tokenizer, HI) == expected

    monkeypatch.setattr(chat, "render_prompt", lambda *_: pytest.fail("it was known"))
    assert known_prompt(tokenizer, [dict(HI[0])]) == expected


def test_a_prompt_is_not_remembered_for_another_template(tokenizer):
    known_prompt(tokenizer, HI)
    tokenizer.chat_template = THINKING

    assert known_prompt(tokenizer, HI).endswith("<think>\n")


def test_plain_text_never_ends_in_eos(bos_tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )

    assert encode_plain(bos_tokenizer, "a") == (1, bos_tokenizer.convert_tokens_to_ids("a"))


@pytest.mark.parametrize(
    "value, expected",
    [
        ("Hi", 'expected a list of messages {role, content}, found "Hi"'),
        ([], "expected a list of messages {role, content}, found []"),
        ([{"from": "human", "value": "Hi"}], "message 1: expected {role, content}, found the keys from, value"),
        ([*HI, "x"], 'message 2: expected {role, content}, found "x"'),
        ([{"role": "human", "content": "Hi"}], 'message 1: role "human" is not one of system, user, assistant, tool'),
        ([{"role": "user", "content": None}], "message 1: content should be text, found None"),
    ],
)
def test_broken_messages_are_described(value, expected):
    assert problem(check_messages, value) == expected
