import json
import os
import time
from pathlib import Path

import pytest

from grpo_lab.errors import SetupError
from grpo_lab.recipe.schema import RewardTerm
from grpo_lab.scoring import bind, discover
from grpo_lab.types import Completion, Example, Group

pytest.importorskip("py3langid")
REGISTRY = discover()
ifeval = REGISTRY.get("ifeval").function
adversarial = pytest.param
FILE = Path(os.environ.get("GRPO_LAB_DATA", "../shared/data")) / "ifeval" / "input_data.jsonl"


def score(text, *pairs, **options):
    ids, kwargs = [name for name, _ in pairs], [values for _, values in pairs]
    completion = Completion(text, (1, 2, 3), finished=True)
    return ifeval(completion, instruction_id_list=ids, kwargs=kwargs, **options)


WORDS, SENTENCES = "length_constraints:number_words", "length_constraints:number_sentences"
PARAGRAPHS, FIRST = "length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word"
HIGHLIGHTS, BULLETS = "detectable_format:number_highlighted_sections", "detectable_format:number_bullet_lists"
SECTIONS, POSTSCRIPT = "detectable_format:multiple_sections", "detectable_content:postscript"
ANSWER, JSON, TITLE = (
    "detectable_format:constrained_response",
    "detectable_format:json_format",
    "detectable_format:title",
)
TWO, REPEAT, NO_COMMA = "combination:two_responses", "combination:repeat_prompt", "punctuation:no_comma"
LESS, LEAST = {"relation": "less than"}, {"relation": "at least"}


@pytest.mark.parametrize(
    "text, name, kwargs, expected",
    [
        ("a warm war", "keywords:existence", {"keywords": ["war", "Warm"]}, 1.0),
        adversarial("a warm day", "keywords:existence", {"keywords": ["war"]}, 0.0, id="inside-a-word"),
        ("War and war.", "keywords:frequency", {"keyword": "war", "frequency": 2, **LEAST}, 1.0),
        ("War and war.", "keywords:frequency", {"keyword": "war", "frequency": 2, **LESS}, 0.0),
        adversarial("warwarwar", "keywords:frequency", {"keyword": "war", "frequency": 2, **LEAST}, 0.0, id="glued"),
        ("rocky", "keywords:forbidden_words", {"forbidden_words": ["rock"]}, 1.0),
        adversarial("ROCK!", "keywords:forbidden_words", {"forbidden_words": ["rock"]}, 0.0, id="in-capitals"),
        ("Aab", "keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "at least"}, 1.0),
        ("#a #b", "keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, 0.0),
        ("यह एक कविता है जो मैंने लिखी", "language:response_language", {"language": "hi"}, 1.0),
        ("this is a poem that I wrote", "language:response_language", {"language": "hi"}, 0.0),
        adversarial("12 !!", "language:response_language", {"language": "en"}, 0.0, id="no-letters-no-language"),
        ("One two three", WORDS, {"num_words": 3, **LEAST}, 1.0),
        adversarial("- - . ! *", WORDS, {"num_words": 1, **LEAST}, 0.0, id="signs-are-no-words"),
        ("One. Two! Three?", SENTENCES, {"num_sentences": 3, **LEAST}, 1.0),
        ("One. Two! Three?", SENTENCES, {"num_sentences": 3, **LESS}, 0.0),
        ('"One." Two', SENTENCES, {"num_sentences": 2, **LEAST}, 1.0),
        adversarial("Dr. J. Lee paid 3.50 e.g. now.", SENTENCES, {"num_sentences": 2, **LESS}, 1.0, id="abbreviations"),
        adversarial(". . . ! ? ...", SENTENCES, {"num_sentences": 1, **LEAST}, 0.0, id="stops-without-words"),
        ("a\n***\nb", PARAGRAPHS, {"num_paragraphs": 2}, 1.0),
        ("***\na\n***\nb\n***", PARAGRAPHS, {"num_paragraphs": 2}, 1.0),
        adversarial("a\n***\n***\nb", PARAGRAPHS, {"num_paragraphs": 3}, 0.0, id="an-empty-paragraph"),
        adversarial("***", PARAGRAPHS, {"num_paragraphs": 1}, 0.0, id="only-a-divider"),
        ("x\n\n“President Lee", FIRST, {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"}, 1.0),
        ("x\n\nPresidents", FIRST, {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"}, 0.0),
        adversarial("x", FIRST, {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "x"}, 0.0, id="no-such-one"),
        ("[name] [a b]", "detectable_content:number_placeholders", {"num_placeholders": 2}, 1.0),
        adversarial(
            "[] [ ] [[[]]]", "detectable_content:number_placeholders", {"num_placeholders": 1}, 0.0, id="empty-[]"
        ),
        ("Hi.\nP. S. more", POSTSCRIPT, {"postscript_marker": "P.S."}, 1.0),
        ("Hi.\n**P.P.S.** more", POSTSCRIPT, {"postscript_marker": "P.P.S"}, 1.0),
        adversarial("Hi.\nP.S.", POSTSCRIPT, {"postscript_marker": "P.S."}, 0.0, id="nothing-after-it"),
        adversarial("I add a P.S. here", POSTSCRIPT, {"postscript_marker": "P.S."}, 0.0, id="talk-about-it"),
        adversarial("P.P.S more", POSTSCRIPT, {"postscript_marker": "P.S."}, 0.0, id="another-marker"),
        ("* a\n- b\ntext", BULLETS, {"num_bullets": 2}, 1.0),
        adversarial("* a\n* b\n* c", BULLETS, {"num_bullets": 2}, 0.0, id="one-too-many"),
        adversarial("*\n- \n***\n---", BULLETS, {"num_bullets": 2}, 0.0, id="bullets-of-nothing"),
        ("*a* and **b c**", HIGHLIGHTS, {"num_highlights": 2}, 1.0),
        adversarial("* a\n* b\n** **", HIGHLIGHTS, {"num_highlights": 1}, 0.0, id="bullets-are-no-highlights"),
        adversarial("2*3*4 ****", HIGHLIGHTS, {"num_highlights": 2}, 0.0, id="products"),
        ("<<My poem>>\ntext", TITLE, {}, 1.0),
        adversarial("<<>> << >> <a> <<b>", TITLE, {}, 0.0, id="no-title-in-it"),
        ("SECTION 1\na\nSECTION 2:\nb", SECTIONS, {"section_spliter": "SECTION", "num_sections": 2}, 1.0),
        ("Day I: a Day II: b", SECTIONS, {"section_spliter": "Day", "num_sections": 2}, 1.0),
        adversarial(
            "SECTION 1 a " * 3, SECTIONS, {"section_spliter": "SECTION", "num_sections": 2}, 0.0, id="same-one"
        ),
        adversarial(
            "SECTION X a SECTION a", SECTIONS, {"section_spliter": "SECTION", "num_sections": 2}, 0.0, id="no-number"
        ),
        ('{"a": 1}', JSON, {}, 1.0),
        ('```json\n{"a": 1}\n```', JSON, {}, 1.0),
        adversarial('Here: {"a": 1}', JSON, {}, 0.0, id="chatter-around-json"),
        adversarial("[" * 50_000, JSON, {}, 0.0, id="deep-json"),
        adversarial("7", JSON, {}, 0.0, id="a-number-is-no-object"),
        ("My answer is no.", ANSWER, {}, 1.0),
        adversarial("My answer is yes. My answer is no.", ANSWER, {}, 0.0, id="two-answers"),
        ("a\n******\nb", TWO, {}, 1.0),
        adversarial("a\n******\na", TWO, {}, 0.0, id="the-same-twice"),
        adversarial("a\n******\nb\n******\nc", TWO, {}, 0.0, id="three"),
        adversarial("a\n******", TWO, {}, 0.0, id="one-and-nothing"),
        ("Say hi!\nHi.", REPEAT, {"prompt_to_repeat": "Say hi!"}, 1.0),
        adversarial("Say hi!", REPEAT, {"prompt_to_repeat": "Say hi!"}, 0.0, id="the-prompt-and-nothing-else"),
        adversarial("Sure. Say hi!\nHi.", REPEAT, {"prompt_to_repeat": "Say hi!"}, 0.0, id="words-before"),
        ('Bye. "Peace!"', "startend:end_checker", {"end_phrase": "Peace!"}, 1.0),
        adversarial("Peace! Bye.", "startend:end_checker", {"end_phrase": "Peace!"}, 0.0, id="more-after-it"),
        ('"quoted"', "startend:quotation", {}, 1.0),
        ("“quoted”", "startend:quotation", {}, 1.0),
        adversarial('""', "startend:quotation", {}, 0.0, id="nothing-in-quotes"),
        adversarial('"', "startend:quotation", {}, 0.0, id="one-quote"),
        ("THIS IS ALL IN ENGLISH CAPITALS", "change_case:english_capital", {}, 1.0),
        ("THIS IS all IN ENGLISH CAPITALS", "change_case:english_capital", {}, 0.0),
        adversarial("DIES IST KEIN ENGLISCHER SATZ", "change_case:english_capital", {}, 0.0, id="capitals-not-english"),
        ("this is all in small letters", "change_case:english_lowercase", {}, 1.0),
        adversarial("12 34", "change_case:english_lowercase", {}, 0.0, id="no-letters-to-be-small"),
        (
            "I MADE it",
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "at least"},
            1.0,
        ),
        ("a b. c", NO_COMMA, {}, 1.0),
        adversarial("a， b", NO_COMMA, {}, 0.0, id="full-width-comma"),
        adversarial("", NO_COMMA, {}, 0.0, id="silence-follows-nothing"),
        adversarial(" \n", WORDS, {"num_words": 3, **LESS}, 0.0, id="white-space-follows-nothing"),
    ],
)
def test_one_instruction(text, name, kwargs, expected):
    assert score(text, (name, kwargs)) == expected


def test_the_share_or_all():
    pairs = ((NO_COMMA, {}), (TITLE, {}), (WORDS, {"num_words": 2, **LEAST}))
    assert score("a, b", *pairs) == pytest.approx(1 / 3)
    assert score("a, b", *pairs, all_of=True) == 0.0
    assert score("<<a>> b", *pairs, all_of=True) == 1.0


def test_loose_forgives_an_introduction_but_not_the_rest():
    pair = ("startend:quotation", {})
    assert score('Sure:\n"text"', pair) == 0.0
    assert score('Sure:\n"text"', pair, loose=True) == 1.0
    assert score('"text"\nIs that fine?', pair, loose=True) == 1.0
    assert score('Sure:\n"text"\nFine?', pair, loose=True) == 1.0
    assert score("*this is in small letters, all*", (NO_COMMA, {}), loose=True) == 0.0
    assert score("a, b", (NO_COMMA, {}), loose=True) == 0.0  # what is left without its only line says nothing


def test_values_of_other_instructions_are_null_as_the_hub_has_them():
    assert score("a b", (WORDS, {"num_words": 2, "relation": "at least", "keyword": None})) == 1.0


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([("punctuation:no_commas", {})], 'unknown instruction "punctuation:no_commas"; known: change_case'),
        ([(WORDS, {"num_words": 3})], "needs the kwargs ['num_words', 'relation'], found ['num_words']"),
        ([(NO_COMMA, {"num_words": 3})], "needs the kwargs [], found ['num_words']"),
        ([(WORDS, {"num_words": 3, "relation": "about"})], 'unknown relation "about"'),
        ([], "0 instructions with 0 kwargs"),
    ],
)
def test_a_row_that_cannot_be_checked_is_an_error_and_not_a_zero(pairs, message):
    with pytest.raises(ValueError) as error:
        score("text", *pairs)
    assert message in str(error.value)


def test_hostile_texts_take_no_time():
    pairs = [*all_kinds()]
    for piece in (
        "<<a",
        "[a",
        "*a ",
        "\n",
        ". ",
        "Mr. ",
        "-",
        "'",
        "P.S. ",
        "SECTION ",
        "```",
        '"',
        "a" * 50,
        "\x00",
        "\ud83d",
    ):
        started = time.perf_counter()
        score(piece * (40_000 // len(piece)), *pairs, loose=True)
        assert time.perf_counter() - started < 2, repr(piece)


def all_kinds():
    found = {}
    for name, (kwargs, _, _) in KINDS.items():
        found[name] = kwargs
    return found.items()


# For every kind: values, a text that follows the instruction, and one that does not.
ENGLISH = "this is a plain english sentence about the weather"
KINDS = {
    "change_case:capital_word_frequency": ({"capital_frequency": 2, "capital_relation": "at least"}, "A B", "a b"),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH, ENGLISH.upper()),
    REPEAT: ({"prompt_to_repeat": "Do it."}, "Do it. Done", "Done"),
    TWO: ({}, "a******b", "a"),
    "detectable_content:number_placeholders": ({"num_placeholders": 1}, "[a]", "a"),
    POSTSCRIPT: ({"postscript_marker": "P.S."}, "P.S. a", "a"),
    ANSWER: ({}, "My answer is maybe.", "maybe"),
    JSON: ({}, "[1]", "[1"),
    SECTIONS: ({"section_spliter": "Day", "num_sections": 1}, "Day 1 a", "a"),
    BULLETS: ({"num_bullets": 1}, "* a", "a"),
    HIGHLIGHTS: ({"num_highlights": 1}, "*a*", "a"),
    TITLE: ({}, "<<a>>", "a"),
    "keywords:existence": ({"keywords": ["a"]}, "a", "b"),
    "keywords:forbidden_words": ({"forbidden_words": ["a"]}, "b", "a"),
    "keywords:frequency": ({"keyword": "a", "frequency": 1, **LEAST}, "a", "b"),
    "keywords:letter_frequency": ({"letter": "a", "let_frequency": 1, "let_relation": "at least"}, "a", "b"),
    "language:response_language": ({"language": "en"}, ENGLISH, "Dies ist ein kurzer Satz"),
    FIRST: ({"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"}, "a b", "b a"),
    PARAGRAPHS: ({"num_paragraphs": 1}, "a", "a***b"),
    SENTENCES: ({"num_sentences": 1, **LEAST}, "a", "!"),
    WORDS: ({"num_words": 1, **LEAST}, "a", "!"),
    NO_COMMA: ({}, "a", ","),
    "startend:end_checker": ({"end_phrase": "a"}, "a", "b"),
    "startend:quotation": ({}, '"a"', "a"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_can_be_followed_and_broken(name):
    kwargs, follows, breaks = KINDS[name]
    assert score(follows, (name, kwargs)) == 1.0
    assert score(breaks, (name, kwargs)) == 0.0


def test_without_its_package_a_run_ends_with_the_command_that_helps(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    columns = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}
    group = Group(Example("p1", "?", (1,), columns), (Completion("hello", (1,), True),))
    with pytest.raises(SetupError, match=r'py3langid cannot be imported .*pip install "grpo-lab\[metrics\]"'):
        bind([RewardTerm(name="ifeval")], discover()).score([group])


LANGUAGES = {
    "hi": "यह एक कविता है जो मैंने लिखी",
    "kn": "ಇದು ಒಂದು ಸಣ್ಣ ಕವಿತೆ",
    "mr": "ही एक छोटी कविता आहे जी मी लिहिली आहे",
    "vi": "Đây là một bài thơ ngắn về mùa xuân",
    "ko": "이것은 봄에 관한 짧은 시입니다",
    "sw": "Hii ni shairi fupi kuhusu mapenzi na maisha ya watu",
    "de": "Dies ist ein kurzes Gedicht über den Frühling",
    "pa": "ਇਹ ਇੱਕ ਛੋਟੀ ਕਵਿਤਾ ਹੈ",
    "fa": "این یک شعر کوتاه درباره بهار است که من نوشته‌ام",
    "ru": "Это короткое стихотворение о весне",
    "bg": "Това е кратко стихотворение за пролетта, което написах",
    "pt": "Este é um pequeno poema sobre a primavera que não escrevi",
    "gu": "આ એક નાની કવિતા છે",
    "te": "ఇది ఒక చిన్న కవిత",
    "it": "Questa è una breve poesia sulla primavera",
    "ar": "هذه قصيدة قصيرة عن الربيع",
    "ta": "இது ஒரு சிறிய கவிதை",
    "fi": "Tämä on lyhyt runo keväästä",
    "ur": "یہ بہار کے بارے میں ایک چھوٹی سی نظم ہے",
    "th": "นี่คือบทกวีสั้น ๆ เกี่ยวกับฤดูใบไม้ผลิ",
    "ne": "यो वसन्तको बारेमा एउटा छोटो कविता हो जुन मैले लेखेको छु",
    "bn": "এটি বসন্ত নিয়ে একটি ছোট কবিতা",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_language_of_the_data_set_is_recognised_in_one_sentence(language):
    pair = ("language:response_language", {"language": language})
    assert score(LANGUAGES[language], pair) == 1.0
    assert score("this is a poem that I wrote", pair) == 0.0


def following(name, kwargs):
    """A text built to follow one instruction of the data set, whatever its values."""
    if "relation" in kwargs and kwargs["relation"] == "less than":
        return "short"
    builders = {
        "change_case:capital_word_frequency": lambda capital_frequency, capital_relation: (
            "NASA " * capital_frequency if capital_relation == "at least" else "none here"
        ),
        REPEAT: lambda prompt_to_repeat: prompt_to_repeat + "\nHere it is.",
        TWO: lambda: "one\n******\ntwo",
        "detectable_content:number_placeholders": lambda num_placeholders: "[name] " * num_placeholders,
        POSTSCRIPT: lambda postscript_marker: f"Text.\n\n{postscript_marker} Thanks",
        SECTIONS: lambda section_spliter, num_sections: "\n".join(
            f"{section_spliter} {k + 1}\ntext" for k in range(num_sections)
        ),
        BULLETS: lambda num_bullets: "Look:\n" + "* point\n" * num_bullets,
        HIGHLIGHTS: lambda num_highlights: "so *bold* it is\n" * num_highlights,
        "keywords:existence": lambda keywords: "I say " + ", ".join(keywords) + ".",
        "keywords:forbidden_words": lambda forbidden_words: "xyzzy",
        "keywords:frequency": lambda keyword, frequency, relation: f"{keyword}, " * frequency,
        "keywords:letter_frequency": lambda letter, let_frequency, let_relation: (
            f"{letter} " * let_frequency if let_relation == "at least" else "0"
        ),
        FIRST: lambda first_word, num_paragraphs, nth_paragraph: "\n\n".join(
            f"{first_word.capitalize()}, so" if k + 1 == nth_paragraph else "so" for k in range(num_paragraphs)
        ),
        PARAGRAPHS: lambda num_paragraphs: "\n***\n".join(["text"] * num_paragraphs),
        SENTENCES: lambda num_sentences, relation: "So it goes. " * num_sentences,
        WORDS: lambda num_words, relation: "word " * num_words,
        "startend:end_checker": lambda end_phrase: f"Text. {end_phrase}",
    }
    return builders[name](**kwargs) if name in builders else KINDS[name][1]


@pytest.mark.skipif(not FILE.is_file(), reason=f"needs the ifeval data ({FILE})")
def test_every_instruction_of_the_data_set_is_known_and_can_be_followed():
    rows = [json.loads(line) for line in FILE.open()]
    pairs = [pair for row in rows for pair in zip(row["instruction_id_list"], row["kwargs"], strict=True)]
    assert len(pairs) == 834
    assert {name for name, _ in pairs} == set(KINDS)
    languages = [kwargs for name, kwargs in pairs if name == "language:response_language"]
    assert len(languages) == 31
    assert {kwargs["language"] for kwargs in languages} == set(LANGUAGES)
    unmet = [
        (name, kwargs)
        for name, kwargs in pairs
        if name != "language:response_language" and score(following(name, kwargs), (name, kwargs)) != 1.0
    ]
    assert unmet == []
    for row in rows:  # silence follows nothing
        columns = {"instruction_id_list": row["instruction_id_list"], "kwargs": row["kwargs"]}
        assert ifeval(Completion("", (1,), True), **columns) == 0.0
