"""What a user meets when weights do not arrive: each failure in a new process with an empty cache, with its time.

    python tests/failures.py     # prints the table of docs/weights.md

The rows are those that are tested in test_hub.py.
"""

import contextlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple

import servers
import timm
import torch
from forks import run_python
from minihub import Entry

import timm_smpconv  # noqa: F401  (registers the models)
from timm_smpconv.convert import convert

NAME, MODEL = 'smpconv_seq_chartraj.ct', 'smpconv_seq_chartraj'

_CLIENT = """
import json, sys, time
import timm, timm_smpconv
name, how = sys.argv[1:]
create = timm_smpconv.create_model if how == 'timm_smpconv' else timm.create_model
start = time.monotonic()
try:
    model = create(name, pretrained=True)
    result = dict(ok=True, sum=sum(p.double().sum().item() for p in model.parameters()))
except Exception as e:
    result = dict(ok=False, type=type(e).__name__, ours=isinstance(e, timm_smpconv.WeightsError), message=str(e))
print(json.dumps(dict(result, seconds=time.monotonic() - start)))
"""


@dataclass(frozen=True)
class Row:
    """One failure.

    Attributes:
        situation: For the documentation.
        fault: Fault of the server.
        change: Changes the published files before.
        environment: Of the client.
        cached: What to do to the file in a warm cache, before the call.
        expected: Words of the message.
        name: What is created; the default goes through all sources, `hf-hub:` through the Hub alone.
        how: 'timm', or 'timm_smpconv' for its create_model.
        succeeds: The failure is overcome without the user noticing it.
        refused: No server at all.
    """

    situation: str
    expected: Tuple[str, ...]
    fault: Optional[Callable] = None
    change: Optional[Callable] = None
    environment: Tuple[Tuple[str, str], ...] = ()
    cached: Optional[Callable] = None
    name: str = MODEL
    how: str = 'timm'
    succeeds: bool = False
    refused: bool = False


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without(filename: str) -> Callable:
    def change(hub):
        repo = hub.repos[f'me/{NAME}']
        for commit in repo['commits'].values():
            commit['tree'].pop(filename, None)

    return change


def _replaced(filename: str, data: bytes) -> Callable:
    def change(hub):
        repo = hub.repos[f'me/{NAME}']
        repo['commits'][repo['refs']['main']]['tree'][filename] = Entry(data, lfs=False)

    return change


_HUB = f'hf-hub:me/{NAME}'
ROWS: Dict[str, Row] = {
    'no_network': Row('no network, cold cache', ('no connection',), refused=True),
    'no_network_hub_name': Row(
        '... `hf-hub:` name, `timm_smpconv.create_model`',
        ('no connection',),
        refused=True,
        name=_HUB,
        how='timm_smpconv',
    ),
    'offline': Row('`HF_HUB_OFFLINE=1`, cold cache', ('offline',), environment=(('HF_HUB_OFFLINE', '1'),)),
    'not_found': Row(
        'repository missing or private (404)', ('no such repository', 'log in'), servers.status(404, 'RepoNotFound')
    ),
    'unauthorized': Row('not logged in (401)', ('no such repository', 'log in'), servers.status(401)),
    'server_error': Row('server error (500)', ('status 500',), servers.status(500)),
    'weights_error': Row('server error (500) on the weights alone', ('status 500',), servers.weights_status(500)),
    'no_weights': Row(
        'weights missing in the repository', ('no model.safetensors',), change=_without('model.safetensors'), name=_HUB
    ),
    'truncated': Row('shorter file than announced', ('download',), servers.half(0)),
    'garbage': Row('right size, garbage bytes', ('sha256', 'Downloaded twice'), servers.changed(servers.garbage)),
    'flipped': Row(
        'one flipped byte in the tensor data', ('sha256', 'Downloaded twice'), servers.changed(servers.flip)
    ),
    'cache_truncated': Row('truncated file in the cache, server well', (), cached=_halve, succeeds=True),
    'cache_truncated_offline': Row(
        'truncated file in the cache, offline',
        ('damaged', 'offline'),
        cached=_halve,
        environment=(('HF_HUB_OFFLINE', '1'),),
    ),
    'slow': Row('server that does not answer', ('no answer within 5 s',), servers.slow(20)),
    'stalled': Row('server that stops in the middle of the weights', ('no byte for 15 s',), servers.half(60)),
    'config_truncated': Row(
        'config.json truncated, `timm_smpconv.create_model`',
        ('config.json', 'JSON'),
        change=_replaced('config.json', b'{"architecture": "smp'),
        name=_HUB,
        how='timm_smpconv',
    ),
    'unknown_architecture': Row(
        'unregistered architecture, `timm_smpconv.create_model`',
        ("unknown architecture 'convnext_of_somebody'",),
        change=_replaced('config.json', b'{"architecture": "convnext_of_somebody", "pretrained_cfg": {}}'),
        name=_HUB,
        how='timm_smpconv',
    ),
}


def make_folder(folder: Path) -> Path:
    """A Hub-ready folder of the model that the failures are tried with."""
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL).state_dict(), folder / 'checkpoint.pth')
    return convert(folder / 'checkpoint.pth', MODEL, folder / NAME).folder


def publish(hub, folder: Path) -> None:
    """Puts a folder on a local Hub, without a client."""
    repo = f'me/{NAME}'
    hub.create(repo)
    commit = hub.repos[repo]['commits'][hub.repos[repo]['refs']['main']]
    for path in folder.rglob('*'):
        if path.is_file():
            entry = Entry(path.read_bytes(), lfs=path.suffix == '.safetensors')
            commit['tree'][str(path.relative_to(folder))] = entry
            hub.store[entry.sha256] = entry.data


def run_client(environment, name=MODEL, how='timm'):
    done = run_python(environment, '-c', _CLIENT, name, how)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def cached_weights(home: Path) -> Path:
    (path,) = home.glob('hub/models--*/snapshots/*/model.safetensors')
    return path.resolve()


def run_row(row: Row, folder: Path, home: Path):
    """Runs one failure; returns what the client says."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(servers.hub_server())
        publish(server.hub, folder)
        url = 'http://127.0.0.1:9' if row.refused else server.url
        environment = servers.hub_environment(url, home, **dict(row.environment))
        if row.cached:
            assert run_client(servers.hub_environment(url, home), _HUB)['ok']
            row.cached(cached_weights(home))
        if row.change:
            row.change(server.hub)
        if row.fault:
            server.hub.faults.append(row.fault)
        return run_client(environment, row.name, row.how)


def _shown(result, home: Path) -> str:
    """A message for the table: of a search through all sources, what it says of the Hub."""
    if result['ok']:
        return 'the model: the file is fetched again'
    lines = result['message'].splitlines()
    text = next((line for line in lines if line.strip().startswith('Hugging Face Hub')), result['message'])
    text = re.sub(r'http://127\.0\.0\.1:\d+', 'https://huggingface.co', text.replace(str(home), '~'))
    return ' '.join(text.split()).replace('|', '/')


def main() -> None:
    temporary = Path(tempfile.mkdtemp())
    try:
        folder = make_folder(temporary)
        print('| situation | time | what the user sees |\n|---|---|---|')
        for key, row in ROWS.items():
            home = temporary / key
            home.mkdir()
            result = run_row(row, folder, home)
            print(f'| {row.situation} | {result["seconds"]:.1f} s | {_shown(result, home)} |', flush=True)
    finally:
        shutil.rmtree(temporary)


if __name__ == '__main__':
    main()
