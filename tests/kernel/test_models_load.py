"""Modules and checkpoints through the one door, and what it refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import workbench as wb
from workbench.errors import LoadError

X = torch.arange(6.0).reshape(2, 3)


class Two(nn.Module):
    """Two inputs, one of them ids."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 3)
        self.head = nn.Linear(3, 4)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return self.head(self.table(ids).sum(1) + x)


IDS = torch.tensor([[1, 2], [3, 4]])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


# modules


@pytest.mark.parametrize("inputs", [X, (X,), [X], X.numpy(), X.numpy().astype(np.float64), {"input": X}])
def test_module_takes_inputs_in_every_form(inputs):
    model = wb.load(nn.Linear(3, 4), inputs=inputs)
    assert [str(spec) for spec in model.inputs] == ["input: float32 (N, 3)"]
    assert torch.equal(model.example["input"], X)
    assert model.keywords == isinstance(inputs, dict)


@pytest.mark.parametrize("inputs", [(IDS, X), {"x": X, "ids": IDS}])
def test_several_inputs_keep_their_names_and_dtypes(inputs):
    model = wb.load(Two(), inputs=inputs)
    assert {spec.name: spec.dtype for spec in model.inputs} == {"ids": "int64", "x": "float32"}
    assert model.run_module(*model.example.values()).shape == (2, 4)


def test_model_is_independent_of_the_module_it_was_loaded_from():
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout()).train()
    model = wb.load(module, inputs=X)
    before = model.fingerprint
    with torch.no_grad():
        module[0].weight.zero_()
    assert module.training and not model.module.training
    assert wb.load(model.module, inputs=X).fingerprint == before


def test_wrappers_around_a_module_are_taken_off():
    inner = nn.Linear(3, 4)
    assert type(wb.load(nn.DataParallel(inner), inputs=X).module) is nn.Linear
    assert type(wb.load(torch.compile(inner), inputs=X).module) is nn.Linear


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (None, "give wb.load"),
        ("text", "inputs is str"),
        ((X, 3), r"inputs\[1\] is int"),
        (np.array(["a"]), "an array of <U1"),
        (torch.tensor(1.0), "at least one sample"),
        (torch.empty(0, 3), "at least one sample"),
        ((IDS, X[:1]), "differ in batch size"),
        ({"x": X, "idz": IDS}, "Did you mean 'ids'"),
        ((), "no inputs"),
    ],
)
def test_unusable_inputs_are_one_clear_error(inputs, says: str):
    with pytest.raises(LoadError, match=says):
        wb.load(Two(), inputs=inputs)


@pytest.mark.parametrize("inputs", [torch.ones(2, 5), torch.ones(2, 3, dtype=torch.int64)])
def test_inputs_that_do_not_fit_name_the_layer_that_fails(inputs: Tensor):
    network = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(LoadError, match=r"fails in layer 1\.0 \(Linear\)"):
        wb.load(network, inputs=inputs)


def test_output_that_is_no_tensor_is_refused():
    class Text(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "a"

    with pytest.raises(LoadError, match="returns str"):
        wb.load(Text(), inputs=X)


@pytest.mark.parametrize(
    ("source", "says"), [(nn.Linear, "is a class"), (3, "type int"), (None, "NoneType"), ("", "str")]
)
def test_source_of_another_kind_is_one_clear_error(source, says: str):
    with pytest.raises(LoadError, match=says):
        wb.load(source)


def test_argument_without_a_use_is_refused():
    with pytest.raises(LoadError, match="takes no architecture="):
        wb.load(nn.Linear(3, 4), inputs=X, architecture="lenet5")
    with pytest.raises(LoadError, match="takes no inputs="):
        wb.load("lenet5", inputs=X)


# checkpoints


@pytest.fixture
def state() -> dict[str, Tensor]:
    return wb.load("lenet5").module.state_dict()


def reloaded(path: Path) -> bool:
    return wb.load(path, architecture="lenet5").fingerprint == wb.load("lenet5").fingerprint


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", ["", "state_dict", "model"])
def test_weights_are_found_under_prefixes_and_keys(tmp_path: Path, state, prefix: str, key: str):
    weights = {prefix + name: value for name, value in state.items()}
    torch.save({key: weights, "epoch": 3} if key else weights, tmp_path / "x.ckpt")
    assert reloaded(tmp_path / "x.ckpt")


def test_every_file_format_of_weights_is_read(tmp_path: Path, state):
    save_file(state, tmp_path / "x.safetensors")
    torch.save(state, tmp_path / "x.th")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert all(reloaded(tmp_path / name) for name in ("x.safetensors", "x.th", "old.pth"))


def test_architecture_may_be_a_module_and_is_left_as_it_is(tmp_path: Path):
    trained, empty = Two(), Two()
    torch.save(trained.state_dict(), tmp_path / "x.pt")
    before = empty.head.weight.clone()
    model = wb.load(tmp_path / "x.pt", architecture=empty, inputs=(IDS, X), name="two")
    assert torch.equal(model.module.head.weight, trained.head.weight)
    assert torch.equal(empty.head.weight, before)
    assert (model.name, model.source, model.weights) == ("two", "x.pt", "checkpoint")


def test_missing_batch_counters_are_no_mismatch(tmp_path: Path):
    state = wb.load("resnet20").module.state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "x.pt")
    assert wb.load(tmp_path / "x.pt", architecture="resnet20").parameters == 269_722


def test_weights_that_do_not_fit_name_the_first_keys_and_shapes(tmp_path: Path, state):
    changed = {k: v for k, v in state.items() if k != "conv2.bias"}
    changed["fc3.weight"], changed["extra"] = torch.ones(7, 84), torch.ones(1)
    torch.save(changed, tmp_path / "x.pt")
    with pytest.raises(LoadError) as error:
        wb.load(tmp_path / "x.pt", architecture="lenet5")
    for part in ("missing conv2.bias", "unexpected extra", "fc3.weight is (7, 84) in the file and (10, 84)"):
        assert part in str(error.value)


def test_checkpoint_alone_asks_for_its_architecture_and_knows_those_of_the_zoo(tmp_path: Path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="architecture='lenet5'"):
        wb.load(tmp_path / "x.pt")
    with pytest.raises(LoadError, match="architecture='lenet5'"):
        wb.load(tmp_path / "x.pt", architecture="mlp")


@pytest.mark.parametrize(
    ("architecture", "says"), [(nn.Linear, "the class Linear"), (3, "a int"), ("lenet7", "lenet5")]
)
def test_unusable_architecture_is_one_clear_error(tmp_path: Path, state, architecture, says: str):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(LoadError, match=says):
        wb.load(tmp_path / "x.pt", architecture=architecture)


def test_pickle_with_code_is_refused_unrun_with_the_command_that_converts_it(tmp_path: Path, state):
    ran = tmp_path / "ran"
    torch.save({"state_dict": state, "args": Payload(ran)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(ran)))
    torch.save(Two(), tmp_path / "module.pt")
    for name in ("torch.pt", "plain.pt", "module.pt"):
        with pytest.raises(LoadError, match=r"full pickle.*python -c"):
            wb.load(tmp_path / name, architecture="lenet5")
    assert not ran.exists()


def test_the_command_that_converts_a_pickle_works(tmp_path: Path):
    torch.save(nn.Linear(3, 4), tmp_path / "full.pt")
    with pytest.raises(LoadError) as error:
        wb.load(tmp_path / "full.pt", architecture=nn.Linear(3, 4), inputs=X)
    command = str(error.value).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", command], check=True)
    assert wb.load(tmp_path / "full-weights.pt", architecture=nn.Linear(3, 4), inputs=X).parameters == 16


@pytest.mark.parametrize("keep", [0.5, 0.99])
@pytest.mark.parametrize("name", ["x.pt", "old.pt", "x.safetensors"])
def test_truncated_file_is_called_damaged(tmp_path: Path, state, name: str, keep: float):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name != "old.pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(LoadError, match="damaged or incomplete"):
        wb.load(path, architecture="lenet5")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".onnx", ".pt2", ".ts", ".keras", ".h5"])
def test_missing_empty_and_foreign_files_and_folders_are_each_one_clear_error(tmp_path: Path, suffix: str):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(LoadError, match="no file"):
        wb.load(path)
    path.touch()
    with pytest.raises(LoadError, match="is empty"):
        wb.load(path)
    path.write_text("not what its name says, " * 20)
    with pytest.raises(LoadError, match="damaged|no file that torch.save wrote"):
        wb.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(LoadError, match="is a folder"):
        wb.load(path)


def test_file_of_an_unknown_kind_lists_the_known_ones(tmp_path: Path):
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(LoadError, match=r"Accepted: \.pt.*\.onnx"):
        wb.load(tmp_path / "x.csv")


def test_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80" + bytes(3_000_000))
    with pytest.raises(LoadError, match="would unpack"):
        wb.load(tmp_path / "x.pt", architecture="lenet5")


def test_loading_a_zoo_network_imports_no_optional_library():
    code = (
        "import sys, workbench as wb; wb.load('lenet5'); print([m for m in ('keras', 'sklearn') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
