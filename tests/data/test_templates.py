"""Templates that come along, compared whole with texts written by hand."""

import pytest
from transformers import PreTrainedTokenizerFast

from grpo_lab.data.chat import render_prompt, template_problems, turn_end
from grpo_lab.data.examples import training_rows
from grpo_lab.data.templates import TEMPLATES, templated_as, with_template
from grpo_lab.data.tokenizer import build_tokenizer
from grpo_lab.errors import RecipeError
from grpo_lab.recipe.schema import SHIPPED_TEMPLATES, Data, Model

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]
WITHOUT_SYSTEM = {
    "chatml": "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    "<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
    "mistral": "<s>[INST] 1+1? [/INST] 2</s>[INST] And 2+2? [/INST] 4</s>",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnd 2+2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
}
PROMPT = {  # the first question after a system message, with what asks for an answer
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] Be brief.\n\n1+1? [/INST]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}
NAMES = list(TEMPLATES)


def built(name: str) -> PreTrainedTokenizerFast:
    return build_tokenizer([m["content"] for m in TALK], vocab_size=300, split_digits=True, template=name)


def test_the_schema_knows_the_templates_that_come_along():
    assert tuple(TEMPLATES) == SHIPPED_TEMPLATES


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_this_text(name):
    assert built(name).apply_chat_template(TALK, tokenize=False) == WITHOUT_SYSTEM[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_with_a_system_message_is_this_text(name):
    assert render_prompt(built(name), [SYSTEM, TALK[0]]) == PROMPT[name]


@pytest.mark.parametrize("name", NAMES)
def test_its_marks_are_single_tokens_and_sampling_stops_at_its_end(name):
    tokenizer, template = built(name), TEMPLATES[name]
    for token in (template.end, *template.others, *([template.begin] if template.begin else [])):
        assert len(tokenizer(token)["input_ids"]) == 1
    end = turn_end(tokenizer)
    assert (end.text, end.id) == (template.end, tokenizer.eos_token_id)
    assert template_problems(tokenizer, [tokenizer.eos_token_id]) == []
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_a_text_holds_marks_of_its_own_template_only(name):
    others = [t for n, t in TEMPLATES.items() if n != name]
    marks = {mark for template in others for mark in (template.end, *template.others, *template.mark)}
    assert [mark for mark in marks if mark in WITHOUT_SYSTEM[name] + PROMPT[name]] == []


def learnt(tokenizer, load, rows, **settings) -> list:
    data = Data(source="file", path="d.jsonl", **settings)
    return list(training_rows(data, load(rows, data), tokenizer, loss_on="completion", max_length=500))


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_learnt_with_its_end_exactly_once(name, load):
    tokenizer = built(name)
    (row,) = learnt(tokenizer, load, [{"m": TALK}], messages="m")
    ids = row.prompt_ids + row.completion_ids
    taught = [token for token, learn in zip(row.completion_ids, row.learn, strict=True) if learn]
    end = TEMPLATES[name].end
    lead = " " if name == "mistral" else ""
    assert tokenizer.decode(taught) == f"{lead}2{end}{lead}4{end}"
    assert taught.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(ids) == WITHOUT_SYSTEM[name].rstrip("\n")


@pytest.mark.parametrize("name", NAMES)
def test_prompt_with_completion_and_one_exchange_are_the_same_tokens(name, load):
    tokenizer = built(name)
    (pair,) = learnt(tokenizer, load, [{"q": "1+1?", "a": "2"}], prompt="q", completion="a", system_prompt="Be brief.")
    (talk,) = learnt(tokenizer, load, [{"m": [SYSTEM, *TALK[:2]]}], messages="m")
    assert pair == talk
    assert tokenizer.decode(pair.prompt_ids) == PROMPT[name]


@pytest.mark.parametrize("name", NAMES)
def test_only_the_last_answer_is_learnt_where_asked(name, load):
    tokenizer = built(name)
    data = Data(source="file", path="d.jsonl", messages="m")
    rows = load([{"m": TALK}], data)
    every, last = (
        training_rows(data, rows, tokenizer, loss_on="completion", max_length=500, learn_turns=turns)[0]
        for turns in ("all", "last")
    )
    assert last.prompt_ids + last.completion_ids == every.prompt_ids + every.completion_ids
    lead = " " if name == "mistral" else ""
    assert tokenizer.decode(last.completion_ids) == f"{lead}4{TEMPLATES[name].end}"
    assert all(last.learn)


@pytest.mark.parametrize(
    "name, talk, cause",
    [
        ("mistral", [TALK[0], TALK[0]], "user and assistant take turns; message 2 of them is by user"),
        ("mistral", [TALK[1]], "user and assistant take turns; message 1 of them is by assistant"),
        ("mistral", [TALK[0], SYSTEM], "user and assistant take turns; message 2 of them is by system"),
        ("llama3", [TALK[0], SYSTEM], "and system in front; message 2 is by system"),
        ("llama3", [{"role": "tool", "content": "7"}], "and system in front; message 1 is by tool"),
    ],
)
def test_roles_that_a_template_does_not_know_are_refused(name, talk, cause):
    with pytest.raises(RecipeError, match=cause):
        render_prompt(built(name), talk)


@pytest.mark.parametrize("start", ["<s>[INST] 1+1? [/INST]", "<|im_start|>user\n1+1?", "\n<|begin_of_text|>hm"])
def test_a_message_that_was_templated_already_is_refused(start):
    assert templated_as(start)
    with pytest.raises(RecipeError, match="(?s)already written in a chat template, .* would be put into a second one"):
        render_prompt(built("chatml"), [{"role": "user", "content": start}])


def test_a_pretrained_tokenizer_gets_a_template_whose_tokens_it_has():
    llama = build_tokenizer([], vocab_size=300, split_digits=True, template="llama3")
    llama.chat_template, llama.eos_token = None, "<|begin_of_text|>"
    assert with_template(llama, "llama3").eos_token == "<|eot_id|>"
    assert llama.apply_chat_template(TALK, tokenize=False) == WITHOUT_SYSTEM["llama3"]
    with pytest.raises(RecipeError, match='chatml ends turns with "<.im_end.>", which is no token'):
        with_template(llama, "chatml")
    half = build_tokenizer([], vocab_size=300, split_digits=True, template="mistral")
    half.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    with pytest.raises(RecipeError, match='llama3 writes "<.start_header_id.>", which is no token'):
        with_template(half, "llama3")


def test_a_built_tokenizer_has_one_of_these_templates_only():
    config = {"model_type": "llama"}
    assert Model(config=config, tokenizer={"vocab_size": 300}, chat_template="llama3").chat_template == "llama3"
    with pytest.raises(ValueError, match="a built tokenizer has the tokens of one of the templates chatml, mistral"):
        Model(config=config, tokenizer={"vocab_size": 300}, chat_template="own.jinja")
