"""A drive with the checkpoints of a tiny model, and a store of the test's own."""

from pathlib import Path

import pytest

from ... import layouts
from ...drive_server import DriveServer, redirected
from . import tiny_sources


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, bytes]:
    """In the authors' format and in Meta's: the target encoder is a ViT-Ti/16, other parts are cut short."""
    folder = tmp_path_factory.mktemp("checkpoints")
    predictor = layouts.random_weights(layouts.predictor_shapes(depth=1), 3)
    files = {}
    for name, save, class_token in (
        (tiny_sources.FILE, layouts.save_official, True),
        (tiny_sources.META_FILE, layouts.save_ijepa, False),
    ):
        target = layouts.random_weights(layouts.encoder_shapes(class_token=class_token), 11)
        student = layouts.random_weights(layouts.encoder_shapes(depth=1, class_token=class_token), 2)
        files[name] = save(folder / name, target, student, predictor).read_bytes()
    return files


@pytest.fixture
def drive(checkpoints):
    with DriveServer() as server, redirected(server.url):
        server.files = dict(checkpoints)
        tiny_sources.register(server.address(tiny_sources.META_FILE))
        yield server
        tiny_sources.forget()


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """The folder of an empty store."""
    from timm_dseq.hub.store import folders

    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return folders.store()


@pytest.fixture
def unverified(monkeypatch):
    """Without the check in other processes, which takes seconds."""
    monkeypatch.setattr("timm_dseq.hub.store.get.verify", lambda folder: {})


@pytest.fixture
def quick(monkeypatch):
    """Without pauses between tries."""
    monkeypatch.setattr("timm_dseq.hub.store.get.PAUSE", 0)


@pytest.fixture
def bring(store, drive, unverified, quick):
    """Bring weights; returns the store's folder of them."""
    from timm_dseq.hub.store.get import get

    def bring(name: str = tiny_sources.OFFICIAL, file: Path | None = None) -> Path:
        assert Path(get(name, file, say=lambda line: None)["folder"]) == store / name
        return store / name

    return bring


@pytest.fixture
def refused(bring, store):
    """What is said of weights that cannot be brought: one line, with nothing in the store that looks like weights."""
    from timm_dseq import UserError
    from timm_dseq.hub.store.folders import stored

    def refused(name: str = tiny_sources.OFFICIAL, file: Path | None = None) -> str:
        with pytest.raises(UserError) as error:
            bring(name, file)
        assert "\n" not in str(error.value) and len(str(error.value)) < 800
        assert not stored(name) and not (store / name).exists()
        return str(error.value)

    return refused
