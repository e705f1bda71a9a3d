import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from timm_dseq import UserError
from timm_dseq.hub.weights import check_safetensors, parse, read

from .. import layouts


class _TouchesAFile:
    """Unpickled without care, it runs a command of its author's."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (__import__("os").system, (f"touch {self.path}",))


@pytest.mark.parametrize("via_torch", [True, False])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, via_torch):
    victim, file = tmp_path / "touched", tmp_path / "weights.pth"
    if via_torch:
        torch.save({"model": _TouchesAFile(victim)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": _TouchesAFile(victim)}))
    with pytest.raises(UserError, match=r"weights\.pth (needs \w+\.system|cannot be read|is no plain)") as error:
        read(file)
    assert not victim.exists()
    assert "\n" not in str(error.value)

    if via_torch:  # the trap works: without the care it would have sprung
        torch.load(file, weights_only=False)
        assert victim.exists()


def test_an_old_torch_opens_no_foreign_pickle(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UserError, match=r"torch 2\.9\.1\+cu128 cannot open .* safely"):
        read(tmp_path / "weights.pth")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0")
    assert read(tmp_path / "weights.pth") == {}


def test_missing_truncated_and_corrupt_files_are_named(tmp_path, roles):
    with pytest.raises(UserError, match=r"nowhere\.pth is no file"):
        read(tmp_path / "nowhere.pth")
    whole = tmp_path / "whole.safetensors"
    save_file(roles["target"], whole)
    for name, content in {
        "truncated": whole.read_bytes()[:-1000],
        "header": whole.read_bytes()[:100],
        "empty": b"",
        "text": b"<html>not found</html>",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.safetensors is truncated or corrupt") as error:
            read(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
    torch.save(roles["target"], tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"half\.pth"):
        read(tmp_path / "half.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("save", "class_token", "kind"),
    [
        (layouts.save_ijepa, False, "ijepa"),
        (layouts.save_official, True, "dseq_official"),
        (layouts.save_training, True, "dseq_jepa"),
    ],
)
def test_roles_are_told_apart(tmp_path, save, class_token, kind):
    shapes = layouts.encoder_shapes(width=64, depth=2, class_token=class_token)
    target, student = layouts.random_weights(shapes, 1), layouts.random_weights(shapes, 2)
    predictor = layouts.random_weights(layouts.predictor_shapes(width=64, narrow=32, depth=1), 3)
    file = save(tmp_path / ("w.safetensors" if kind == "dseq_jepa" else "w.pth"), target, student, predictor)
    checkpoint = parse(read(file))
    assert checkpoint.kind == kind
    for role, expected in {"target": target, "student": student, "predictor": predictor}.items():
        assert getattr(checkpoint, role).keys() == expected.keys()
        assert all(torch.equal(getattr(checkpoint, role)[name], expected[name]) for name in expected)
    assert checkpoint.encoder() is checkpoint.target
    assert checkpoint.encoder("student") is checkpoint.student


def test_a_file_with_one_encoder_gives_it_as_target_and_refuses_the_student():
    weights = layouts.random_weights(layouts.encoder_shapes(width=64, depth=1), 1)
    for state in ({"model": layouts.wrapped(weights), "epoch": 3}, weights, {"state_dict": weights}):
        checkpoint = parse(state)
        assert checkpoint.kind == "timm" and checkpoint.encoder().keys() == weights.keys()
        with pytest.raises(UserError, match="one encoder only"):
            checkpoint.encoder("student")
    only_student = parse({"encoder": weights})
    assert only_student.encoder() is only_student.student


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: 2}, r"an entry named 1, which is no name of a weight"),
        ({"model": {1: torch.zeros(1)}}, r"an entry named 1, which is no name of a weight"),
        ({"target_encoder": {}, "predictor": {}}, r"holds no weights of an encoder.*target_encoder"),
        ({"encoder": {}}, r"holds no weights of an encoder"),
        ({"norm.weight": 3}, r"norm\.weight is of type int, no tensor"),
        ({"state_dict": {"module.norm.weight": {}}}, r"norm\.weight is of type dict, no tensor"),
        ({"target.norm.weight": "x"}, r"norm\.weight is of type str, no tensor"),
        ({"norm.weight": torch.zeros(3).to_sparse()}, r"norm\.weight is no dense tensor.*to_dense"),
        ({"norm.weight": torch.zeros(3, device="meta")}, r"norm\.weight is no dense tensor"),
    ],
)
def test_what_is_no_dictionary_of_weights_is_named(state, message):
    with pytest.raises(UserError, match=message) as error:
        parse(state)
    assert "\n" not in str(error.value)


def test_a_file_is_recognised_by_its_content_not_its_name(tmp_path):
    weights = {"norm.weight": torch.arange(3.0)}
    torch.save(weights, tmp_path / "torch.safetensors")
    torch.save(weights, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "safe.pth")
    for name in ("torch.safetensors", "old.safetensors", "safe.pth"):
        assert torch.equal(read(tmp_path / name)["norm.weight"], weights["norm.weight"]), name
    with pytest.raises(UserError, match=r"torch\.safetensors is a torch file.*timm-dseq convert"):
        check_safetensors(tmp_path / "torch.safetensors")  # by its name, timm would open it as safetensors
    (tmp_path / "half.pth").write_bytes((tmp_path / "safe.pth").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"half\.pth is truncated or corrupt"):
        read(tmp_path / "half.pth")
    torch.save({"model": _TouchesAFile(tmp_path / "touched")}, tmp_path / "trap.safetensors")
    with pytest.raises(UserError, match="foreign code"):
        read(tmp_path / "trap.safetensors")
    assert not (tmp_path / "touched").exists()


@pytest.mark.filterwarnings("error::UserWarning")
def test_torchscript_and_foreign_pickles_are_refused_without_torchs_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's own deprecation
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(UserError, match=r"script\.pt is a TorchScript archive.*state_dict") as error:
        read(tmp_path / "script.pt")
    assert "\n" not in str(error.value)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(UserError, match=r"plain\.pkl is no plain file of tensors"):
        read(tmp_path / "plain.pkl")
