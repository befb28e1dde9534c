import pytest

from grpo_lab.data.tasks import TASKS, task_rows
from grpo_lab.errors import RecipeError
from grpo_lab.text import extract


def rows(split="train", **options):
    return task_rows("addition", split=split, options=options)


def wrong(found):
    return [row for row in found if extract(row["completion"], "xml") != row["answer"]]


def carries(row):
    a, b = row["prompt"].rstrip("=").split("+")
    return int(a[-1]) + int(b[-1]) >= 10 or int(row["answer"]) >= 100


def test_every_task_file_is_registered():
    assert set(TASKS) == {"addition"}


def test_two_numbers_are_added_column_by_column():
    row = next(row for row in rows(forget_carry=0) if row["prompt"] == "47+38=")

    assert row == {
        "prompt": "47+38=",
        "completion": "<think>7+8=15 c1;4+3+1=8 c0</think>\n<answer>85</answer>",
        "answer": "85",
    }


def test_a_forgotten_carry_is_written_as_zero_and_lost():
    row = next(row for row in rows(forget_carry=1) if row["prompt"] == "47+38=")

    assert row["completion"] == "<think>7+8=15 c0;4+3=7 c0</think>\n<answer>75</answer>"
    assert row["answer"] == "85"


def test_three_digits_carry_twice():
    row = next(row for row in rows(digits=3, size=2000, forget_carry=0) if row["completion"].count("c1") == 2)
    a, b = row["prompt"].rstrip("=").split("+")

    assert extract(row["completion"], "xml") == str(int(a) + int(b))


def test_without_forgetting_every_demonstration_is_right():
    assert wrong(rows(forget_carry=0)) == []


def test_with_forgetting_exactly_the_carrying_problems_are_wrong():
    found = rows(forget_carry=1)

    assert wrong(found) == [row for row in found if carries(row)]


def test_the_share_of_forgetful_demonstrations_is_the_option():
    carrying = [row for row in rows(forget_carry=0.7) if carries(row)]

    assert len(wrong(carrying)) / len(carrying) == pytest.approx(0.7, abs=0.02)


def test_train_and_test_share_no_problem_whatever_their_seeds():
    train = {row["prompt"] for row in rows("train", seed=0)}
    test = {row["prompt"] for row in rows("test", seed=1)}

    assert not train & test
    assert len(train | test) == 8100
    assert len(test) / 8100 == pytest.approx(0.1, abs=0.01)


def test_rows_are_a_function_of_seed_and_split():
    assert rows(seed=4, size=50) == rows(seed=4, size=50)
    assert rows(seed=4, size=50) != rows(seed=5, size=50)


def test_size_takes_the_first_rows():
    assert rows(size=50) == rows()[:50]


def test_completions_are_short():
    assert max(len(row["completion"]) for row in rows()) == 57


@pytest.mark.parametrize(
    "options, message",
    [
        ({"digts": 2}, 'data.options: unknown option "digts"; did you mean "digits"?'),
        ({"digits": 4}, "data.options.digits: input should be less than or equal to 3, got 4"),
        ({"digits": True}, "data.options.digits: input should be a valid integer, got True"),
        ({"forget_carry": -0.1}, "data.options.forget_carry: input should be greater than or equal to 0, got -0.1"),
        ({"size": 0}, "data.options.size: input should be greater than 0, got 0"),
        ({"size": 9000}, "data.options.size: train has 7306 problems, not 9000"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(RecipeError) as error:
        rows(**options)

    assert str(error.value) == message


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(RecipeError) as error:
        rows(digts=2, size=0)

    assert len(error.value.problems) == 2


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(RecipeError, match='^data.path: unknown task "additon"; did you mean "addition"\\?$'):
        task_rows("additon", split="train", options={})


def test_an_unknown_split_is_refused():
    with pytest.raises(RecipeError, match='^data.split: the task "addition" has train and test, not "valid"$'):
        rows("valid")
