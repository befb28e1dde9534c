import os
from itertools import islice
from pathlib import Path

import pytest

from grpo_lab.data import tokens
from grpo_lab.data.examples import (
    TrainingRow,
    check_prompts,
    check_training_rows,
    corpus,
    prompt_examples,
    short_prompts,
    training_rows,
)
from grpo_lab.data.sources import load_rows
from grpo_lab.data.stream import PromptStream, Stream
from grpo_lab.data.templates import TEMPLATES
from grpo_lab.data.tokenizer import build_tokenizer
from grpo_lab.data.tokens import known
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import Data

REAL_DATA = Path(os.environ.get("GRPO_LAB_DATA", Path(__file__).parents[3] / "shared" / "data"))
EOS = 2


def recipe(**settings):
    return Data(source="file", path="d.jsonl", **settings)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def examples(load, tokenizer):
    def made(rows, **settings):
        data = recipe(**settings)
        return prompt_examples(data, load(rows, data), tokenizer)

    return made


@pytest.fixture
def training(load, tokenizer):
    def made(rows, loss_on="completion", max_length=1000, tokenizer=tokenizer, **settings):
        data = recipe(**settings)
        return training_rows(data, load(rows, data), tokenizer, loss_on=loss_on, max_length=max_length)

    return made


def problem(function, *arguments, **settings):
    with pytest.raises(RecipeError) as error:
        list(function(*arguments, **settings))
    return str(error.value)


# prompts


def test_a_plain_prompt_is_the_column_as_it_is(examples, tokenizer):
    (example,) = examples([{"q": " 1+1= ", "answer": "2"}], prompt="q", chat=False)

    assert (example.id, example.prompt, example.messages) == ("d-0", " 1+1= ", None)
    assert tokenizer.decode(example.prompt_ids) == " 1+1= "
    assert example.columns == {"q": " 1+1= ", "answer": "2"}


def test_a_chat_prompt_goes_through_the_template_with_the_system_prompt(examples, tokenizer):
    (example,) = examples([{"q": "1+1?"}], prompt="q", system_prompt="Be brief.")

    assert example.prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(example.prompt_ids) == example.prompt
    assert example.messages == ({"role": "system", "content": "Be brief."}, user("1+1?"))


def test_a_template_is_filled_with_columns(examples):
    (example,) = examples([{"body": "Ann has {2}.", "n": 7}], prompt="{body} Add {n}. {{x}}", chat=False)

    assert example.prompt == "Ann has {2}. Add 7. {x}"


def test_messages_end_at_the_last_user_turn(examples):
    talk = [user("A?"), assistant("a"), user("B?"), assistant("b")]
    (example,) = examples([{"talk": talk}], messages="talk")

    assert example.messages == tuple(talk[:3])
    assert example.prompt.endswith("user\nB?<|im_end|>\n<|im_start|>assistant\n")
    assert example.columns["talk"] == talk


def test_the_answer_is_cut_out_of_its_column(examples):
    (example,) = examples(
        [{"q": "x", "answer": "1+1=2\n#### 2"}], prompt="q", answer={"column": "answer", "extract": "hash"}
    )

    assert example.columns == {"q": "x", "answer": "2"}


def test_a_number_as_answer_becomes_text(examples):
    (example,) = examples([{"q": "x", "gold": 51.5}], prompt="q", answer={"column": "gold"})

    assert example.columns["answer"] == "51.5"


def test_examples_are_made_when_asked_for(examples):
    made = examples([{"q": "a"}, {"q": ""}], prompt="q")

    assert (len(made), made[0].id) == (2, "d-0")
    with pytest.raises(RecipeError):
        made[1]


def test_streamed_examples_equal_held_ones(examples):
    rows = [{"q": f"{number}?"} for number in range(5)]
    streamed = examples(rows, prompt="q", streaming=True)

    assert isinstance(streamed, Stream)
    assert list(streamed) == list(examples(rows, prompt="q"))
    assert [example.id for example in PromptStream(streamed, 3, seed=0).at(1)] == ["d-3", "d-4", "d-0"]


def test_a_missing_column_suggests_the_nearest(examples):
    rows = [{"question": "x", "answer": "2"}]

    assert problem(examples, rows, prompt="qestion", answer={"column": "gold"}) == (
        'data.prompt: column "qestion" is not in the data; did you mean "question"? it has: question, answer\n'
        'data.answer.column: column "gold" is not in the data; known: question, answer'
    )
    assert problem(examples, rows, prompt="{qestion}") == (
        'data.prompt: column "qestion" is not in the data; did you mean "question"? it has: question, answer'
    )


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{q", "is no template: expected '}' before end of string; write a literal brace twice"),
        ("{}", "a place holds a column name and nothing else; write a literal brace twice"),
        ("{q:>5}", "a place holds a column name and nothing else; write a literal brace twice"),
        ('{"q": 1}', "a place holds a column name and nothing else; write a literal brace twice"),
        ("{{q}}", "names no column, so all rows would be the same; write {column}"),
    ],
)
def test_a_broken_template_is_described(examples, template, expected):
    found = problem(examples, [{"q": "x"}], prompt=template)

    assert found.startswith(f'data.prompt: "{template}"')
    assert found.endswith(expected)


@pytest.mark.parametrize(
    "row, settings, expected",
    [
        ({"q": " \n"}, {}, "data.prompt: the text is empty"),
        ({"q": 5}, {}, 'data.prompt: "q" should be text, found 5'),
        ({"q": ["x"]}, {"prompt": "{q}!"}, "data.prompt: \"q\" should be text or a number, found ['x']"),
        ({"q": None}, {}, 'data.prompt: there is no "q"'),
        (
            {"q": "x", "a": "so it is 2"},
            {"answer": {"column": "a", "extract": "hash"}},
            "data.answer: extract: hash finds nothing in \"a\": 'so it is 2'",
        ),
        (
            {"q": "x", "a": ["2"]},
            {"answer": {"column": "a", "extract": "hash"}},
            "data.answer: \"a\" should be text, found ['2']",
        ),
        (
            {"q": "x", "a": r"so \boxed{}"},
            {"answer": {"column": "a", "extract": "boxed"}},
            "data.answer: extract: boxed finds nothing in \"a\": 'so \\\\boxed{}'",
        ),
        ({"q": [assistant("x")]}, {"messages": "q"}, "data.messages: there is no user turn to answer"),
        ({"q": [user(" ")]}, {"messages": "q"}, "data.messages: the last user turn is empty"),
        (
            {"q": [{"role": "system", "content": "S"}, user("x")]},
            {"messages": "q", "system_prompt": "T"},
            "data.system_prompt: the messages have a system message of their own; leave one of them out",
        ),
        (
            {"q": [{"role": "bot", "content": "x"}]},
            {"messages": "q"},
            'message 1: role "bot" is not one of system, user, assistant, tool',
        ),
    ],
)
def test_a_row_that_is_no_prompt_is_named(examples, row, settings, expected):
    good = [user("x")] if "messages" in settings else "x"
    settings = settings if {"messages", "prompt"} & settings.keys() else {"prompt": "q", **settings}
    found = problem(examples, [{"q": good, "a": "#### 1"} | {}, row], limit=None, skip=1, **settings)

    assert found == f"d.jsonl, row 1 (from 0): {expected}"


def test_plain_text_is_no_prompt(examples):
    assert problem(examples, [{"t": "x"}], text="t") == (
        "data.text: plain text has no prompt to sample from; use data.prompt or data.messages"
    )


def test_messages_need_the_chat_template(examples):
    assert problem(examples, [{"m": [user("x")]}], messages="m", chat=False) == (
        "data.chat: messages need the chat template; leave out chat: false"
    )


def test_a_tokenizer_without_a_template_is_found_before_any_row(examples, tokenizer):
    tokenizer.chat_template = None

    assert len(examples([{"q": "x"}], prompt="q", chat=False)) == 1
    assert problem(examples, [{"q": "x"}], prompt="q") == (
        "the tokenizer has no chat template: set model.chat_template: chatml, or data.chat: false"
    )


def test_a_tokenizer_without_eos_is_refused(examples, tokenizer):
    tokenizer.eos_token = None

    assert problem(examples, [{"q": "x"}], prompt="q", chat=False) == (
        "model.tokenizer: the tokenizer has no EOS token, so no text could ever end; use another one"
    )


def test_prompts_that_leave_no_room_are_named_with_both_numbers(examples):
    made = examples([{"q": "x"}, {"q": "x" * 30}, {"q": ""}], prompt="q", chat=False)

    assert check_prompts(made, context_length=40, max_completion_length=16) == [
        "d-1: the prompt has 30 tokens; with max_completion_length 16 that is more than the model's context of 40",
        "d.jsonl, row 2 (from 0): data.prompt: the text is empty",
    ]
    assert check_prompts(made[:2], context_length=46, max_completion_length=16) == []


def test_after_ten_problems_the_rest_is_left_out(examples):
    found = check_prompts(examples([{"q": ""}] * 15, prompt="q"), context_length=40, max_completion_length=16)

    assert (len(found), found[-1]) == (11, "... and more")


def test_prompts_that_are_too_long_are_left_out(examples, training):
    rows = [{"q": "1+1="}, {"q": "1+1=" * 20}, {"q": "2+2="}]
    found = examples(rows, prompt="q", chat=False)
    assert len(found) == 3
    short = short_prompts(found, len(found[0].prompt_ids))
    assert [example.prompt for example in short] == ["1+1=", "2+2="]
    assert [example.id for example in short] == [found[0].id, found[2].id]
    with pytest.raises(RecipeError, match="data.max_prompt_tokens: every one of 3 prompts has more than 1 tokens"):
        short_prompts(found, 1)
    rows = [{"q": "1+1=", "a": "2"}]
    with pytest.raises(RecipeError, match="data.max_prompt_tokens: is for prompts to sample from"):
        training(rows, prompt="q", completion="a", max_prompt_tokens=9)
    with pytest.raises(ValueError, match="max_prompt_tokens looks at every row first"):
        recipe(prompt="q", streaming=True, max_prompt_tokens=9)


def test_streamed_prompts_are_checked(examples):
    made = examples([{"q": "x"}, {"q": ""}, {"q": "y"}], prompt="q", streaming=True)

    assert check_prompts(made, context_length=400, max_completion_length=16) == [
        "d.jsonl, row 1 (from 0): data.prompt: the text is empty"
    ]


def test_a_streamed_file_that_breaks_off_is_one_problem(tmp_path, tokenizer):
    (tmp_path / "d.jsonl").write_text('{"q": "x"}\n{"q": \n{"q": "y"}\n')
    data = recipe(prompt="q", streaming=True)
    made = prompt_examples(data, load_rows(data, root=tmp_path, seed=0), tokenizer)

    assert check_prompts(made, context_length=400, max_completion_length=16) == [
        f"{tmp_path}/d.jsonl:2: not JSON: Expecting value: line 2 column 1 (char 7)"
    ]


# rows to learn


def test_a_completion_is_learnt_with_eos_once(training, tokenizer):
    (row,) = training([{"q": "1+1=", "a": " 2"}], prompt="q", completion="a", chat=False)

    assert tokenizer.decode(row.prompt_ids) == "1+1="
    assert row.completion_ids == (*tokenizer(" 2")["input_ids"], EOS)
    assert row.learn == (True,) * len(row.completion_ids)


def test_a_chat_completion_follows_the_prompt_that_sampling_sees(training, examples, tokenizer):
    rows = [{"q": "1+1?", "a": "<think>hm</think>2"}]
    (row,) = training(rows, prompt="q", completion="a", system_prompt="S")
    (example,) = examples(rows, prompt="q", system_prompt="S")

    assert row.prompt_ids == example.prompt_ids
    assert row.completion_ids == (*tokenizer("<think>hm</think>2")["input_ids"], EOS)


def test_prompt_and_completion_are_tokenised_apart(load):
    tokenizer = build_tokenizer(["ab ab ab ab"], vocab_size=260, split_digits=True)
    data = recipe(prompt="q", completion="a", chat=False)
    (row,) = training_rows(data, load([{"q": "a", "a": "b"}], data), tokenizer, loss_on="completion", max_length=9)

    assert len(tokenizer("ab")["input_ids"]) == 1
    assert row == TrainingRow(tuple(tokenizer("a")["input_ids"]), (*tokenizer("b")["input_ids"], EOS), (True, True))


def test_eos_is_learnt_when_padding_is_eos(training, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    (row,) = training([{"q": "x", "a": "y"}], prompt="q", completion="a")

    assert (row.completion_ids[-1], row.learn[-1]) == (tokenizer.pad_token_id, True)


def test_only_assistant_turns_of_a_conversation_are_learnt(training, tokenizer):
    talk = [user("A?"), assistant("a"), user("B?"), assistant("b"), user("bye")]
    (row,) = training([{"talk": talk}], messages="talk")
    learnt = [token for token, learn in zip(row.completion_ids, row.learn, strict=True) if learn]

    assert tokenizer.decode(learnt) == "a<|im_end|>b<|im_end|>"
    assert tokenizer.decode(row.prompt_ids) == "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(row.prompt_ids + row.completion_ids) + "\n" == tokenizer.apply_chat_template(
        talk[:4], tokenize=False
    )


def test_plain_text_is_learnt_after_its_first_token(training, tokenizer):
    (row,) = training([{"t": "xyz"}], text="t")
    ids = tuple(tokenizer("xyz")["input_ids"])

    assert row == TrainingRow(ids[:1], (*ids[1:], EOS), (True,) * len(ids))


def test_plain_text_is_learnt_whole_after_bos(training, bos_tokenizer):
    (row,) = training([{"t": "xyz"}], text="t", tokenizer=bos_tokenizer)
    ids = tuple(bos_tokenizer("xyz", add_special_tokens=False)["input_ids"])

    assert row == TrainingRow((1,), (*ids, EOS), (True,) * (len(ids) + 1))


def test_loss_on_all_learns_everything_after_the_first_token(training):
    rows = [{"q": "1+1?", "a": "2"}]
    (part,) = training(rows, prompt="q", completion="a")
    (whole,) = training(rows, prompt="q", completion="a", loss_on="all")

    assert whole.prompt_ids + whole.completion_ids == part.prompt_ids + part.completion_ids
    assert (len(whole.prompt_ids), set(whole.learn)) == (1, {True})


def test_a_template_without_an_end_token_learns_eos(training, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (row,) = training([{"q": "x", "a": " y"}], prompt="q", completion="a")

    assert tokenizer.decode(row.prompt_ids + row.completion_ids) == "user: x\nassistant: y<|im_end|>"
    assert problem(training, [{"m": [user("x"), assistant("y")]}], messages="m") == (
        "data.messages: the chat template writes no special token after an assistant's turn, so the model would not "
        "learn to stop; set model.chat_template: chatml, or train on prompt and completion"
    )


def test_a_templates_own_end_token_is_learnt_where_it_is_not_eos(training, tokenizer):
    tokenizer.eos_token = "<|pad|>"
    (chat,) = training([{"q": "x", "a": "y"}], prompt="q", completion="a")
    (plain,) = training([{"q": "x", "a": "y"}], prompt="q", completion="a", chat=False)

    assert (chat.completion_ids[-1], plain.completion_ids[-1]) == (2, 0)


@pytest.mark.parametrize(
    "row, settings, expected",
    [
        (
            {"q": "x", "a": "y<|im_end|>"},
            {"prompt": "q", "completion": "a"},
            "data.completion: the text holds <|im_end|>, which is added where it ends; leave it out",
        ),
        (
            {"q": [user("x"), assistant("y<|im_end|>z")]},
            {"messages": "q"},
            "data.messages: the text holds <|im_end|>, which is added where it ends; leave it out",
        ),
        (
            {"q": "x<|im_end|>"},
            {"text": "q"},
            "data.text: the text holds <|im_end|>, which is added where it ends; leave it out",
        ),
        ({"q": "x", "a": ""}, {"prompt": "q", "completion": "a"}, "data.completion: the text is empty"),
        ({"q": "x" * 30}, {"text": "q"}, "the row has 31 tokens, more than max_length 20"),
        (
            {"q": [assistant("x"), user("y")]},
            {"messages": "q"},
            "data.messages: there is no assistant turn after a user turn: assistant, user",
        ),
    ],
)
def test_a_row_that_cannot_be_learnt_is_named(training, row, settings, expected):
    found = f"d.jsonl, row 0 (from 0): {expected}"

    assert problem(training, [row], max_length=20, **settings) == found
    assert check_training_rows(training([row], max_length=20, **settings)) == [found]


def test_thinking_that_the_template_opens_is_not_learnt_twice(training, tokenizer):
    tokenizer.chat_template = TEMPLATES["chatml"].text.replace("assistant\\n'", "assistant\\n<think>\\n'")

    assert len(training([{"q": "x", "a": "hm</think>y"}], prompt="q", completion="a")[0].learn) > 0
    assert problem(training, [{"q": "x", "a": "<think>hm</think>y"}], prompt="q", completion="a") == (
        "d.jsonl, row 0 (from 0): data.completion: the chat template has already written <think> in the prompt; "
        "leave it out of the completion, or set another model.chat_template"
    )


MANY = range(2500)  # more than are prepared together


@pytest.mark.parametrize(
    "row, settings",
    [
        (lambda n: {"q": f"{n}+1", "a": f" {n + 1}" if n % 3 else f"{n + 1}"}, {"prompt": "q", "completion": "a"}),
        (lambda n: {"q": f"{n}+1=", "a": str(n + 1)}, {"prompt": "q", "completion": "a", "chat": False}),
        (lambda n: {"m": [user(f"{n}?"), assistant("a"), user("b"), assistant(f"c{n}")]}, {"messages": "m"}),
        (lambda n: {"t": f"text {n}"}, {"text": "t"}),
    ],
)
def test_rows_are_the_same_all_in_turn_or_each_alone(training, bos_tokenizer, row, settings):
    rows = training([row(number) for number in MANY], tokenizer=bos_tokenizer, **settings)

    assert list(rows) == [training([row(number)], tokenizer=bos_tokenizer, **settings)[0] for number in MANY]


def test_all_rows_are_checked_and_tokenised_together(training, tokenizer, monkeypatch):
    bad = {5, 1023, 1024, 2499}
    rows = training(
        [{"q": f"{number}+1", "a": "" if number in bad else str(number)} for number in MANY],
        prompt="q",
        completion="a",
    )
    calls = []
    encoded = tokens._encoded
    monkeypatch.setattr(tokens, "_encoded", lambda it, texts: calls.append(len(texts)) or encoded(it, texts))

    assert [line.partition(":")[0] for line in check_training_rows(rows)] == [
        f"d.jsonl, row {number} (from 0)" for number in sorted(bad)
    ]
    assert len(calls) <= 2 * len(MANY) / 256 + 3
    assert sum(calls) == len(known(tokenizer).ids) == 2 * (len(MANY) - len(bad))


def test_streamed_rows_to_learn_equal_held_ones(training):
    rows = [{"q": f"{number}?", "a": f"{number}"} for number in range(4)]
    streamed = training(rows, prompt="q", completion="a", streaming=True)

    assert isinstance(streamed, Stream)
    assert list(streamed) == list(training(rows, prompt="q", completion="a"))


# a corpus


@pytest.mark.parametrize(
    "row, settings, expected",
    [
        ({"q": "1+1", "a": "2"}, {"prompt": "{q}=", "completion": "a", "system_prompt": "S"}, ["S", "1+1=", "2"]),
        ({"m": [user("x"), assistant("y")]}, {"messages": "m"}, ["x", "y"]),
        ({"t": "xyz"}, {"text": "t"}, ["xyz"]),
    ],
)
def test_a_corpus_is_the_text_of_all_rows(load, row, settings, expected):
    data = recipe(**settings)

    assert list(corpus(data, load([row, row], data))) == expected * 2


def test_a_corpus_names_the_row_that_it_cannot_read(load):
    data = recipe(text="t")

    assert problem(corpus, data, load([{"t": "x"}, {"t": 1}], data)) == (
        'd.jsonl, row 1 (from 0): data.text: "t" should be text, found 1'
    )


# real data


@pytest.mark.skipif(not (REAL_DATA / "gsm8k").is_dir(), reason=f"no real data in {REAL_DATA}; set GRPO_LAB_DATA")
def test_gsm8k_becomes_prompts_with_gold_answers_and_rows_to_learn():
    data = Data(
        source="file",
        path="gsm8k/test.jsonl",
        prompt="question",
        completion="answer",
        answer={"column": "answer", "extract": "hash"},
    )
    rows = load_rows(data, root=REAL_DATA, seed=0)
    tokenizer = build_tokenizer(islice(corpus(data, rows), 200), vocab_size=400, split_digits=True)
    prompts = prompt_examples(data, rows, tokenizer)

    assert (len(prompts), prompts[0].id, prompts[0].columns["answer"]) == (1319, "test-0", "18")
    assert check_prompts(prompts, context_length=1200, max_completion_length=200) == []
    assert check_training_rows(training_rows(data, rows, tokenizer, loss_on="completion", max_length=2000)) == []
