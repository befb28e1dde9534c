import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, MambaConfig

from grpo_lab.batching import pad_rows
from grpo_lab.errors import RecipeError
from grpo_lab.policy.forward import completion_logps
from grpo_lab.policy.load import as_policy, context_length, eos_ids, load_policy, load_tokenizer, write_policy
from grpo_lab.recipe.schema import Model


def model(**settings):
    """A recipe's model block, made from a config."""
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    return Model(config={**config, **settings}, tokenizer="built")


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def written(tiny_policy, tmp_path):
    """A folder with a model that tests may break."""
    write_policy(tiny_policy, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_policy_loads_bit_for_bit(make_policy, tmp_path, dtype, tied):
    policy = make_policy(dtype=dtype, tie_word_embeddings=tied)
    write_policy(policy, tmp_path)
    block = Model(path=str(tmp_path), dtype=dtype)
    loaded = load_policy(block, load_tokenizer(block), seed=5)
    assert same(weights(loaded), weights(policy))
    assert loaded.model.dtype == policy.model.dtype
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    facts = [(p.eos_ids, p.pad_id, p.context_length, len(p.tokenizer)) for p in (loaded, policy)]
    assert facts[0] == facts[1]
    assert loaded.tokenizer.chat_template == policy.tokenizer.chat_template
    policy.model.eval()
    batch = pad_rows([(5, 6)], [0], [(7, 8, 9)], policy)
    logps = [completion_logps(p, batch, temperature=1.0) for p in (loaded, policy)]
    assert torch.equal(*logps)


def test_what_was_written_loads_with_transformers_alone(tiny_policy, written):
    network = AutoModelForCausalLM.from_pretrained(written)
    assert same(network.state_dict(), weights(tiny_policy))
    assert sorted(path.suffix for path in written.iterdir() if path.suffix in (".bin", ".pt", ".safetensors")) == [
        ".safetensors"
    ]


def test_new_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(tokenizer):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(load_policy(model(), tokenizer, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, weights(load_policy(model(), tokenizer, seed=3)))
    assert not same(first, weights(load_policy(model(), tokenizer, seed=4)))


def test_an_earlier_stage_s_folder_goes_before_the_recipe_s_config(tokenizer, tiny_policy, written):
    loaded = load_policy(model(hidden_size=16), tokenizer, seed=0, folder=written)
    assert same(weights(loaded), weights(tiny_policy))


def test_the_vocabulary_and_special_tokens_of_a_new_model_are_the_tokenizer_s(tokenizer):
    policy = load_policy(model(), tokenizer, seed=0)
    assert policy.model.config.vocab_size == len(tokenizer)
    assert policy.model.config.eos_token_id == tokenizer.eos_token_id == policy.eos_ids[0]
    assert policy.pad_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"num_attention_heads": 3},
            "model.config: The hidden size (32) is not a multiple of the number of attention heads (3).",
        ),
        ({"hidden_size": "wide"}, "model.config: Field 'hidden_size' expected int, got str (value: 'wide')"),
        ({"hidden_act": "gelux"}, "model.config: unknown name 'gelux'"),
    ],
)
def test_a_wrong_config_is_a_recipe_error(tokenizer, settings, message):
    with pytest.raises(RecipeError) as error:
        load_policy(model(**settings), tokenizer, seed=0)
    assert str(error.value) == message


def test_an_unknown_model_type_is_named(tokenizer):
    with pytest.raises(RecipeError, match="^model.config: Unrecognized model identifier: lama"):
        load_policy(model(model_type="lama"), tokenizer, seed=0)


def test_an_attention_that_the_model_does_not_know_is_a_recipe_error(tokenizer):
    with pytest.raises(RecipeError, match="^model.config: Gemma2ForCausalLM does not support an attention impl"):
        load_policy(model(model_type="gemma2"), tokenizer, seed=0)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load_error(folder, tokenizer):
    with pytest.raises(RecipeError) as error:
        load_policy(Model(path=str(folder)), tokenizer, seed=0)
    return str(error.value).replace(str(folder), "FOLDER")


def test_weights_that_are_missing_are_not_made_up(tokenizer, written):
    tensors = load_file(written / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    assert load_error(written, tokenizer) == (
        "model.path: FOLDER lacks 1 of the model's weights, the first model.layers.1.mlp.up_proj.weight"
    )


def test_weights_of_another_size_are_a_recipe_error(tokenizer, written):
    edit_config(written, vocab_size=999)
    assert load_error(written, tokenizer).startswith("model.path: cannot load FOLDER: ")


def test_a_wrong_config_in_a_folder_is_a_recipe_error(tokenizer, written):
    edit_config(written, num_attention_heads=3)
    message = "The hidden size (32) is not a multiple of the number of attention heads (3)."
    assert load_error(written, tokenizer) == f"model.path: cannot load FOLDER: {message}"
    with pytest.raises(RecipeError, match="^model: cannot load a tokenizer from .*not a multiple"):
        load_tokenizer(Model(path=str(written)))


def test_a_truncated_weights_file_is_a_recipe_error(tokenizer, written):
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert load_error(written, tokenizer).startswith("model.path: cannot load FOLDER: Error while deserializing header")


def test_no_such_folder_is_a_recipe_error(tokenizer, tmp_path):
    assert load_error(tmp_path / "nothing", tokenizer).startswith("model.path: cannot load FOLDER: ")
    with pytest.raises(RecipeError, match="^model: cannot load a tokenizer from "):
        load_tokenizer(Model(path=str(tmp_path / "nothing")))


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_weights_are_not_read(tokenizer, written, tmp_path):
    (written / "model.safetensors").unlink()
    torch.save(Bomb(str(tmp_path / "exploded")), written / "pytorch_model.bin")
    assert load_error(written, tokenizer).startswith("model.path: cannot load FOLDER: ")
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_model_s_folder_does_not_run(tokenizer, written, tmp_path):
    (written / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(written, model_type="own", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    assert load_error(written, tokenizer).startswith("model.path: cannot load FOLDER: ")
    assert not (tmp_path / "ran").exists()


def test_every_declared_end_of_sequence_token_counts_and_the_tokenizer_s_comes_first(tokenizer):
    own = tokenizer.eos_token_id
    config = LlamaConfig(eos_token_id=[own + 5, own + 1])
    generation = GenerationConfig(eos_token_id=[own + 1, own, own + 9])
    assert eos_ids(tokenizer, config, generation) == (own, own + 5, own + 1, own + 9)
    assert eos_ids(tokenizer, LlamaConfig(eos_token_id=7), None) == (own, 7)
    assert eos_ids(tokenizer, LlamaConfig(eos_token_id=None), GenerationConfig()) == (own,)


def test_a_policy_takes_its_end_tokens_from_all_three_places(tokenizer, make_policy):
    network = make_policy().model
    network.config.eos_token_id = [30, 31]
    network.generation_config = GenerationConfig(eos_token_id=[31, 32])
    assert as_policy(network, tokenizer).eos_ids == (tokenizer.eos_token_id, 30, 31, 32)


class Undeclared:
    """A tokenizer without special tokens."""

    eos_token_id = None
    pad_token_id = None


def test_without_any_end_token_there_is_no_policy():
    with pytest.raises(RecipeError) as error:
        eos_ids(Undeclared(), LlamaConfig(eos_token_id=None), None)
    assert str(error.value) == "model: neither the tokenizer nor the model declares an end-of-sequence token"


def test_a_tokenizer_without_padding_pads_with_eos(make_policy):
    network = make_policy().model
    network.config.eos_token_id = [30, 31]
    network.generation_config = GenerationConfig()
    policy = as_policy(network, Undeclared())
    assert (policy.eos_ids, policy.pad_id) == ((30, 31), 30)


def test_the_context_length_is_found_under_either_name(make_policy):
    assert make_policy(max_position_embeddings=77).context_length == 77
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 1}
    assert make_policy(**gpt2, max_position_embeddings=55).context_length == 55


def test_a_model_without_a_context_length_is_a_recipe_error():
    with pytest.raises(RecipeError) as error:
        context_length(MambaConfig())
    assert str(error.value) == "model: the config of mamba does not state max_position_embeddings"


def test_a_chat_template_file_replaces_the_tokenizer_s(written, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    block = Model(path=str(written), chat_template=str(tmp_path / "own.jinja"))
    messages = [{"role": "user", "content": "hé"}]
    assert load_tokenizer(block).apply_chat_template(messages, tokenize=False) == "hé!"
    with pytest.raises(RecipeError, match="^model.chat_template: no.jinja is not a file"):
        load_tokenizer(block.model_copy(update={"chat_template": "no.jinja"}))
