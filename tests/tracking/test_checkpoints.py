import hashlib
import json
import pickle
import shutil

import pytest
import torch

from grpo_lab.errors import CheckpointError, DiskError, NumericError
from grpo_lab.tracking.checkpoints import load_latest, optimizer_state, optimizer_tensors, save_checkpoint
from grpo_lab.tracking.folders import save_folder_atomic, verify_folder


def save(folder, step, *, keep=2, value=None):
    weight = torch.full((2, 3), float(step if value is None else value))
    tensors = {"model": {"weight": weight}, "optimizer": {"state.0.step": torch.tensor(float(step))}}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"prompts": [step, "a"]}, keep=keep)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    tensors = {
        "model": {
            "a": torch.tensor([[0.1, -0.0], [1e-40, 3.4e38]]),
            "b": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
            "c": torch.tensor([1, 255], dtype=torch.uint8),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(7.0),
            "transposed": torch.arange(6.0).view(2, 3).t(),
        }
    }
    path = save_checkpoint(tmp_path, step=40, tensors=tensors, state={"rate": 0.1, "names": ["é"]})
    loaded = load_latest(tmp_path)
    assert path == tmp_path / "step-000040" == loaded.path
    assert names(path) == ["manifest.json", "model.safetensors", "state.json"]
    assert (loaded.step, loaded.state, loaded.skipped) == (40, {"rate": 0.1, "names": ["é"]}, ())
    assert loaded.tensors["model"].keys() == tensors["model"].keys()
    for name, tensor in tensors["model"].items():
        back = loaded.tensors["model"][name]
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert bytes(back.contiguous().view(-1).view(torch.uint8)) == bytes(
            tensor.contiguous().view(-1).view(torch.uint8)
        )


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(8, 4), "head": torch.nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    path = save_checkpoint(tmp_path, step=1, tensors={"model": model.state_dict()}, state={})
    loaded = load_latest(tmp_path).tensors["model"]
    assert (path / "model.safetensors").stat().st_size < 2 * 8 * 4 * 4
    assert loaded["head.weight"] is loaded["embed.weight"]
    assert torch.equal(loaded["head.weight"], model["head"].weight)


def test_different_views_of_one_memory_are_stored_apart(tmp_path):
    whole = torch.arange(6.0)
    views = {"whole": whole, "shaped": whole.view(2, 3), "left": whole[:2], "right": whole[2:]}
    save_checkpoint(tmp_path, step=1, tensors={"model": views}, state={})
    loaded = load_latest(tmp_path).tensors["model"]
    assert all(torch.equal(loaded[name], view) for name, view in views.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, betas=(0.8, 0.9)),
        lambda parameters: torch.optim.AdamW(
            [{"params": parameters[:1], "weight_decay": 0.0}, {"params": parameters[1:]}]
        ),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ],
    ids=["adamw", "adamw-two-groups", "sgd-momentum", "sgd"],
)
@pytest.mark.parametrize("num_updates", [0, 3])
def test_an_optimizer_goes_on_from_its_checkpoint_with_the_same_bits(tmp_path, make, num_updates):
    def advance(model, optimizer):
        model(torch.ones(1, 3)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = make(list(model.parameters()))
    for _ in range(num_updates):
        advance(model, optimizer)
    tensors, saved = optimizer_tensors(optimizer.state_dict())
    save_checkpoint(tmp_path, step=1, tensors={"optimizer": tensors}, state={"optimizer": saved})
    loaded = load_latest(tmp_path)
    copy = torch.nn.Linear(3, 2)
    copy.load_state_dict(model.state_dict())
    resumed = make(list(copy.parameters()))
    state = optimizer_state(loaded.tensors["optimizer"], loaded.state["optimizer"])
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    resumed.load_state_dict(state)
    for _ in range(2):
        advance(model, optimizer)
        advance(copy, resumed)
    assert torch.equal(copy.weight, model.weight)
    assert torch.equal(copy.bias, model.bias)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_before_anything_is_written(tmp_path, bad):
    save(tmp_path, 1)
    with pytest.raises(NumericError) as error:
        save(tmp_path, 2, value=bad)
    assert str(error.value) == (
        "checkpoint of step 2: model: weight has 6 of 6 values that are not finite; nothing was written, the "
        "checkpoint before stays"
    )
    assert error.value.exit_code == 6
    assert names(tmp_path) == ["step-000001"]


def test_a_state_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(NumericError, match="checkpoint of step 1: state: Out of range float values"):
        save_checkpoint(tmp_path, step=1, tensors={}, state={"best": float("nan")})
    assert names(tmp_path) == []


def test_only_the_newest_are_kept_and_broken_ones_do_not_count(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    (tmp_path / "step-000003" / "model.safetensors").unlink()
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003", "step-000004"]
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-000004", "step-000005"]


def test_a_broken_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path):
    save(tmp_path, 1)
    flip(save(tmp_path, 9) / "model.safetensors", -1)
    save(tmp_path, 2, keep=1)
    assert load_latest(tmp_path).step == 2


def test_leftovers_of_killed_writes_go_with_the_next_save(tmp_path):
    (tmp_path / ".tmp-step-000001").mkdir()
    (tmp_path / ".tmp-step-000001" / "model.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path) is None
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000002"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, value=5.0)
    save(tmp_path, 1, value=6.0)
    assert float(load_latest(tmp_path).tensors["model"]["weight"][0, 0]) == 6.0
    assert names(tmp_path) == ["step-000001"]


def test_no_checkpoint_is_none(tmp_path):
    assert load_latest(tmp_path / "missing") is None
    assert load_latest(tmp_path) is None


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"\x00")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 0),
        lambda path: flip(path, -2),
        truncate,
        extend,
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["flip-first", "flip-near-end", "truncate", "extend", "empty", "delete"],
)
def test_a_damaged_file_falls_back_to_the_checkpoint_before_and_says_which(tmp_path, file, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    if file == "manifest.json" and damage is truncate:
        path.write_bytes(path.read_bytes()[:-2])  # its very last byte is a line end, which means nothing
    else:
        damage(path)
    loaded = load_latest(tmp_path)
    assert loaded.step == 1
    assert float(loaded.tensors["model"]["weight"][0, 0]) == 1.0
    assert len(loaded.skipped) == 1
    assert loaded.skipped[0].startswith(f"{path}: ")


def test_no_flipped_byte_goes_unseen(tmp_path):
    save(tmp_path, 1)
    whole = tmp_path / "whole"
    for file in sorted(save(tmp_path, 2).iterdir()):
        shutil.copytree(tmp_path / "step-000002", whole, dirs_exist_ok=True)
        for position in range(file.stat().st_size):
            flip(file, position)
            loaded = load_latest(tmp_path)
            if loaded.step != 1:  # a flip between two kinds of white space in the manifest is no damage
                assert file.name == "manifest.json"
                assert json.loads(file.read_bytes()) == json.loads((whole / file.name).read_bytes())
            flip(file, position)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-000007")
    with pytest.raises(CheckpointError, match="step-000007: is not a checkpoint of step 7: state is of step 1"):
        load_latest(tmp_path)


def test_checkpoints_that_are_all_damaged_stop_with_the_first_bad_file(tmp_path):
    for path in [save(tmp_path, 1), save(tmp_path, 2)]:
        truncate(path / "model.safetensors")
    size = (tmp_path / "step-000002" / "model.safetensors").stat().st_size
    with pytest.raises(CheckpointError) as error:
        load_latest(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: none of 2 checkpoints can be read: {tmp_path}/step-000002/model.safetensors: has {size} bytes, "
        f"manifest.json says {size + 1}; start again under another --name"
    )
    assert error.value.exit_code == 7


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_a_pickle_in_place_of_tensors_is_never_run(tmp_path):
    path = save(tmp_path, 1)
    payload = pickle.dumps(Payload())
    (path / "model.safetensors").write_bytes(payload)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a checkpoint of step 1"):
        load_latest(tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", ""])
def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path, name):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="is not a file of this folder"):
        verify_folder(path)


def test_a_full_disk_at_any_size_leaves_the_checkpoint_before(tmp_path, disk_full_after):
    save(tmp_path, 1)
    outcomes = []
    for room in range(0, 800, 40):
        try:
            with disk_full_after(room):
                save(tmp_path, 2)
            outcomes.append("saved")
        except DiskError:
            outcomes.append("full")
            assert names(tmp_path) == ["step-000001"]
            assert load_latest(tmp_path).step == 1
    assert outcomes[0] == "full"
    assert outcomes[-1] == "saved"
    assert load_latest(tmp_path).step == 2


def test_a_kill_at_any_moment_of_a_save_leaves_a_valid_checkpoint_and_the_next_save_works(tmp_path, killed_at):
    steps = set()
    for n in range(1, 200):
        folder = tmp_path / str(n)
        save(folder, 1)
        (folder / ".tmp-step-000000").mkdir()
        got_through = not killed_at(n, lambda folder=folder: save(folder, 2, keep=1))
        loaded = load_latest(folder)
        steps.add(loaded.step)
        assert loaded.skipped == ()
        assert float(loaded.tensors["model"]["weight"][0, 0]) == loaded.step
        save(folder, 3, keep=1)
        assert names(folder) == ["step-000003"]
        if got_through:
            break
    assert got_through
    assert n > 15
    assert steps == {1, 2}


def test_a_kill_while_a_step_is_saved_again_leaves_an_earlier_one(tmp_path, killed_at):
    for n in range(1, 200):
        folder = tmp_path / str(n)
        save(folder, 1)
        save(folder, 2)
        got_through = not killed_at(n, lambda folder=folder: save(folder, 2))
        assert load_latest(folder).step in (1, 2)
        if got_through:
            break
    assert got_through


def test_a_folder_appears_whole_with_a_manifest_of_all_its_files(tmp_path):
    def write(path):
        (path / "inner").mkdir()
        (path / "inner" / "a.txt").write_text("a")
        (path / "b.txt").write_text("b")
        assert not (tmp_path / "final").exists()

    save_folder_atomic(tmp_path / "final", write)
    verify_folder(tmp_path / "final")
    assert names(tmp_path) == ["final"]
    assert json.loads((tmp_path / "final" / "manifest.json").read_text())["files"].keys() == {"b.txt", "inner/a.txt"}
    flip(tmp_path / "final" / "inner" / "a.txt", 0)
    with pytest.raises(CheckpointError) as error:
        verify_folder(tmp_path / "final")
    assert str(error.value) == (
        f"{tmp_path}/final/inner/a.txt: its bytes changed: sha256 is not the one in manifest.json"
    )


def test_a_folder_whose_writing_fails_leaves_the_old_one(tmp_path):
    save_folder_atomic(tmp_path / "final", lambda path: (path / "a").write_text("old") and None)

    def fail(path):
        (path / "a").write_text("half")
        raise ValueError("broken on the way")

    with pytest.raises(ValueError, match="broken on the way"):
        save_folder_atomic(tmp_path / "final", fail)
    assert (tmp_path / "final" / "a").read_text() == "old"
    save_folder_atomic(tmp_path / "final", lambda path: (path / "a").write_text("new") and None)
    assert (tmp_path / "final" / "a").read_text() == "new"
    assert names(tmp_path) == ["final"]
