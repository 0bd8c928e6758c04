"""Verdicts on the whole catalogue; worker processes that hang, die or are abandoned."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from catalogue import TIES, VALID, merge
from refused import REFUSED

from sdjax.core.errors import UserError
from sdjax.isolation.confine import ALWAYS, LAYERS
from sdjax.isolation.pool import Reply
from sdjax.isolation.server import DONE
from sdjax.sandbox.config import Limits
from sdjax.sandbox.refusal import MESSAGE_LENGTH, Refusal
from sdjax.sandbox.replies import parse_trace
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import VERDICTS, DuplicateIndex


@pytest.fixture(scope="module")
def verdicts(sandbox):
    """Return the verdicts on the whole catalogue by name."""
    sources = [*VALID.values(), *(source for _, source, _, _ in REFUSED)]
    names = [*VALID, *(name for name, *_ in REFUSED)]
    found = {names[index]: verdict for index, verdict in sandbox.judge_all(sources)}
    assert list(found) == names
    return found


@pytest.mark.parametrize("name", VALID)
def test_valid_candidates_are_admitted(verdicts, name):
    verdict = verdicts[name]
    assert verdict.verdict == "admitted", verdict.message
    assert verdict.cost > 0
    assert verdict.memory > 0
    assert verdict.form == ("tree" if name == "tree" else "tensor")
    assert json.loads(verdict.ir)["version"] == 1


@pytest.mark.parametrize(("name", "expected", "rule"), [(n, v, r) for n, _, v, r in REFUSED])
def test_invalid_candidates_are_refused_with_a_reason(verdicts, name, expected, rule):
    verdict = verdicts[name]
    assert (verdict.verdict, verdict.rule) == (expected, rule or verdict.rule), verdict.message
    assert verdict.ir is None
    assert 0 < len(verdict.message) <= MESSAGE_LENGTH
    for leak in ("0x", "://", "/home", "/work", "site-packages", "Traceback"):
        assert leak not in verdict.message


def test_message_on_a_branch_suggests_jnp_where(verdicts):
    message = verdicts["branch on depth"].message
    assert message.startswith("line 4: ")  # two imports, the def, the `if`
    assert "jnp.where(depth < 0.5, a, b)" in message


def test_requests_are_the_inputs_that_are_read(verdicts, sandbox):
    assert verdicts["linear"].requests == ()
    assert verdicts["dare"].requests == ("key",)
    assert verdicts["branch on kind"].requests == ("kind",)
    idle = merge(
        "del base, kind\nreturn 0.125 * task_vectors['expert_1']", "task_vectors, base, kind"
    )
    assert sandbox.judge(idle).requests == ()


@pytest.mark.parametrize(
    ("body", "notes"),
    [
        ("return 0 * task_vectors['expert_1']", ("equals the seed",)),
        ("return task_vectors['expert_2']", ("equals an expert: expert_2",)),
        ("return -0.3 * task_vectors['expert_3']", ("plain scaling of one task vector: expert_3",)),
        ("return sum(task_vectors.values())", ()),
        ("return jnp.median(jnp.stack(list(task_vectors.values())), axis=0)", ()),
        ("a, b, c = task_vectors.values()\nreturn a + b", ("depends on the order of experts",)),
        (
            "a, b, c = task_vectors.values()\nreturn a + b + c * 2",
            ("depends on the order of experts",),
        ),
    ],
)
def test_notes_describe_the_result(sandbox, body, notes):
    assert sandbox.judge(merge(body)).notes == notes


def test_duplicates_name_the_original(sandbox):
    renamed = TIES.replace("kept", "survivors").replace("tau", "vector")
    commuted = merge("return sum(t * 0.25 for t in task_vectors.values())")
    plain = merge("return sum(0.25 * t for t in task_vectors.values())")
    sources = [TIES, plain, renamed, "import os", commuted, TIES.replace("0.7", "0.71")]
    seen = DuplicateIndex()
    names = [f"sample {i}" for i in range(6)]
    found = [v for _, v in sandbox.judge_all(sources, seen=seen, names=names)]
    assert [v.verdict for v in found] == [
        *("admitted", "admitted", "duplicate", "refused", "admitted", "admitted")
    ]
    assert found[2].duplicate_of == "sample 0"
    assert found[2].identity == found[0].identity
    assert "same array program" in found[2].message
    assert [v.similar_to for v in found] == [None, None, None, None, "sample 1", None]
    assert found[4].remarks == ("same results as sample 1 on the probe tensors",)
    again = sandbox.judge(plain, seen=seen, name="later")  # as in a resumed run
    assert again.duplicate_of == "sample 1"


def test_candidates_that_differ_in_depth_only_are_distinct(sandbox):
    source = "return jnp.where(depth < {}, 0.2, 0.4) * task_vectors['expert_1']"
    sources = [merge(source.format(t), "task_vectors, depth") for t in (0.4, 0.6)]
    found = [v for _, v in sandbox.judge_all(sources)]
    assert [v.verdict for v in found] == ["admitted", "admitted"]
    assert found[1].similar_to == "#0"  # the two layers have the depths 0 and 1


def test_verdicts_are_independent_of_the_number_of_workers(signature, verdicts):
    sources = [*VALID.values()][:8] + [source for _, source, _, _ in REFUSED][8:24]
    names = [*VALID][:8] + [name for name, *_ in REFUSED][8:24]
    with Sandbox(signature, workers=1) as alone:
        for index, verdict in alone.judge_all(sources):
            assert verdict == verdicts[names[index]]


def test_sandbox_recovers_from_killed_workers(signature):
    with Sandbox(signature, workers=2) as sandbox:
        served = sandbox.judge_all([VALID["linear"]] * 2)
        next(served)
        for pid in _descendants(sandbox._pool.pid):
            with contextlib.suppress(ProcessLookupError):  # it may have died with its parent
                os.kill(pid, signal.SIGKILL)
        list(served)
        assert sandbox.judge(VALID["linear"]).admitted


def test_wall_clock_timeout_is_retried_and_reported(signature):
    endless, plain = REFUSED[-1][1], "import os"
    limits = Limits(wall_seconds=0.5)
    short_limits = MergeSignature(slots=signature.slots, tensors=signature.tensors, limits=limits)
    with Sandbox(short_limits, workers=2) as sandbox:
        started = time.monotonic()
        found = [v for _, v in sandbox.judge_all([endless, plain, endless])]
        assert [v.verdict for v in found] == ["timed out", "refused", "timed out"]
        assert {v.rule for v in found[::2]} == {"wall-clock"}
        # Both at the same time, then each again on its own.
        assert time.monotonic() - started > 3 * 0.5 - 0.1
        assert _grandchildren(sandbox._pool.pid) == []


def test_abandoned_iteration_stops_all_processes(signature):
    # The others must not end before the first verdict, however long its compilation takes.
    with Sandbox(_patient(signature), workers=2) as sandbox:
        for _, verdict in sandbox.judge_all([VALID["linear"], REFUSED[-1][1], REFUSED[-1][1]]):
            assert verdict.admitted
            pids = [sandbox._pool.pid, *_descendants(sandbox._pool.pid)]
            break
        assert not any(_alive(pid) for pid in pids)
        assert sandbox.judge(VALID["linear"]).admitted  # the sandbox is still usable
        pids = [sandbox._pool.pid, *_descendants(sandbox._pool.pid)]
    assert len(pids) >= 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # not even a zombie


def test_all_processes_exit_if_the_parent_is_killed(signature, tmp_path):
    script = (
        "import sys, time\n"
        "from sdjax.sandbox.signature import MergeSignature\n"
        "from sdjax.sandbox.sandbox import Sandbox\n"
        "s = Sandbox(MergeSignature.from_json(sys.argv[1]), workers=2).__enter__()\n"
        "print(s._pool.pid, flush=True)\n"
        "list(s.judge_all(['sum(range(10**12))\\ndef merge_models(t): return 0'] * 2))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, _patient(signature).to_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        server = int(parent.stdout.readline())
        deadline = time.monotonic() + 60
        while not _grandchildren(server):  # until a worker has started
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pids = [server, *_descendants(server)]
        parent.kill()
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in pids)


def test_sandbox_reports_its_layers(sandbox):
    assert sandbox.layers == (*ALWAYS, *LAYERS)


# Boot code of a server that runs on a machine without Landlock.
_WITHOUT_LANDLOCK = (
    "import sys; sys.path[:0] = {paths!r}\n"
    "from sdjax.isolation import confine\n"
    "def missing(limits): raise OSError\n"
    "confine.LAYERS['landlock'] = missing\n"
    "from sdjax.isolation.server import main; main({groups})"
)


def test_worker_that_lacks_a_layer_refuses_its_candidate(signature, monkeypatch):
    monkeypatch.setattr("sdjax.isolation.client._BOOT", _WITHOUT_LANDLOCK)
    with Sandbox(signature, workers=1) as sandbox:
        verdict = sandbox.judge(VALID["linear"])
        assert (verdict.verdict, verdict.rule) == ("refused", "worker")
    with Sandbox(signature, workers=1, allow_missing=["landlock"]) as sandbox:
        assert sandbox.judge(VALID["linear"]).admitted


def test_sandbox_that_is_not_entered_raises_user_error(signature):
    with pytest.raises(UserError, match="with Sandbox"):
        Sandbox(signature).judge("x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"X",
        b"D",
        b"Dnot json",
        b"D[]",
        b'D{"ir": 1}',
        b'D{"ir": "{}", "verdict": "admitted"}',
        b'D{"verdict": "admitted", "rule": "x", "message": ""}',
        b'D{"verdict": "timed out", "rule": "x", "message": ""}',
        b'D{"verdict": "refused", "rule": "<b>", "message": ""}',
        b"D" + b"[" * 100_000,
        b"D\xff\xfe",
    ],
)
def test_forged_replies_are_refused(data):
    answer = parse_trace(Reply(key=0, status=data[:1], data=data[1:]), Limits())
    assert isinstance(answer, Refusal)
    assert answer.verdict in VERDICTS
    assert answer.rule == "worker"


def test_worker_messages_are_sanitized():
    text = "at 0xdeadbeef in /home/me/secret/x.py\n\x1b[31m" + "y" * 1000
    data = json.dumps({"verdict": "refused", "rule": "r", "message": text}).encode()
    message = parse_trace(Reply(key=0, status=DONE, data=data), Limits()).message
    assert message.startswith("at 0x… in … [31my")
    assert len(message) == MESSAGE_LENGTH


def _patient(signature: MergeSignature) -> MergeSignature:
    """Return a signature whose candidates do not run out of time while a test lasts."""
    limits = dataclasses.replace(signature.limits, cpu_seconds=600)
    return dataclasses.replace(signature, limits=limits)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [p for child in map(int, children) for p in (child, *_descendants(child))]


def _grandchildren(pid: int) -> list[int]:
    return [grandchild for child in _descendants(pid) for grandchild in _descendants(child)]
