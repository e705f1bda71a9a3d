"""Downloads, for real: over HTTP, from a Hub on loopback, through timm.create_model."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image

import timm_dseq  # noqa: F401
from timm_dseq import UserError
from timm_dseq.hub import download

REPO = "lab/dseq_jepa_vit_ti16.in1k"


@pytest.fixture
def published(hub, exported):
    hub.add_repo(REPO, {path.name: path.read_bytes() for path in exported.iterdir()})
    return hub


@pytest.fixture
def load(tmp_path):
    """Load by registered name from the repository, with a cache of this test's own."""

    def load(repo=REPO, **kwargs):
        overlay = {"hf_hub_id": repo}
        cache = tmp_path / "cache"
        return timm.create_model(
            "dseq_jepa_vit_ti16.in1k", pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache, **kwargs
        )

    load.cache = tmp_path / "cache"
    return load


def weights_in(cache: Path) -> list[Path]:
    """Whatever in a cache a later load could take for weights."""
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 100_000]


def refused(load, match, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as error:
        load(**kwargs)
    assert "\n" not in str(error.value)


def test_a_download_is_whole_cached_and_asked_for_once(published, load, roles):
    model = load()
    assert all(torch.equal(tensor, roles["target"][name]) for name, tensor in model.state_dict().items())
    assert model.pretrained_cfg["hf_hub_id"] == REPO and "file" not in model.pretrained_cfg
    assert published.downloads() == 1
    load()
    assert published.downloads() == 1
    features = load(features_only=True)
    assert "file" not in features.pretrained_cfg


def test_a_revision_is_honoured(published, load, roles, exported):
    first = published.repos[REPO].branches["main"]
    published.repos[REPO].commit("main", {"model.safetensors": b"worse weights"}, "spoil")
    refused(load, r"truncated or corrupt")
    model = load(f"{REPO}@{first}")
    assert torch.equal(model.norm.weight, roles["target"]["norm.weight"])


@pytest.mark.slow
def test_the_environment_rules_namespace_home_and_offline(published, run_python, tmp_path):
    """In processes of their own: these variables are read at import."""
    code = """
import timm_dseq, timm
timm.create_model("dseq_jepa_vit_ti16.in1k", pretrained=True)
"""
    names = {"TIMM_DSEQ_NAMESPACE": "lab"}
    missed = run_python(code, HF_HUB_OFFLINE="1", **names)
    assert missed.returncode and "unset HF_HUB_OFFLINE" in missed.stderr.splitlines()[-1]
    assert published.downloads() == 0
    first = run_python(code, **names)
    assert first.returncode == 0, first.stderr
    assert weights_in(tmp_path / "hf" / "hub")
    offline = run_python(code, HF_HUB_OFFLINE="1", **names)
    assert offline.returncode == 0, offline.stderr
    assert published.downloads() == 1
    nowhere = run_python(code, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "empty"), **names)
    assert "the Hub cannot be reached: check the network" in nowhere.stderr.splitlines()[-1]


@pytest.mark.slow
def test_stock_timm_and_transformers_load_from_the_hub_without_this_package(published, run_python, exported, tmp_path):
    code = """
import sys, timm, torch
from transformers import AutoModel
repo, folder = sys.argv[1:]
image = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    names = "hf-hub:" + repo, "local-dir:" + folder
    outputs = [timm.create_model(name, pretrained=True).eval()(image) for name in names]
    outputs += [AutoModel.from_pretrained(name).eval()(image).pooler_output for name in (repo, folder)]
assert all((output - outputs[0]).abs().max() < 1e-5 for output in outputs)
assert not any(name.startswith("timm_dseq") for name in sys.modules)
print("equal")
"""
    run = run_python(code, REPO, str(exported))
    assert run.stdout.strip().endswith("equal"), run.stderr


def test_private_and_gated_repositories_want_the_token(published, load, monkeypatch):
    published.token = "hf_secret"
    published.repos[REPO].gated = True
    refused(load, r"model.safetensors of lab/.* is gated: accept its terms")
    published.repos[REPO].gated, published.repos[REPO].private = False, True
    refused(load, r"no such repository, or a private one.*hf auth login")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    load()


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("lab/missing", r"lab/missing: no such repository"),
        (f"{REPO}@no-such-branch", r"no-such-branch: the repository has no such revision"),
        ("lab/empty", r"model.safetensors of lab/empty: the repository has no such file"),
        ("not a repository", r"is no repository of the Hub: write ORGANISATION/NAME"),
    ],
)
def test_what_does_not_exist_is_named(published, load, repo, message):
    published.add_repo("lab/empty", {"README.md": b"nothing"})
    refused(load, message, repo=repo)
    assert not weights_in(load.cache)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("truncate", r"did not arrive whole \(Consistency check failed.*try again"),
        ("die", r"the connection failed|did not arrive whole"),
        ("flip", r"arrived damaged \(its SHA-256 is not the announced one\), so it was removed: try again"),
        ("error", r"the Hub answered 500: try again later"),
    ],
)
def test_a_download_that_fails_leaves_nothing_and_the_next_one_works(published, load, roles, fault, message):
    published.fault = fault
    refused(load, message)
    assert not [path for path in weights_in(load.cache) if not path.name.endswith(".incomplete")]
    published.fault = None
    model = load()
    assert all(torch.equal(tensor, roles["target"][name]) for name, tensor in model.state_dict().items())


def test_a_name_that_leads_out_of_the_cache_is_not_followed(published, load, tmp_path):
    """huggingface_hub takes any ETag for a file's name."""
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    published.etag = "../../../victim.txt"
    refused(load, "names a file outside the cache")
    assert victim.read_text() == "mine"
    published.etag = None
    load()
    assert victim.read_text() == "mine"


def test_a_cached_file_is_hashed_once_and_again_when_it_changes(published, load, monkeypatch):
    from timm_dseq.hub import download as module

    load()
    (blob,) = [path for path in weights_in(load.cache) if not path.is_symlink()]
    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256", lambda path: pytest.fail("hashed again"))
        load()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    os.utime(blob, ns=(time.time_ns(), time.time_ns() + 1))
    refused(load, "arrived damaged")
    load()
    assert published.downloads() == 2


def test_the_hubs_own_tools_still_understand_the_cache(published, load):
    load()
    report = huggingface_hub.scan_cache_dir(load.cache)
    assert [repo.repo_id for repo in report.repos] == [REPO] and not report.warnings


def test_a_server_that_drips_is_given_up_and_one_that_is_slow_is_not(published, load, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 1)
    monkeypatch.setattr(download, "LEAST", 10**6)  # others may be using the network
    published.fault = "drip"
    begun = time.monotonic()
    refused(load, r"model.safetensors of .* nothing more arrived for 1 s: check the network")
    assert time.monotonic() - begun < 30
    published.fault = None
    monkeypatch.setattr(download, "LEAST", 1)
    published.fault = "slow"
    assert load() and time.monotonic() - begun > 1


@pytest.mark.parametrize(
    ("endpoint", "proxies", "counted"),
    [("https://huggingface.co", {}, False), ("http://127.0.0.1:1", {}, True)]
    + [
        ("https://huggingface.co", {"https": f"http://{host}:3128"}, host == "localhost")
        for host in ("localhost", "far")
    ],
)
def test_what_a_machine_sends_itself_counts_only_if_the_hub_is_reached_so(monkeypatch, endpoint, proxies, counted):
    lines = ["head", "head", "    lo: 1000 1 0", "  eth0: 20 1 0"]
    monkeypatch.setattr(download.Path, "read_text", lambda path, encoding: "\n".join(lines))
    monkeypatch.setattr(download.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(download.urllib.request, "getproxies", lambda: proxies)
    assert download._received() == (1020 if counted else 20)


def test_a_server_that_never_ends_is_given_up(published, load, monkeypatch):
    monkeypatch.setattr(download, "LOOK", 0.2)
    published.fault = "endless"
    begun = time.monotonic()
    refused(load, r"model.safetensors of .*: more arrives than was announced: check the network")
    published.fault = None
    assert time.monotonic() - begun < 60


def test_disk_and_permission_faults_are_named(published, load, monkeypatch):
    from timm_dseq.hub import download as module

    def fail(error):
        def raise_it(*args, **kwargs):
            raise error

        monkeypatch.setattr(module.huggingface_hub, "hf_hub_download", raise_it)

    fail(OSError(28, "No space left on device"))
    refused(load, "no space left on the disk: free some, or set HF_HOME elsewhere")
    fail(PermissionError(13, "Permission denied", "/cache/blobs"))
    refused(load, r"/cache/blobs cannot be used \(Permission denied\): set HF_HOME or cache_dir")
    fail(ZeroDivisionError("a bug of ours"))
    with pytest.raises(ZeroDivisionError):
        load()


def test_a_truly_full_disk_is_named_and_leaves_nothing(published, load):
    load.cache.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(load.cache)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may make a small disk to fill")
    try:
        refused(load, "no space left on the disk: free some, or set HF_HOME elsewhere")
        assert not [path for path in weights_in(load.cache) if not path.name.endswith(".incomplete")]
    finally:
        subprocess.run(["umount", str(load.cache)], check=True)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HF_HOME", "/dev/null/nowhere", "cannot be used (Not a directory): set HF_HOME"),
        ("HF_ENDPOINT", "garbage", "HF_ENDPOINT='garbage' is no address"),
    ],
)
def test_a_wrong_setting_of_the_hub_is_named(hub, run_python, variable, value, message):
    run = run_python("from timm_dseq.hub.download import snapshot; snapshot('lab/x')", **{variable: value})
    assert message in run.stderr.splitlines()[-1], run.stderr


@pytest.fixture
def silent_port():
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server.getsockname()[1]


COMMANDS = """
import json, sys, time
import timm, timm_dseq
from timm_dseq.cli import main
folder = sys.argv[1]
for command in (
    ["explain", "photo.png", "--model", "vit_tiny_patch16_224"],
    ["explain", "photo.png", "--model", "hf-hub:lab/x"],
    ["explain", "photo.png", "--model", "dseq_jepa_vit_ti16.in1k"],
    ["verify", "lab/x"],
    ["push", folder, "lab/x"],
):
    start = time.monotonic()
    code = main([*command, "--json"])
    print(json.dumps({"code": code, "seconds": time.monotonic() - start}))
"""


@pytest.mark.parametrize("fault", ["closed", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_hub_that_cannot_be_reached_is_named_in_a_few_seconds(
    complete, run_python, tmp_path, unused_port, silent_port, fault
):
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    port = silent_port if fault == "silent" else unused_port
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "TIMM_DSEQ_NAMESPACE": "lab"}
    run = run_python(COMMANDS, str(complete), **environment)
    ends = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"code"')]
    lines = run.stderr.splitlines()
    assert len(ends) == len(lines) == 5, run.stderr
    for end, line in zip(ends, lines, strict=True):
        assert end["code"] == 1 and end["seconds"] < 10, (end, line)
        assert "the Hub cannot be reached: check the network" in line and f"127.0.0.1:{port}" in line, line


def test_offline_asks_nobody_and_names_the_variable(run_python, tmp_path, complete, silent_port):
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{silent_port}", "TIMM_DSEQ_NAMESPACE": "lab"}
    run = run_python(COMMANDS, str(complete), HF_HUB_OFFLINE="1", **environment)
    ends = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"code"')]
    lines = run.stderr.splitlines()
    assert len(ends) == len(lines) == 5, run.stderr
    assert all(end["code"] == 1 and end["seconds"] < 4 for end in ends), ends
    assert all("unset HF_HUB_OFFLINE" in line for line in lines), lines


@pytest.mark.slow
def test_without_a_network_the_cache_serves_every_way_of_loading(published, run_python, unused_port):
    """Of our own names, and of timm's from the Hub; verify, too."""
    code = """
import time, timm, timm_dseq
from timm_dseq.cli import main
from timm_dseq.hub.load import load_backbone
start = time.monotonic()
load_backbone("dseq_jepa_vit_ti16.in1k")
load_backbone("hf-hub:lab/dseq_jepa_vit_ti16.in1k")
assert time.monotonic() - start < 10
assert main(["verify", "lab/dseq_jepa_vit_ti16.in1k"]) == 0
print("loaded")
"""
    names = {"TIMM_DSEQ_NAMESPACE": "lab"}
    assert run_python(code, **names).stdout.endswith("loaded\n")
    run = run_python(code, HF_ENDPOINT=f"http://127.0.0.1:{unused_port}", **names)
    assert run.stdout.endswith("loaded\n"), run.stderr


def test_a_404_without_a_code_is_not_called_passing():
    from timm_dseq.hub.download import clear_hub_errors

    error = OSError("404 Client Error")
    error.response = type("Response", (), {"status_code": 404})()
    with pytest.raises(UserError, match="knows no such organisation or repository"), clear_hub_errors("nobody/x"):
        raise error
