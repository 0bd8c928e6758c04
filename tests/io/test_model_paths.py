"""Names of models: folders, the zoo, and Hugging Face, which is not reached from here."""

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
    """Answers in the place of Hugging Face, and keeps what was asked for."""
    asked = {}

    def download(repository, *, revision, allow_patterns, ignore_patterns):
        asked.update(repository=repository, revision=revision)
        if isinstance(asked["answer"], Exception):
            raise asked["answer"]
        return str(asked["answer"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("org/Model-1.5B", "org/Model-1.5B", None),
        ("org/model@refs/pr/7", "org/model", "refs/pr/7"),
    ],
)
def test_a_name_on_hugging_face_is_fetched(hub, name, repository, revision):
    hub["answer"] = model_folder("zoo:seed")
    folder = model_folder(name)
    assert (hub["repository"], hub["revision"]) == (repository, revision)
    assert load_model(folder)[0].family == "llama"


@pytest.mark.parametrize("name", ["a" * 5000, "~nouser/x", "a\nb", "a\0b"])
def test_a_name_that_no_folder_can_have(tmp_path, name):
    with pytest.raises(UserError, match="no such model folder") as caught:
        model_folder(name, relative_to=tmp_path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_folder_of_that_name_goes_first(hub, tmp_path, monkeypatch):
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("org/model") == Path("org/model")
    assert "repository" not in hub


def answer(kind):
    return kind("many\nlines", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.LocalEntryNotFoundError("no"), "cannot be reached: copy the model"),
        (answer(errors.RepositoryNotFoundError), "it does not exist or is private"),
        (answer(errors.GatedRepoError), "it is gated: accept its terms"),
        (answer(errors.RevisionNotFoundError), "it has no revision 'v2'"),
        (answer(errors.HfHubHTTPError), "many lines"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_what_cannot_be_fetched_is_a_one_line_error(hub, failure, message):
    hub["answer"] = failure
    with pytest.raises(UserError, match=message) as caught:
        model_folder("org/model@v2")
    assert str(caught.value).startswith("org/model@v2: no such model folder, and not downloaded")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_real_client_says_so():
    with pytest.raises(UserError, match="cannot be reached"):
        model_folder("no-such-owner/no-such-model")


@pytest.mark.parametrize("name", ["/no/where", "./no/where", "a/b/c", "nowhere", "~/no-such"])
def test_a_path_is_not_looked_for_on_hugging_face(hub, name):
    with pytest.raises(UserError, match="no such model folder; give a Hugging Face folder"):
        model_folder(name)
    assert "repository" not in hub


def test_an_adapter_is_named_behind_its_model(tmp_path, monkeypatch):
    for name in ("here/a", "there/a", "here/b", "there/c", "here/a+b"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    here = tmp_path / "here"
    assert locate("a", relative_to=here) == (here / "a", None)
    assert locate("a") == (Path("a"), None)
    assert locate("c+b", relative_to=here) == (Path("c"), here / "b")
    assert locate("zoo:seed+c")[1] == Path("c")
    assert locate("a+b", relative_to=here) == (here / "a+b", None)
    with pytest.raises(UserError, match=f"d: no such model folder in {here} or in"):
        locate("a+d", relative_to=here)
