# ruff: noqa: E501 (source texts are easier to read on one line)
"""Candidates that attack: they try to read, write, connect, or forge a reply.

`{secret}` is a world-readable file with a secret, which is also in the parent's environment.
`{drop}` is a world-writable folder, `{port}` a listener on the loopback interface, `{abstract}` the
name of an abstract socket. A candidate reports what it learns by raising it, since a worker returns
only a message. `DETECTABLE` names the attacks that the canaries must detect if nothing confines
them, which shows that the canaries work.
"""

HONEST = (
    "\ndef merge_models(task_vectors):\n    return sum(0.3 * t for t in task_vectors.values())\n"
)
# A reply in the format of a worker, for candidates that forge one.
FORGED = '{{"ir": "{{}}"}}'

FILES = {
    "open": "raise ValueError(open('{secret}').read())",
    "os.open": "import os\nraise ValueError(os.read(os.open('{secret}', os.O_RDONLY), 99))",
    "io.FileIO": "import io\nraise ValueError(io.FileIO('{secret}').readall())",
    "pathlib": "import pathlib\nraise ValueError(pathlib.Path('{secret}').read_text())",
    "codecs": "import codecs\nraise ValueError(codecs.open('{secret}').read())",
    "linecache": "import linecache\nraise ValueError(linecache.getlines('{secret}'))",
    "fileinput": "import fileinput\nraise ValueError(list(fileinput.input(['{secret}'])))",
    "numpy.fromfile": "import numpy as np\nraise ValueError(bytes(np.fromfile('{secret}', 'u1')))",
    "numpy.memmap": "import numpy as np\nraise ValueError(bytes(np.memmap('{secret}', 'u1')))",
    "numpy.loadtxt": "import numpy as np\nraise ValueError(np.loadtxt('{secret}', dtype=str))",
    "jax.numpy.load": "import jax.numpy as jnp\nraise ValueError(jnp.load('{secret}'))",
    "importlib": (
        "import importlib.machinery as m\n"
        "raise ValueError(m.SourceFileLoader('x', '{secret}').get_data('{secret}'))"
    ),
    "ctypes file": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nfd = libc.open(b'{secret}', 0)\n"
        "text = ctypes.create_string_buffer(99)\nlibc.read(fd, text, 99)\nraise ValueError(text.raw)"
    ),
    "listing": "import os\nraise ValueError(os.listdir('/'), os.getcwd())",
    "environment": "import os\nraise ValueError(dict(os.environ))",
    "parent's environment": (
        "import os\nraise ValueError(open(f'/proc/{{os.getppid()}}/environ').read())"
    ),
    "writing": "open('{drop}/written', 'w').write('x')",
    "making a folder": "import os\nos.mkdir('{drop}/made')",
    "a link": "import os\nos.symlink('{secret}', '{drop}/link')",
    "numpy.save": "import numpy as np\nnp.save('{drop}/saved.npy', np.zeros(3))",
    "tofile": "import numpy as np\nnp.zeros(3).tofile('{drop}/tofile')",
    "sqlite": "import sqlite3\nsqlite3.connect('{drop}/base.db').execute('create table t (x)')",
    "a profile": "import jax\njax.profiler.start_trace('{drop}/trace')",
    "temporary file": "import tempfile\ntempfile.mkstemp(dir='{drop}')",
}
NETWORK = {
    "tcp": "import socket\nsocket.create_connection(('127.0.0.1', {port})).send(b'x')",
    "udp": (
        "import socket\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))"
    ),
    "abstract socket": ("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{abstract}')"),
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=3)",
    "asyncio": ("import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', {port}))"),
    "a server": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "jax.distributed": (
        "import jax\njax.distributed.initialize('127.0.0.1:{port}', 2, 1, initialization_timeout=2)"
    ),
}
PROCESSES = {
    "os.system": "import os\nos.system('touch {drop}/system')",
    "subprocess": "import subprocess\nsubprocess.run(['touch', '{drop}/subprocess'])",
    "exec": "import os\nos.execv('/usr/bin/touch', ['touch', '{drop}/exec'])",
    "fork": "import os\nif os.fork() == 0:\n    open('{drop}/fork', 'w')\n    os._exit(0)\nos.wait()",
    "spawn": "import os\nos.posix_spawn('/usr/bin/touch', ['touch', '{drop}/spawn'], {{}})",
    "multiprocessing": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()"
    ),
    "a pseudo-terminal": "import pty\npty.fork()",
    "a thread": "import threading\nthreading.Thread(target=lambda: open('{drop}/thread', 'w')).start()",
    "an executor": (
        "import concurrent.futures as c\nc.ThreadPoolExecutor().submit(open, '{drop}/pool', 'w')"
    ),
    "killing the parent": "import os\nos.kill(os.getppid(), 9)",
    "killing the group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
    "killing all": "import os\nos.kill(-1, 9)",
    "itself by SIGKILL": "import os\nos.kill(os.getpid(), 9)",
    "abort": "import os\nos.abort()",
    "a null pointer": "import ctypes\nctypes.string_at(0)",
    "a quiet end": "import os\nos._exit(0)",
    "a full stack": "def f(n): return f(n + 1)\nimport sys\nsys.setrecursionlimit(10**8)\nf(0)",
    "ptrace": "import ctypes, os\nctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)",
    "another's memory": (
        "import ctypes, os\nraise ValueError(open(f'/proc/{{os.getppid()}}/mem', 'rb').read(9))"
    ),
    "becoming root": "import os\nos.setuid(0)\nos.setgid(0)\nraise ValueError(open('{secret}').read())",
    "higher limits": (
        "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    ),
    "ignoring the clock": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nsum(range(10**12))"
    ),
    "executable memory": "import mmap\nmmap.mmap(-1, 4096, prot=7)",
    "a deadlock": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
}
INTROSPECTION = {
    "subclasses": (
        "for c in ().__class__.__base__.__subclasses__():\n"
        "    if c.__name__ == '_wrap_close':\n"
        "        raise ValueError(c.__init__.__globals__['popen']('cat {secret}').read())"
    ),
    "frames": (
        "import sys\nf = sys._getframe()\nwhile f.f_back: f = f.f_back\n"
        "raise ValueError(f.f_globals['__builtins__'].open('{secret}').read())"
    ),
    "a traceback's frame": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n"
        "    raise ValueError(e.__traceback__.tb_frame.f_builtins['open']('{secret}').read())"
    ),
    "a function's globals": "raise ValueError((lambda: 0).__globals__['__builtins__']['open']('{secret}').read())",
    "a generator's frame": (
        "g = (0 for _ in ())\nraise ValueError(g.gi_frame.f_builtins['open']('{secret}').read())"
    ),
    "format strings": "raise ValueError('{{0.__class__.__init__.__globals__}}'.format(int))",
    "f-strings": "raise ValueError(f'{{open(\"{secret}\").read()}}')",
    "garbage": "import gc\nraise ValueError([o for o in gc.get_objects() if 'SECRET' in str(o)[:999]])",
    "modules": "import sys\nraise ValueError(sys.modules['os'].popen('cat {secret}').read())",
    "numpy's modules": "import numpy as np\nraise ValueError(np.os.listdir('/'))",
    "typing's modules": "import typing\nraise ValueError(typing.sys.modules['os'].listdir('/'))",
    "getattr": "raise ValueError(getattr(__builtins__, 'op' + 'en')('{secret}').read())",
    "eval": "raise ValueError(eval('open(\"{secret}\").read()'))",
    "exec in Python": "exec('raise ValueError(open(\"{secret}\").read())')",
    "pickle": (
        "import pickle\nraise ValueError(pickle.loads(b'cbuiltins\\nopen\\n(V{secret}\\ntR.').read())"
    ),
    "marshal": (
        "import marshal\nexec(marshal.loads(marshal.dumps(compile(\n"
        "    'raise ValueError(open(\"{secret}\").read())', 'x', 'exec'))))"
    ),
    "a decorator": "@(lambda f: open('{secret}').read())\ndef f(): pass\nraise ValueError(f)",
    "a metaclass": (
        "class M(type):\n    def __new__(m, *a): raise ValueError(open('{secret}').read())\n"
        "class C(metaclass=M): pass"
    ),
    "a destructor": (
        "class C:\n    def __del__(self): open('{drop}/deleted', 'w')\nx = C()\ndel x"
    ),
    "an exit handler": "import atexit\natexit.register(open, '{drop}/exit', 'w')",
    "a trace function": "import sys\nsys.settrace(lambda *a: open('{drop}/traced', 'w'))\nmax(1, 2)",
    "an import hook": "import sys\nsys.meta_path.insert(0, open('{secret}'))",
    "a class pattern": "match 1:\n    case object(__class__=c): raise ValueError(c.__base__)",
    "a coding cookie": "# -*- coding: utf-7 -*-\nraise ValueError(open('{secret}').read())",
}
FORGERY = {
    "print": "print('D' + '" + FORGED + "')",
    "standard output": "import os\nos.write(1, b'" + FORGED + "')",
    "every descriptor": (
        "import os\nfor fd in range(1, 99):\n    try: os.write(fd, b'" + FORGED + "')\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "an admission": (
        'import os\nos.write(3, b\'{{"verdict": "admitted", "rule": "", "message": ""}}\')\n'
        "os._exit(0)"
    ),
    "a callback in the IR": (
        "import json, os\n"
        "body = {{'inputs': 6, 'equations': [['pure_callback', [0], 1, {{'callback': 'os.system'}}]],\n"
        "        'outputs': [6]}}\n"
        "ir = {{'version': 1, 'form': 'tensor', 'hyperparameters': {{}}, 'constants': [],\n"
        "        'programs': [{{'of': [None, [16, 8]], 'block': body}}]}}\n"
        "os.write(3, json.dumps({{'ir': json.dumps(ir)}}).encode())\nos._exit(0)"
    ),
    "a flood": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "a closed pipe": "import os\nos.close(3)",
    "patched encoder": (
        "import sdjax.sandbox.ir.encode as e, sdjax.sandbox.ir.hashes as h, sdjax.sandbox.worker.trace as t\n"
        't.canonical = lambda m: \'{{"version": 1, "form": "__import__"}}\''
    ),
    "patched json": "import json\njson.dumps = lambda *a, **k: '[' * 100000",
    "pickled answer": ("import os, pickle\nos.write(3, pickle.dumps(print))\nos._exit(0)"),
}
ARRAYS = {
    "pure_callback": (
        "import jax\nmerge = lambda t: jax.pure_callback(lambda x: open('{drop}/pure', 'w') and x, t, t)"
    ),
    "io_callback": (
        "import jax.experimental as e\nmerge = lambda t: e.io_callback(lambda x: x, t, t)"
    ),
    "debug callback": (
        "import jax\ndef merge(t):\n    jax.debug.callback(lambda x: open('{drop}/debug', 'w'), t)\n    return t"
    ),
    "ffi": (
        "import jax\nmerge = lambda t: jax.ffi.ffi_call('system', jax.ShapeDtypeStruct(t.shape, t.dtype))(t)"
    ),
    "a primitive of its own": (
        "import jax.extend.core as c\np = c.Primitive('add')\np.def_abstract_eval(lambda x: x)\n"
        "p.def_impl(lambda x: open('{drop}/impl', 'w'))\nmerge = lambda t: p.bind(t)"
    ),
    "an effect": (
        "import jax\ndef merge(t):\n    jax.debug.print('SECRET {{}}', t[0, 0])\n    return t"
    ),
    "computing at once": (
        "import jax\nimport jax.numpy as jnp\nwith jax.ensure_compile_time_eval():\n    jnp.ones(3) + 1"
    ),
    "compiling": "import jax\nmerge = lambda t: jax.jit(lambda x: x).lower(t).compile()(t)",
    "a device": "import jax\njax.devices()",
    "a serialized module": "import jax.export as e\nmerge = lambda t: e.deserialize(b'x').call(t)",
}


def _with_own_merge(text: str) -> str:
    """Add a `merge_models` that calls the candidate's `merge(tensor)` if it defines one."""
    if "merge = " not in text and "def merge(" not in text:
        return text + HONEST
    return text + "\ndef merge_models(task_vectors):\n    return merge(task_vectors['expert_1'])\n"


GROUPS = (FILES, NETWORK, PROCESSES, INTROSPECTION, FORGERY, ARRAYS)
HOSTILE = {name: _with_own_merge(text) for group in GROUPS for name, text in group.items()}
assert len(HOSTILE) == sum(map(len, GROUPS))
# Attacks that the canaries must detect if nothing confines them.
DETECTABLE = (
    *("open", "os.open", "ctypes file", "environment", "writing", "making a folder", "numpy.save"),
    *("tcp", "udp", "abstract socket", "urllib", "os.system", "subprocess", "exec", "fork"),
    *("subclasses", "frames", "a generator's frame", "pickle", "marshal", "a metaclass"),
    *("a destructor", "an exit handler", "a thread", "eval", "exec in Python", "f-strings"),
)
