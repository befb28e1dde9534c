"""The recipes for real models: they are checked to the last key on a stand-in of the same architecture, data included."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from grpo_lab.assemble import assemble
from grpo_lab.bundled import describe, find_recipe
from grpo_lab.errors import RecipeError
from grpo_lab.policy.load import load_policy
from grpo_lab.policy.trainable import parameter_count
from grpo_lab.recipe import load
from grpo_lab.recipe.schema import GrpoStage
from grpo_lab.types import Completion, Group

ROOT = Path(__file__).parents[2]
QUESTIONS = [{"question": f"What is {n} and {n}?", "answer": f"Twice {n} is {2 * n}.\n#### {2 * n}"} for n in range(80)]
STORIES = [{"prompt": f"A story about {n} ants.", "completion": "Ants."} for n in range(80)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello!"}]}
    for n in range(80)
]
# name -> architecture, rows in the hub's form, completions per optimiser step (rows of a supervised one)
RECIPES = {
    "smollm-short-stories": ("llama", STORIES, 2 * 8),
    "qwen2.5-1.5b-reasoning-4bit": ("qwen2", QUESTIONS, 6),
    "qwen2-0.5b-minimal": ("qwen2", STORIES, 4 * 2),
    "qwen2.5-0.5b-gsm8k": ("qwen2", QUESTIONS, 64 * 5),
    "qwen2.5-1.5b-gsm8k": ("qwen2", QUESTIONS, 64 * 5),
    "smollm2-chat": ("llama", CHATS, 4),
    "smollm2-chat-lora": ("llama", CHATS, 4),
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    make = runpy.run_path(str(ROOT / "scripts" / "stand_in.py"))["stand_in"]
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "qwen2")}


def overrides(name: str, stand_ins: dict[str, Path], folder: Path) -> list[str]:
    """What puts a tiny model and local rows in place of the hub's."""
    kind, rows, _ = RECIPES[name]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [f"model.path={stand_ins[kind]}"]
    for key, stage in load(find_recipe(name)).recipe.stages.items():
        for block in ("data", "evaluation.data")[: 1 + (stage.evaluation is not None)]:
            place = f"stages.{key}.{block}"
            changes += [f"{place}.source=file", f"{place}.path={folder}/rows.jsonl", f"{place}.name=null"]
    return changes


def on_stand_in(name: str, stand_ins: dict[str, Path], folder: Path):
    """The recipe with a tiny model and local rows in place of the hub's."""
    return load(find_recipe(name), overrides(name, stand_ins, folder))


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STORIES_SET = {
    "model.path": "HuggingFaceTB/SmolLM-135M-Instruct",
    "model.dtype": "bfloat16",
    "model.lora.r": 16,
    "model.lora.alpha": 32,
    "model.lora.target_modules": "all-linear",
    "grpo.data.path": "mlabonne/smoltldr",
    "grpo.data.max_prompt_tokens": 512,
    "grpo.optimizer.name": "adamw_8bit",
    "grpo.optimizer.learning_rate": 2e-5,
    "grpo.micro_batch_size": 8,
    "grpo.prompts_per_step": 2,
    "grpo.sampling.num_generations": 8,
    "grpo.sampling.max_completion_length": 96,
    "grpo.rewards.0.name": "length",
    "grpo.rewards.0.weight": 1.0,
    "grpo.rewards.0.options": {"target": 50, "scale": 1.0},
}
REASONING_SET = {
    "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    "model.quantization.type": "nf4",
    "model.lora.r": 32,
    "model.lora.alpha": 32,
    "model.lora.target_modules": SEVEN,
    "grpo.data.path": "openai/gsm8k",
    "grpo.data.max_prompt_tokens": 256,
    "grpo.optimizer.name": "paged_adamw_8bit",
    "grpo.optimizer.learning_rate": 5e-6,
    "grpo.optimizer.betas": (0.9, 0.99),
    "grpo.optimizer.weight_decay": 0.1,
    "grpo.optimizer.warmup_steps": 0.1,
    "grpo.optimizer.schedule": "cosine",
    "grpo.optimizer.max_grad_norm": 0.1,
    "grpo.sampling.num_generations": 6,
    "grpo.sampling.max_completion_length": 768,
    "grpo.steps": 250,
}
MINIMAL_SET = {
    "model.path": "Qwen/Qwen2-0.5B-Instruct",
    "model.lora": None,
    "grpo.sampling.num_generations": 4,
    "grpo.micro_batch_size": 4,
    "grpo.prompts_per_step": 2,
    "grpo.optimizer.learning_rate": 1e-5,
}
GSM8K_SET = {
    "model.path": "Qwen/Qwen2.5-0.5B-Instruct",
    "model.lora.r": 32,
    "model.lora.alpha": 32,
    "grpo.data.path": "openai/gsm8k",
    "grpo.prompts_per_step": 64,
    "grpo.sampling.num_generations": 5,
    "grpo.sampling.max_completion_length": 1024,
    "grpo.sampling.temperature": 1.0,
    "grpo.optimizer.learning_rate": 3e-5,
    "grpo.optimizer.schedule": "constant",
    "grpo.algorithm.epsilon_low": 0.2,
    "grpo.algorithm.epsilon_high": 0.2,
    "grpo.algorithm.beta": 1e-3,
    "grpo.algorithm.kl_estimator": "k3",
    "grpo.steps": 116,
    "grpo.rewards.1.only_if": "finished",
}
CHAT_SET = {
    "model.path": "HuggingFaceTB/SmolLM2-135M",
    "model.lora": None,
    "sft.data.path": "HuggingFaceTB/smoltalk",
    "sft.batch_size": 4,
    "sft.optimizer.learning_rate": 5e-5,
    "sft.steps": 1000,
}
SETTINGS = {
    "smollm-short-stories": STORIES_SET,
    "qwen2.5-1.5b-reasoning-4bit": REASONING_SET,
    "qwen2-0.5b-minimal": MINIMAL_SET,
    "qwen2.5-0.5b-gsm8k": GSM8K_SET,
    "qwen2.5-1.5b-gsm8k": {**GSM8K_SET, "model.path": "Qwen/Qwen2.5-1.5B-Instruct"},
    "smollm2-chat": CHAT_SET,
    "smollm2-chat-lora": {k: v for k, v in CHAT_SET.items() if k != "model.lora"}
    | {"model.lora.r": 6, "model.lora.alpha": 8, "model.lora.dropout": 0.05},
}


def at(value, key: str):
    """The value at a dotted key."""
    for part in key.split("."):
        value = value[int(part) if isinstance(value, list) else part]
    return value


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_real_model_has_the_settings_that_were_published(name):
    recipe = load(find_recipe(name)).recipe
    values = {"model": recipe.model.model_dump(), **{key: each.model_dump() for key, each in recipe.stages.items()}}
    assert {key: at(values, key) for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_real_model_dry_runs_and_its_sizes_are_those_of_the_settings(cli, name, stand_ins, tmp_path):
    ran = cli("train", name, *overrides(name, stand_ins, tmp_path), "--dry-run", "--json")
    assert ran.code == 0, ran.err
    (stage,) = json.loads(ran.out)["stages"].values()
    per_step = stage["sizes"].get("completions_per_optimizer_step", stage["sizes"].get("rows_per_step"))
    assert per_step == RECIPES[name][2]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_a_real_model_says_that_it_was_not_run_here(name):
    text = find_recipe(name).read_text()
    assert "Not run on the machine this project was made on" in text
    assert describe(find_recipe(name))


@pytest.mark.parametrize("name", [name for name in RECIPES if "4bit" not in name])
def test_its_model_block_loads_the_architecture(name, stand_ins, tmp_path):
    plan = assemble(on_stand_in(name, stand_ins, tmp_path))
    (stage,) = plan.recipe.stages.values()
    policy = load_policy(plan.recipe.model_of(stage), plan.tokenizer, seed=0)
    assert parameter_count(policy.model).endswith("(100 %)") == (plan.recipe.model.lora is None)


def test_the_4_bit_recipe_loads_in_4_bits(stand_ins, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    plan = assemble(on_stand_in("qwen2.5-1.5b-reasoning-4bit", stand_ins, tmp_path))
    policy = load_policy(plan.recipe.model, plan.tokenizer, seed=0)
    layers = [module for module in policy.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 7 * 2


def test_a_right_answer_is_worth_2_and_its_form_2_more(stand_ins, tmp_path):
    plan = assemble(on_stand_in("qwen2.5-1.5b-reasoning-4bit", stand_ins, tmp_path))
    (stage,) = plan.recipe.stages.values()
    assert isinstance(stage, GrpoStage)
    assert [term.weight for term in stage.rewards] == [2.0, 0.5, 0.5, 0.5, 0.5]
    right = "<reasoning>\nTwice.\n</reasoning>\n<answer>\n{}\n</answer>"
    example = plan.stages[0].prompts.at(0)[0]
    texts = [right.format(example.columns["answer"]), right.format("many"), "many"]
    scores = plan.stages[0].rewards.score([Group(example, tuple(Completion(text, (5,), True) for text in texts))])
    assert scores.total.tolist() == [[4.0, 1.5, 0.0]]


@pytest.mark.parametrize("has_turn_end", [True, False])
def test_chatml_gives_a_pretrained_tokenizer_the_template_and_its_end(stand_ins, tmp_path, has_turn_end):
    bare = tmp_path / "bare"
    shutil.copytree(stand_ins["llama"], bare)
    (bare / "chat_template.jinja").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (bare / file).read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|pad|>"')
        (bare / file).write_text(text if has_turn_end else text.replace("<|im_end|>", "<|other|>"))
    loaded = on_stand_in("smollm2-chat", {"llama": bare}, tmp_path)
    if not has_turn_end:
        with pytest.raises(
            RecipeError, match='model.chat_template: chatml ends turns with "<|im_end|>", which is no token'
        ):
            assemble(loaded)
        return
    plan = assemble(loaded)
    assert plan.tokenizer.eos_token == "<|im_end|>"
    row = plan.stages[0].rows.at(0)[0]
    assert plan.tokenizer.decode(list(row.completion_ids)) == "Hello!<|im_end|>"
