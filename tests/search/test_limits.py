"""Limits that a stored run's config may not raise without the user's word."""

import dataclasses
import re

import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.cli.sandbox_options import signature_from_options
from sdjax.core.errors import UserError
from sdjax.generators.config import EndpointConfig, GeneratorConfig
from sdjax.sandbox.config import SandboxConfig
from sdjax.search.config import read_config
from sdjax.search.limits import check_endpoints, check_limits, raised_limits
from sdjax.search.multihost import stored_config
from sdjax.search.store import Store

FIELDS = [field.name for field in dataclasses.fields(SandboxConfig)]


def higher(name):
    if name == "allow_missing":
        return SandboxConfig(allow_missing=("landlock",))
    return SandboxConfig(**{name: 2 * getattr(SandboxConfig(), name)})


@pytest.mark.parametrize("name", FIELDS)
def test_every_limit_counts(name):
    assert list(raised_limits(higher(name))) == [name]
    with pytest.raises(UserError, match=rf"^folder: .*sandbox\.{name} .*add --trust-limits$"):
        check_limits(higher(name), "folder", trusted=False)
    check_limits(higher(name), "folder", trusted=True)
    for key in ("sandbox", f"sandbox.{name}"):  # named on the command line
        check_limits(higher(name), "folder", trusted=False, overrides=[f"{key}=…"])
    with pytest.raises(UserError):
        check_limits(higher(name), "folder", trusted=False, overrides=["sandbox.other=1"])


def test_lower_limits_count_as_the_defaults():
    config = SandboxConfig(max_expansion=1, workers=1, apply_seconds=0.5, compile_wall_seconds=1.0)
    assert raised_limits(config) == {}


def test_message_names_three_limits_at_most():
    config = SandboxConfig(max_expansion=64, nesting=9, workers=3, equations=10_000)
    with pytest.raises(UserError) as error:
        check_limits(config, "folder", trusted=False)
    assert str(error.value) == (
        "folder: its config allows programs more than the defaults: sandbox.equations is 10,000, "
        "not 4,000; sandbox.nesting is 9, not 8; sandbox.max_expansion is 64, not 32 (and 1 more);"
        " if you trust the author of this run, add --trust-limits"
    )


@pytest.fixture
def run(tmp_path):
    """A run whose programs may use twice the memory."""
    folder = tmp_path / "run"
    config = read_config("configs/demo.yaml", ["sandbox.max_expansion=64"])
    Store.create(folder, config=config.to_json(), versions={}, layers=()).close()
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "merge --run RUN OUT",
        "check ties --run RUN",
        "generate --run RUN --check",
        "run --resume RUN --dry-run",
    ],
)
def test_commands_refuse_the_limits_of_a_run_in_one_line(run, tmp_path, command):
    paths = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    arguments = [paths.get(word, word) for word in command.split()]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert re.fullmatch(r"sdjax: \S+/run: its config .* add --trust-limits\n", result.output)


def test_accepted_limits_are_those_of_a_run(run, tmp_path):
    arguments = ["merge", "--run", str(run), str(tmp_path / "out"), "--trust-limits"]
    result = CliRunner().invoke(main, arguments)
    assert "the run has no scored program" in result.output  # the next thing that is wrong
    options = {"model": None, "experts": None, "scope": None}
    signature = signature_from_options(**options, run=run, trust_limits=True)
    assert signature.limits.max_expansion == 64
    for command in (["check", "ties"], ["run", "demo"], ["generate", "zoo:seed"]):
        result = CliRunner().invoke(main, [*command, "--trust-limits"])
        assert result.exit_code == 2
        assert re.fullmatch(r"sdjax: --trust-limits requires .*\n", result.output)


def test_overrides_are_the_words_of_the_user(run):
    with pytest.raises(UserError, match="max_expansion"):
        stored_config(run, ["sandbox.workers=8"])
    config = stored_config(run, ["sandbox.workers=8", "sandbox.max_expansion=64"])
    assert (config.sandbox.workers, config.sandbox.max_expansion) == (8, 64)
    assert stored_config(run, trust_limits=True).sandbox.max_expansion == 64


def test_endpoint_of_a_stored_run_is_contacted_only_if_the_user_says_so(small_config):
    endpoint = EndpointConfig(base_url="http://stranger/v1", model="m", api_key_env="MY_KEY")

    def configured(**changes):
        generator = GeneratorConfig(endpoint=dataclasses.replace(endpoint, **changes))
        return dataclasses.replace(small_config, generators={"gpt": generator})

    expected = r"sends prompts and the key in MY_KEY to http://stranger/v1; .*add --trust-limits"
    with pytest.raises(UserError, match=expected):
        check_endpoints(configured(), "folder", trusted=False, overrides=["iterations=3"])
    with pytest.raises(UserError, match="sends prompts to http://stranger/v1"):
        check_endpoints(configured(api_key_env=None), "folder", trusted=False)
    check_endpoints(configured(), "folder", trusted=True)
    own = ["generators.gpt.endpoint.base_url=http://mine/v1"]
    check_endpoints(configured(), "folder", trusted=False, overrides=own)
    check_endpoints(configured(replay="file"), "folder", trusted=False)
    check_endpoints(small_config, "folder", trusted=False)
