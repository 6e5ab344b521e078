"""New Python processes, each without the seconds that the import of torch and torchvision takes.

As a script this is the process that has imported them, and that forks for every request. Neither of them reads what the
client of a Hub reads: huggingface_hub, timm and this package are imported in an environment of the child's own.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

TIMEOUT = 300


def run_python(environment, *args):
    """What `python -c CODE ARGUMENT ...` or `python -m MODULE ARGUMENT ...` gives in an environment."""
    if not sys.platform.startswith('linux'):  # without fork, or where libraries that torch uses do not survive one
        command = [sys.executable, *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ('stdout', 'stderr')]
        status = _ask(dict(args=args, environment=environment, folder=os.getcwd(), files=files))
        return subprocess.CompletedProcess(args, status, *(Path(file).read_text() for file in files))


def _ask(request):
    server = _server()
    try:
        server.stdin.write(json.dumps(request) + '\n')
        server.stdin.flush()
        return int(server.stdout.readline())
    except BaseException:  # an interrupted test leaves an answer behind: the next one asks another server
        server.kill()
        _server.cache_clear()
        raise


@functools.cache
def _server():
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # the end of its input ends it
    return server


def _serve():
    """Returns each request in a process of its own, and None in this one at the end."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(args, environment, folder, files):
    signal.alarm(TIMEOUT)  # ends the process
    for number, file in enumerate([os.devnull, *files]):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    option, what, *arguments = args
    sys.argv = [option, *arguments]
    if option == '-c':
        exec(what, dict(__name__='__main__'))
    else:
        runpy.run_module(what, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
    sys.path[0] = ''  # as for -c and -m: the tests are no modules of the children
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    gc.freeze()  # else every child would copy most of the memory as it collects garbage
    request = _serve()
    if request is not None:
        _run(**request)
