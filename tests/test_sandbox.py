"""Programs of a model: whatever they do, they end, and leave nothing behind."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from upq.evals.sandbox import Limits, Ran, check, run

QUICK = Limits(seconds=1, memory=256 << 20, file=1 << 20)

PASSES = [
    "x = 1 + 1\nassert x == 2",
    "import math, json, re, collections, itertools, functools, typing, heapq, string, random, datetime, hashlib",
    "with open('own', 'w') as f:\n    f.write('a')\nassert open('own').read() == 'a'\nimport os\nos.remove('own')",
    "import tempfile\nwith tempfile.TemporaryDirectory() as d:\n    open(d + '/a', 'w').close()",
    "print('to nobody')",
    "if __name__ == '__main__':\n    pass",
]
ENDS = [
    ("while True: pass", "time"),
    ("import time\ntime.sleep(60)", "time"),
    ("import os\nwhile True: os.fork()", "process"),
    ("import subprocess\nsubprocess.run(['true'])", "process"),
    ("import os\nos.kill(os.getppid(), 9)", "process"),
    ("x = []\nwhile True: x.append(bytearray(1 << 20))", "memory"),
    ("x = bytearray(1 << 40)", "memory"),
    ("open('/tmp/upq-outside', 'w')", "files"),
    ("import pathlib\npathlib.Path('../upq-outside').write_text('x')", "files"),
    ("import os\ntry:\n    os.mkdir('/tmp/upq-outside')\nexcept BaseException:\n    pass", "files"),
    ("import os\nos.symlink('/tmp', 'link')\nopen('link/upq-outside', 'w')", "files"),
    ("f = open('large', 'wb')\nwhile True: f.write(bytes(1 << 20))", "failed"),
    ("import socket\nsocket.create_connection(('1.1.1.1', 53))", "network"),
    ("import urllib.request\nurllib.request.urlopen('http://localhost:1')", "network"),
    ("raise ValueError", "failed"),
    ("assert False", "failed"),
    ("syntax error", "failed"),
    ("import sys\nsys.exit(0)", "failed"),
    ("def f(): return f()\nf()", "failed"),
    ("import os\nos._exit(0)", "died"),
    ("import os\nos.close(1)\nos.abort()", "died"),
    ("\0", "failed"),
    ("\ud800", "failed"),
]  # fmt: skip


@pytest.mark.parametrize("program", PASSES)
def test_a_program_that_stays_in_its_folder_passes(program: str) -> None:
    assert run(program, replace(QUICK, seconds=60)).ending == "passed"


@pytest.mark.parametrize(("program", "ending"), ENDS)
def test_any_other_is_stopped_and_leaves_nothing(
    program: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    began = time.monotonic()
    limits = QUICK if ending == "time" else replace(QUICK, seconds=60)  # on a machine that is busy
    assert run(program, limits).ending == ending
    assert ending != "time" or time.monotonic() - began < 30
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
    assert not Path("/tmp/upq-outside").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_leaves_its_group_dies_with_it() -> None:
    """By the kernel's own means, where the hook does not see it: `os.setsid` raises no event."""
    marker = Limits(seconds=1, memory=(256 << 20) + os.getpid())  # its own among others'
    assert run("import os, time\nos.setsid()\ntime.sleep(60)", marker).ending == "time"
    time.sleep(0.1)
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if "_child.py" in " ".join(process.info["cmdline"] or ())
        and process.rlimit(psutil.RLIMIT_AS)[0] == marker.memory
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_a_child_apart_has_no_network_below_the_hook() -> None:
    if not (found := check()).apart:
        pytest.skip("this machine gives no namespaces")
    assert found == Ran("passed", True)
    assert run("assert [line for line in open('/proc/net/dev') if ':' in line and 'lo:' not in line] == []").passed
