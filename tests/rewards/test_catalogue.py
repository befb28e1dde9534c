"""The catalogue keeps its word: every reward says what its options do, has eight adversarial cases or more, and has been
run on real data. And every fault of RELIABILITY.md that concerns rewards has its test."""

import ast
from pathlib import Path

import pytest

from grpo_lab.scoring import discover

TESTS = Path(__file__).parents[1]
REGISTRY = discover()

# For each reward: where its adversarial cases stand (a file here, and functions of it if others share it), and the test
# that runs it on real data.
LOOKS, TEXTS = "test_looks_on_real_data.py", "test_text_rewards_on_real_data.py"
SHARED = "test_text_rewards.py"
CATALOGUE = {
    "accuracy": ("test_accuracy.py", "test_real_data.py::test_right_answers_reach_the_maximum_in_every_dressing"),
    "arithmetic": ("test_arithmetic.py", "test_arithmetic.py::test_svamp_equations_have_the_value_of_their_answers"),
    "bleu": (f"{SHARED}::test_translation", f"{TEXTS}::test_every_gold_translation_is_right_and_copying_the_english_is_not"),
    "brevity": ("test_brevity.py", f"{LOOKS}::test_the_shorter_of_two_right_solutions_is_worth_more"),
    "choice": ("test_choice.py", "test_real_data.py::test_right_answers_reach_the_maximum_in_every_dressing"),
    "chrf": (f"{SHARED}::test_translation", f"{TEXTS}::test_every_gold_translation_is_right_and_copying_the_english_is_not"),
    "classifier": ("test_classifier.py", "test_classifier.py::test_real_reviews_get_the_models_own_probabilities"),
    "code": ("test_code.py", "../sandbox/test_sandbox.py::test_all_humaneval_solutions_pass_and_wrong_ones_fail"),
    "cosine": ("test_cosine.py", f"{LOOKS}::test_right_solutions_beat_wrong_ones_of_any_length"),
    "countdown": ("test_countdown.py", f"{LOOKS}::test_svamps_equations_are_sums_over_their_numbers"),
    "entities": ("test_entities.py", f"{TEXTS}::test_every_gold_entity_list_is_right_in_every_form"),
    "exact": ("test_exact.py", f"{LOOKS}::test_texts_and_numbers_after_their_mark"),
    "exact_match": (f"{SHARED}::test_squad", f"{TEXTS}::test_every_squad_answer_is_right_and_no_other"),
    "finished": ("test_finished.py", f"{LOOKS}::test_lengths"),
    "format": ("test_format.py", f"{LOOKS}::test_forms"),
    "ifeval": ("test_ifeval.py", "test_ifeval.py::test_every_instruction_of_the_data_set_is_known_and_can_be_followed"),
    "json": ("test_json.py", f"{LOOKS}::test_json_records_conform_to_their_schema"),
    "judge": ("test_judge.py", "test_judge.py::test_real_solutions_reach_the_judge_whole_and_its_scores_come_back"),
    "label": (f"{SHARED}::test_label", f"{TEXTS}::test_every_gold_label_is_right_and_the_other_is_not"),
    "language": ("test_language.py", f"{LOOKS}::test_languages"),
    "length": ("test_length.py", f"{LOOKS}::test_lengths"),
    "numeric": ("test_numeric.py", f"{LOOKS}::test_texts_and_numbers_after_their_mark"),
    "overlong": ("test_overlong.py", f"{LOOKS}::test_lengths"),
    "random": (f"{SHARED}::test_random_cannot_be_talked_to", f"{LOOKS}::test_points_for_nothing_know_nothing_of_right_and_wrong"),
    "reasoning_gym": ("test_reasoning_gym.py", "test_reasoning_gym.py::test_golds_score_1_and_hostile_answers_end_at_once_and_do_not"),
    "reasoning_steps": ("test_reasoning_steps.py", f"{LOOKS}::test_repetition_and_steps"),
    "repetition": ("test_repetition.py", f"{LOOKS}::test_repetition_and_steps"),
    "rouge": (f"{SHARED}::test_rouge", f"{TEXTS}::test_every_gold_text_reaches_rouge_or_is_left_out"),
    "token_f1": (f"{SHARED}::test_squad", f"{TEXTS}::test_every_squad_answer_is_right_and_no_other"),
}  # fmt: skip

# Faults put into rewards (R1 to R7), and programs that attack the sandbox (S6): what shows that each is contained, for the
# part and for a whole run.
FAULTS = {
    "R1 raises once": (
        "scoring/test_reward_set.py::test_a_reward_that_raises_once_takes_out_that_completion_only",
        "scoring/test_reward_set.py::test_a_failing_batched_call_takes_out_the_whole_step",
        "test_faults.py::test_a_reward_that_fails_once_in_eight_is_counted_and_the_run_goes_on",
    ),
    "R2 always raises": (
        "scoring/test_budget.py::test_too_many_failures_stop_the_run_and_are_saved",
        "test_faults.py::test_a_reward_that_always_fails_exits_5_with_the_cause_and_the_examples",
    ),
    "R3 hangs": (
        "scoring/test_workers.py::test_a_fault_takes_out_its_completion_only_and_the_worker_works_on",
        "scoring/test_workers.py::test_no_process_of_a_killed_worker_is_left",
        "scoring/test_workers.py::test_kill_9_of_the_trainer_leaves_no_worker",
        "test_faults.py::test_a_reward_that_hangs_or_dies_once_in_eight_is_counted_and_the_run_goes_on",
    ),
    "R4 returns nonsense": (
        "scoring/test_reward_set.py::test_what_a_returned_value_is_taken_for",
        "scoring/test_reward_set.py::test_a_weighted_total_that_is_too_large_is_the_failure_of_its_largest_term",
        "scoring/test_workers.py::test_a_wrong_number_of_values_ends_the_run_with_both_numbers",
        "scoring/test_workers.py::test_odd_plugins_that_do_not_are_failures_of_their_call",
        "test_faults.py::test_values_that_are_no_numbers_never_reach_the_advantages",
        "test_faults.py::test_a_batched_reward_of_the_wrong_length_exits_5_with_both_numbers",
    ),
    "R5 dies": (
        "scoring/test_workers.py::test_a_fault_takes_out_its_completion_only_and_the_worker_works_on",
        "test_faults.py::test_a_reward_that_hangs_or_dies_once_in_eight_is_counted_and_the_run_goes_on",
    ),
    "R6 uses signal.alarm": (
        "scoring/test_workers.py::test_user_code_runs_on_the_main_thread_so_signal_alarm_works",
        "scoring/test_workers.py::test_math_verify_with_its_own_alarm_works_in_a_worker",
    ),
    "R7 cannot be loaded": (
        "test_faults.py::test_an_unreadable_plugin_exits_3_with_the_real_cause_and_its_line",
        "scoring/test_workers.py::test_a_plugin_that_dies_while_it_is_loaded_ends_the_run_with_what_it_said",
    ),
    "S6 hostile programs": (
        "sandbox/test_sandbox.py::test_a_good_verdict_cannot_be_had_without_the_right_answers",
        "sandbox/test_sandbox.py::test_the_tests_are_nowhere_in_the_programs_process",
        "sandbox/test_sandbox.py::test_there_is_no_way_out",
        "sandbox/test_sandbox.py::test_no_process_is_left",
        "sandbox/test_sandbox.py::test_a_machine_without_namespaces_is_found_out_and_refused_where_more_is_asked_for",
        "test_faults.py::test_code_runs_only_where_the_recipe_allows_it",
    ),
    "C6 changed since": (
        "test_resume.py::test_a_changed_reward_is_refused",
        "scoring/test_workers.py::test_a_plugin_changed_under_way_is_refused",
    ),
}


def functions(file: Path) -> dict[str, ast.AST]:
    return {node.name: node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def exists(test: str, folder: Path) -> bool:
    file, _, name = test.partition("::")
    return name in functions(folder / file)


def test_the_table_is_about_every_reward():
    assert list(CATALOGUE) == REGISTRY.names()


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_option_says_what_it_does(name):
    options = REGISTRY.get(name).describe()["options"]
    assert [option for option, about in options.items() if not about["doc"]] == []


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_has_eight_adversarial_cases_or_more(name):
    file, _, function = CATALOGUE[name][0].partition("::")
    path = TESTS / "rewards" / file
    tree = functions(path)[function] if function else ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert sum(call.func.id == "adversarial" for call in calls) >= 8


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_has_a_run_on_real_data(name):
    assert exists(CATALOGUE[name][1], TESTS / "rewards")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_tests(fault):
    assert [test for test in FAULTS[fault] if not exists(test, TESTS)] == []
