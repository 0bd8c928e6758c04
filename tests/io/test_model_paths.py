"""Model names: folders, the zoo, and a simulated Hugging Face Hub."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model
from sdjax.io.model_paths import locate, model_folder


@pytest.fixture
def hub(monkeypatch):
    """Simulate the Hugging Face Hub and record the requests."""
    request = {}

    def download(repository, *, revision, allow_patterns, ignore_patterns):
        request.update(repository=repository, revision=revision)
        request.setdefault("patterns", []).extend(allow_patterns)
        if isinstance(request["answer"], Exception):
            raise request["answer"]
        return str(request["answer"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return request


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("org/Model-1.5B", "org/Model-1.5B", None),
        ("org/model@refs/pr/7", "org/model", "refs/pr/7"),
    ],
)
def test_hub_model_is_downloaded(hub, name, repository, revision):
    hub["answer"] = model_folder("zoo:seed")
    folder = model_folder(name)
    assert (hub["repository"], hub["revision"]) == (repository, revision)
    assert load_model(folder)[0].family == "llama"


def test_files_of_pytorch_are_downloaded_only_without_safetensors(hub, tmp_path):
    hub["answer"] = model_folder("zoo:seed")
    model_folder("org/model")
    assert not [pattern for pattern in hub["patterns"] if pattern.endswith(".bin")]
    hub["answer"] = tmp_path
    model_folder("org/model")
    assert "pytorch_model*.bin" in hub["patterns"]


@pytest.mark.parametrize("name", ["a" * 5000, "~nouser/x", "a\nb", "a\0b"])
def test_invalid_folder_name_raises_user_error(tmp_path, name):
    with pytest.raises(UserError, match="no such model folder") as caught:
        model_folder(name, relative_to=tmp_path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_files_are_refused_with_their_folder_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"model\.gguf: a file; give the folder that contains it"):
        model_folder(str(tmp_path / "model.gguf"))


def test_existing_folder_takes_precedence_over_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/model") == Path("org/model")
    assert "repository" not in hub


def answer(kind):
    return kind("many\nlines", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.LocalEntryNotFoundError("no"), "HF_HUB_OFFLINE is set: copy the model"),
        (answer(errors.RepositoryNotFoundError), "it does not exist or is private"),
        (answer(errors.GatedRepoError), "it is gated: accept its terms"),
        (answer(errors.RevisionNotFoundError), "it has no revision 'v2'"),
        (answer(errors.HfHubHTTPError), "many lines"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_failed_download_raises_user_error(hub, failure, message):
    hub["answer"] = failure
    with pytest.raises(UserError, match=message) as caught:
        model_folder("org/model@v2")
    assert str(caught.value).startswith("org/model@v2: no such model folder, and not downloaded")
    assert "\n" not in str(caught.value)


def test_download_without_network_raises_user_error():
    with pytest.raises(UserError, match="it is not in the cache"):
        model_folder("no-such-owner/no-such-model")


@pytest.mark.parametrize("name", ["/no/where", "./no/where", "a/b/c", "nowhere", "~/no-such"])
def test_paths_are_not_looked_up_on_hub(hub, name):
    with pytest.raises(UserError, match="no such model folder; give a Hugging Face folder"):
        model_folder(name)
    assert "repository" not in hub


def test_locate_model_with_adapter(tmp_path, monkeypatch):
    for name in ("here/a", "there/a", "here/b", "there/c", "here/a+b"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    here = tmp_path / "here"
    assert locate("a", relative_to=here) == (here / "a", None)
    assert locate("a") == (Path("a"), None)
    assert locate("c+b", relative_to=here) == (Path("c"), here / "b")
    assert locate("zoo:seed+c")[1] == Path("c")
    assert locate("a+b", relative_to=here) == (here / "a+b", None)
    with pytest.raises(UserError, match=f"d: no such adapter folder in {here} or in"):
        locate("a+d", relative_to=here)


def test_plus_in_the_name_of_a_folder_does_not_separate_an_adapter(tmp_path, monkeypatch):
    for name in ("c++/seed", "c++/ad"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("c++/seed+c++/ad") == (Path("c++/seed"), Path("c++/ad"))
    assert locate("zoo:seed+c++/ad")[1] == Path("c++/ad")
    with pytest.raises(UserError, match=r"^missing: no such adapter folder"):  # the last one
        locate("c++/seed+missing")
    with pytest.raises(UserError, match=r"^c\+\+/none: no such model folder"):
        locate("c++/none+missing")
