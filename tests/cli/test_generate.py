"""`sdjax generate` on the zoo."""

import json
import shutil

import pytest
from click.testing import CliRunner

from sdjax.cli.generate import readable
from sdjax.cli.main import main
from sdjax.io.model_paths import zoo_models
from sdjax.search.sampling import GeneratedSample

# The first samples of the demo: three programs and a repetition of the first.
DEMO = ("zoo:seed", "--prompt", "short", "--max-new-tokens", 96, "--slots", 4)


def run_cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def user_error(*arguments):
    result = run_cli(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return line


def test_programs_are_judged_and_written_in_order(tmp_path):
    out = tmp_path / "new" / "samples.jsonl"
    result = run_cli("generate", *DEMO, "-n", 6, "--check", "--scope", "mlp", "--out", out)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(6))
    admitted = [row for row in rows if row["verdict"] == "admitted"]
    assert admitted
    summary = result.stdout.strip()
    assert summary.startswith("6 samples, ")
    assert f"{len(admitted)} novel ({100 * len(admitted) / 6:.1f}%)" in summary
    for row in admitted:  # the identity is that of `sdjax check`
        file = tmp_path / "program.py"
        file.write_text(row["program"])
        checked = run_cli("check", file, "--scope", "mlp", "--json")
        assert json.loads(checked.stdout)["identity"] == row["identity"]
        break
    assert "already exists" in user_error("generate", *DEMO, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == ["samples.jsonl"]


@pytest.mark.slow
def test_repeated_programs_are_duplicates():
    result = run_cli("generate", *DEMO, "-n", 3, "--temperature", 0, "--check", "--json")
    first, *others = [json.loads(line) for line in result.stdout.splitlines()]
    assert first["verdict"] == "admitted"
    assert [(row["verdict"], row["duplicate_of"]) for row in others] == [
        ("duplicate", "sample 0")
    ] * 2
    assert "1 novel (33.3%)" in result.stderr


def test_any_text_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sum.txt").write_text("12+34=\n")
    result = run_cli("generate", "zoo:seed", "--prompt", "sum.txt", "-n", 1, "--temperature", 0)
    assert result.output == "--- sample 0\n46\n\n1 sample, 1 ended by a stop token\n"


def test_control_characters_are_printed_as_codes():
    sample = GeneratedSample(
        number=0, text="\x1b[31mred", tokens=(), stopped=True, source=None, verdict=None
    )
    assert readable(sample, checked=False) == "--- sample 0\n\\u{001b}[31mred\n"


@pytest.mark.slow
def test_chat_template_wraps_the_prompt(tmp_path):
    """A model with a chat template gets it once, without a second start token."""
    folder = tmp_path / "chat"
    shutil.copytree(zoo_models()["seed"], folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}=")
    (tmp_path / "sum.txt").write_text("12+34")
    result = run_cli("generate", folder, "--prompt", tmp_path / "sum.txt", "--temperature", 0)
    assert result.output.startswith("--- sample 0\n46\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "generate requires MODEL, or --run DIR"),
        (("zoo:nothing",), "no such model in the zoo"),
        (("zoo:seed", "--prompt", "shrot"), "did you mean short?"),
        (("zoo:seed", "--scope", "mlp"), "--scope requires --check"),
        (("zoo:seed", "--temperature", "-1"), "temperature must be 0 or more"),
        (("zoo:seed", "--top-p", "2"), "top_p must be above 0"),
        (("zoo:seed", "--mesh", "tensor"), "write AXIS=SIZE"),
        (("zoo:seed", "--mesh", "model=2"), "unknown key model"),
        (("zoo:seed", "--mesh", "tensor=8"), "tensor=8 does not match 1 device;"),
        (
            ("zoo:seed", "--prompt", "short", "--max-new-tokens", 10**5),
            "the model's maximum sequence length is 512; lower max_new_tokens",
        ),
        (("--run", "nowhere"), "nowhere"),
        (("--run", "nowhere", "--experts", "2"), "--run has its own experts"),
        (("zoo:seed", "--json", "--out", "x"), "remove --json"),
        (
            ("zoo:seed", "--prompt", "short", "--slots", 10**9),
            "1000000000 sequences of up to 512 tokens at a time requires",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    assert message in user_error("generate", *arguments)


@pytest.mark.parametrize("option", ["--iteration", "--rng-seed"])
def test_numbers_of_random_keys_are_bounded(option):
    result = run_cli("generate", "zoo:seed", option, 5 * 10**9)
    assert result.exit_code == 2
    assert "5000000000 is not in the range" in result.output
