"""Where pretrained=True finds its weights: store and authors' file, with every fault that a download can have."""

import errno
import http.client
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import servers
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from synth import expected, reference_state, relative_error, synth_input

import timm_smpconv
from timm_smpconv import WeightsError, download, fetch, store
from timm_smpconv._text import without_password
from timm_smpconv.convert import convert
from timm_smpconv.fetch import locate
from timm_smpconv.predict import check_inputs, load_model
from timm_smpconv.weights import WEIGHTS, Weights, bundled_path, fixed_input

MODEL, NAME = 'smpconv_seq_speech', 'smpconv_seq_speech.sc'


@pytest.fixture(scope='module')
def authors_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('authors') / 'SMPConv.pth'
    torch.save(dict(model=reference_state(MODEL), optimizer={}, lr_scheduler={}, epoch=1), path)
    return path


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A store of its own, a Hub without the repository, and no proxies."""
    monkeypatch.setenv('TIMM_SMPCONV_CACHE', str(tmp_path / 'store'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    for key in ('no_proxy', 'NO_PROXY'):
        monkeypatch.setenv(key, '127.0.0.1')

    def nothing(*args):
        raise fetch._Unavailable('no such repository.')

    monkeypatch.setattr(fetch, '_from_hub', nothing)
    monkeypatch.setattr(download, '_PAUSE', 0.01)
    weights = WEIGHTS[NAME]  # in this test it has none of its own
    monkeypatch.setitem(WEIGHTS, NAME, Weights(weights.trained_on, 0.0, authors_file='1abc'))
    return tmp_path / 'store'


@pytest.fixture
def drive(own, authors_file, monkeypatch):
    with servers.serve(servers.Drive(authors_file.read_bytes())) as server:
        monkeypatch.setenv('TIMM_SMPCONV_DRIVE_URL', server.url)
        yield server


def create():
    return timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=None)).eval()


def check_logits(model):
    with torch.inference_mode():
        assert relative_error(model(synth_input(MODEL)), torch.from_numpy(expected(MODEL)['logits'])) < 1e-4


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


@pytest.mark.parametrize('mode', ['ok', 'redirect', 'warning', 'broken'])
def test_authors_file(mode, drive, own):
    """Fetched through redirects, a page that warns, and broken connections; converted; kept; not fetched again."""
    drive.mode = mode
    check_logits(create())
    count = len(drive.requests)
    if mode == 'broken':
        assert count > 2 and drive.requests[1] == f'bytes={drive.part}-'
    check_logits(create())
    assert len(drive.requests) == count
    entry = json.loads((own / NAME / 'weights.json').read_text())
    assert entry['source'].endswith('1abc/view') and len(entry['source_sha256']) == 64
    assert [f for f in files(own) if not f.startswith(('.locks', NAME))] == []


def test_inputs_of_a_file_that_is_fetched_now(own, monkeypatch, caplog, tmp_path):
    """The first measurement tells already that nobody knows how the authors' inputs were normalised."""
    name = 'smpconv_seq_chartraj'
    torch.save(dict(model=reference_state(name)), tmp_path / 'authors.pth')
    with servers.serve(servers.Drive((tmp_path / 'authors.pth').read_bytes())) as server:
        monkeypatch.setenv('TIMM_SMPCONV_DRIVE_URL', server.url)
        check_inputs(name)
        assert 'does not say how its inputs were normalised' in caplog.text and len(server.requests) == 1
        load_model(name)
        assert len(server.requests) == 1


def test_server_without_ranges(drive):
    """Connections that break where the server cannot go on: it starts again, and gives up in the end."""
    drive.mode, drive.ranges, drive.part = 'broken', False, len(drive.data) // 3
    with pytest.raises(WeightsError, match='connection ended after'):
        create()
    drive.mode = 'ok'
    check_logits(create())


@pytest.mark.parametrize('version,kept', [('"v1"', True), ('"v1"\r\nHost: elsewhere', False), ('', False)])
def test_other_process_goes_on(version, kept, drive, own):
    """What had arrived before a download was killed is not fetched again, unless what was noted of it is damaged."""
    part = own / 'downloads' / f'{WEIGHTS[NAME].authors_file}.part'
    part.parent.mkdir(parents=True)
    part.write_bytes(drive.data[: 1 << 19])
    part.with_name(part.name + '.version').write_text(version)
    check_logits(create())
    assert drive.requests[0] == (f'bytes={1 << 19}-' if kept else None)


@pytest.mark.parametrize('mode', ['quota', 'refused', 'dead'])
def test_authors_file_cannot_be_had(mode, drive, own):
    drive.mode = mode
    start = time.monotonic()
    with pytest.raises(WeightsError) as e:
        create()
    assert time.monotonic() - start < 20
    message = str(e.value)
    words = {'quota': 'Quota exceeded', 'refused': 'status 403', 'dead': 'connection ended after 0'}[mode]
    assert words in message and NAME in message and 'timm-smpconv convert FILE --model' in message
    assert not (own / NAME).exists()


@pytest.mark.parametrize('wrong', ['garbage', 'truncated', 'other', 'code'])
def test_wrong_file(wrong, drive, own, tmp_path):
    """A wrong file is fetched a second time, set aside, and reported; then the right one is taken."""
    right = drive.data
    if wrong == 'garbage':
        drive.data = os.urandom(10_000)
    elif wrong == 'truncated':
        drive.data = right[: len(right) // 2]
    elif wrong == 'other':
        torch.save(dict(model=reference_state('smpconv_seq_cifar')), tmp_path / 'other.pth')
        drive.data = (tmp_path / 'other.pth').read_bytes()
    else:
        torch.save(dict(model=reference_state(MODEL), hook=os.getcwd), tmp_path / 'code.pth')
        drive.data = (tmp_path / 'code.pth').read_bytes()
    with pytest.raises(WeightsError, match='downloaded twice') as e:
        create()
    assert 'set aside' in str(e.value) and len(drive.requests) == 2
    assert not (own / NAME).exists()
    drive.data = right
    check_logits(create())


def test_damaged_store(drive, own):
    """Files of the store that are changed, cut or gone are set aside and fetched again."""
    check_logits(create())
    (path,) = (own / NAME).glob('*.safetensors')
    data = path.read_bytes()
    flipped = bytearray(data)
    servers.flip(flipped)
    for damage in (bytes(flipped), data[:100], b''):
        path.write_bytes(damage)
        assert store.find(NAME) is None and path.with_name(path.name + '.corrupt').read_bytes() == damage
        check_logits(create())
    entry = own / NAME / 'weights.json'
    good = entry.read_text()
    for text in (
        '',
        '{',
        '[]',
        '{"file": "x"}',
        good.replace(path.name, '../../etc/passwd'),
        good.replace('"size": ', '"size": 1'),
    ):
        entry.write_text(text)
        assert store.find(NAME) is None
        check_logits(create())
    path.unlink()
    check_logits(create())


def test_store_that_cannot_be_written(drive, own, monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TIMM_SMPCONV_CACHE', str(tmp_path / 'file'))
    with pytest.raises(WeightsError, match='set TIMM_SMPCONV_CACHE'):
        create()


def _create_in_process(queue):
    try:
        torch.set_num_threads(1)
        queue.put(sum(p.double().sum().item() for p in create().parameters()))
    except Exception as e:
        queue.put(repr(e))


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='this system has no fork')
def test_two_processes(drive):
    """Two processes that ask at once get the same weights, by one download."""
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    processes = [context.Process(target=_create_in_process, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert results[0] == results[1] and isinstance(results[0], float), results
    assert len(drive.requests) == 1


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='this system has no kill -9')
@pytest.mark.parametrize('moment', ['weights.json', '.safetensors'])
@pytest.mark.parametrize('before', [False, True])
def test_killed(moment, before, drive, own, authors_file):
    """kill -9 right before a file of the store appears: what was there before is used, else the next source."""
    if before:
        convert(authors_file, MODEL, install=True)
    code = (
        'import os, signal\n'
        'import timm_smpconv\n'
        'from timm_smpconv.convert import convert\n'
        'replace = os.replace\n'
        'def last(old, new):\n'
        f'    if str(new).startswith({str(own)!r}) and str(new).endswith({moment!r}):\n'
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
        '    replace(old, new)\n'
        'os.replace = last\n'
        f'convert({str(authors_file)!r}, {MODEL!r}, install=True)\n'
    )
    environment = dict(os.environ, TIMM_SMPCONV_CACHE=str(own))
    assert subprocess.run([sys.executable, '-c', code], env=environment).returncode == -signal.SIGKILL
    assert list((own / NAME).glob('.*.part'))
    assert (store.find(NAME) is not None) == before
    check_logits(create())
    assert len(drive.requests) == (0 if before else 1)


def test_sources_of_the_caller_come_before_the_bundled_weights(own, monkeypatch):
    """An address or a repository that is asked for is asked, though the package has weights of that name."""
    asked = []
    monkeypatch.setattr(fetch, 'from_hub', lambda hub_id, *args, **kwargs: asked.append(hub_id) or bundled)
    monkeypatch.setattr(
        'timm.models._builder.load_state_dict_from_url', lambda url, **kwargs: asked.append(url) or load_file(bundled)
    )
    bundled = bundled_path('smpconv_seq_mnist.smnist')
    url = 'https://nowhere.invalid/model.pth'
    timm.create_model('smpconv_seq_mnist', pretrained=True, pretrained_cfg_overlay=dict(url=url))
    assert asked == [url]
    cfg = timm.get_pretrained_cfg('smpconv_seq_mnist').to_dict()
    assert locate('smpconv_seq_mnist.smnist', dict(cfg, file=str(bundled))) == bundled
    timm.create_model('smpconv_seq_mnist', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='me/mine'))
    assert asked == [url, 'me/mine']


@pytest.mark.parametrize(
    'name',
    [
        '../../settings.json',
        '/etc/settings.json',
        'a/../../b.bin',
        'c:\\settings.json',
        '..\\x',
        '\\x\\y',
        '\\\\server\\x',
    ],
)
def test_files_outside_the_repository(name, monkeypatch):
    """What a config.json of somebody else may name is neither read nor renamed."""
    monkeypatch.setattr(fetch, 'try_to_load_from_cache', lambda *args, **kwargs: pytest.fail('it was looked for'))
    with pytest.raises(WeightsError, match='is no file of a repository'):
        fetch.from_hub('evil/x', name)


def test_installed_by_hand(own, authors_file):
    convert(authors_file, MODEL, install=True)
    model = create()
    check_logits(model)
    assert not model.pretrained_cfg['file'] and not model.pretrained_cfg['source']
    features = timm.create_model(MODEL, pretrained=True, features_only=True, pretrained_cfg_overlay=dict(file=None))
    assert features(synth_input(MODEL))
    fewer = timm.create_model(MODEL, pretrained=True, num_classes=3, pretrained_cfg_overlay=dict(file=None))
    assert fewer.num_classes == 3


def test_offline_asks_nobody(drive, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match='offline'):
        create()
    assert not drive.requests


def test_explicit_sources_keep_their_meaning(drive, own, authors_file, tmp_path):
    """A file or a state dict of the caller is taken, not what the table says."""
    model = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(authors_file)))
    check_logits(model.eval())
    other = timm.create_model(MODEL).state_dict()
    model = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(state_dict=other, file=None))
    assert torch.equal(model.head.fc.weight, other['head.fc.weight'])
    torch.save(other, tmp_path / 'a.pth')
    model = timm.create_model(MODEL, checkpoint_path=str(tmp_path / 'a.pth'))
    assert torch.equal(model.head.fc.weight, other['head.fc.weight'])
    assert not drive.requests and not own.exists()


@pytest.mark.parametrize('key', [key for key, weights in WEIGHTS.items() if weights.bundled])
def test_bundled(key):
    """The table tells the truth about the files of the package."""
    weights, path = WEIGHTS[key], bundled_path(key)
    assert path.stat().st_size == weights.size and store.file_sha256(path) == weights.sha256
    model = timm.create_model(key, pretrained=True).eval()
    assert model.pretrained_cfg['file'] == str(path)
    with torch.inference_mode():
        logits = model(fixed_input(model.pretrained_cfg['input_size']))[0]
    torch.testing.assert_close(logits, torch.tensor(weights.logits), rtol=1e-3, atol=2e-3)


def test_lost_weights_of_the_user(own, tmp_path):
    """Those that were installed by hand are not replaced by others unnoticed."""
    key = 'smpconv_seq_mnist.smnist'
    torch.save(timm.create_model('smpconv_seq_mnist').state_dict(), tmp_path / 'a.pth')
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b'x')):
        path = convert(tmp_path / 'a.pth', key, install=True).installed
        damage(path)
        for _ in range(2):
            with pytest.raises(WeightsError, match='installed by hand.* Install them again .*smpconv_seq_mnist --inst'):
                timm.create_model(key, pretrained=True)
    shutil.rmtree(own / key)
    assert timm.create_model(key, pretrained=True)


def test_files_of_a_name_do_not_pile_up(own, tmp_path):
    """The last one is kept, and the one before, which somebody may be reading."""
    paths = []
    for _ in range(4):
        torch.save(timm.create_model(MODEL).state_dict(), tmp_path / 'a.pth')
        paths.append(convert(tmp_path / 'a.pth', MODEL, install=True).installed)
    assert sorted((own / NAME).glob('*.safetensors')) == sorted(paths[-2:]) and store.find(NAME) == paths[-1]


def test_store_that_vanishes(own, tmp_path, monkeypatch):
    torch.save(timm.create_model(MODEL).state_dict(), tmp_path / 'a.pth')
    convert(tmp_path / 'a.pth', MODEL, install=True)
    monkeypatch.setattr(store, 'file_sha256', lambda path: shutil.rmtree(own / NAME) or open(path))
    with pytest.raises(WeightsError, match='is gone'):
        store.find(NAME)
    assert store.find(NAME) is None


def test_incomplete_sources(own):
    for source, missing in (('hf-hub', 'hf_hub_id'), ('local-dir', 'file')):
        overlay = dict(source=source, file=None, hf_hub_id=None)
        with pytest.raises(WeightsError, match=f"source='{source}', and no {missing}"):
            timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    'error', [OSError(errno.EHOSTUNREACH, 'No route to host'), ssl.SSLError(1, 'bad record mac')], ids=['route', 'ssl']
)
def test_connection_lost_in_the_middle(error, drive, monkeypatch):
    """Whatever the network fails with, it is taken up again where it stopped."""
    read, calls = http.client.HTTPResponse.read, []

    def fail(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return read(self, *args)

    monkeypatch.setattr(http.client.HTTPResponse, 'read', fail)
    check_logits(create())
    assert drive.requests == [None, f'bytes={2 * download._BLOCK}-']


def test_another_part_than_asked_for(drive):
    """Nothing is put together of what does not belong together."""
    drive.mode, drive.shift = 'broken', 10
    with pytest.raises(WeightsError, match='another part of the file'):
        create()
    drive.mode, drive.shift = 'ok', 0
    check_logits(create())


def test_bundled_and_store(own, tmp_path):
    """The package comes before the store, unless the user has installed other weights by hand."""
    key = 'smpconv_seq_mnist.smnist'
    other = timm.create_model('smpconv_seq_mnist')
    torch.save(other.state_dict(), tmp_path / 'a.pth')
    path = convert(tmp_path / 'a.pth', key, install=True).installed
    assert torch.equal(timm.create_model(key, pretrained=True).head.fc.weight, other.head.fc.weight)
    store.install(key, path, 'fetched', '')
    assert not torch.equal(timm.create_model(key, pretrained=True).head.fc.weight, other.head.fc.weight)
    (own / key / 'weights.json').write_text('{')
    assert not torch.equal(timm.create_model(key, pretrained=True).head.fc.weight, other.head.fc.weight)


def test_changed_bundled_file(own, tmp_path, monkeypatch):
    """A file of the package that was changed is not used."""
    key = 'smpconv_seq_mnist.smnist'
    monkeypatch.setitem(WEIGHTS, key, Weights('MNIST', 0.0, bundled=WEIGHTS[key].bundled, sha256='0' * 64))
    with pytest.raises(WeightsError, match='has been changed'):
        timm.create_model('smpconv_seq_mnist', pretrained=True)


def test_names(own):
    with pytest.raises(ValueError, match='model.tag'):
        store.find('../etc')
    with pytest.raises(WeightsError, match='None were ever published'):
        timm.create_model('smpconv_mobile51', pretrained=True)


def test_dates_in_place_of_etags(drive):
    """A server without ETags, whose connections break: the date of the last change tells that the file is the same."""
    drive.mode, drive.part, drive.version = 'broken', len(drive.data) // 3, 'date'
    check_logits(create())
    assert drive.requests[1] == f'bytes={drive.part}-'


def test_no_home(monkeypatch):
    """Bundled weights need no store; others say what is missing."""

    def nowhere():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.delenv('TIMM_SMPCONV_CACHE')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr(Path, 'home', nowhere)
    timm.create_model('smpconv_cifar', pretrained=True)
    with pytest.raises(WeightsError, match='TIMM_SMPCONV_CACHE'):
        timm.create_model('smpconv_tiny', pretrained=True)
    with pytest.raises(WeightsError, match='TIMM_SMPCONV_CACHE'):
        store.store_dir()
    monkeypatch.setenv('TIMM_SMPCONV_CACHE', '~nobody-of-this-name/weights')
    timm.create_model('smpconv_cifar', pretrained=True)
    with pytest.raises(WeightsError, match='TIMM_SMPCONV_CACHE'):
        store.store_dir()


def test_a_store_that_cannot_be_read_is_left(drive, own, monkeypatch, caplog):
    create()

    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    before = files(own)
    monkeypatch.setattr(store, 'file_sha256', refuse)
    assert store.find(NAME) is None and 'not used' in caplog.text
    assert files(own) == before


@pytest.mark.parametrize('url', ['example.org/x', 'http://a..b/'])
def test_addresses_that_are_none(url, own, tmp_path, monkeypatch):
    """A download from one fails as any other does, and so do the weights that would come from there."""
    monkeypatch.setenv('no_proxy', '*')  # else a proxy would be asked what it makes of it
    with pytest.raises(download.DownloadError, match='is no address'):
        download.download(url, tmp_path / 'file', 'a file')
    monkeypatch.setenv('TIMM_SMPCONV_DRIVE_URL', url)
    with pytest.raises(WeightsError, match=f"authors' file .*{re.escape(url)}.* is no address"):
        create()


@pytest.mark.parametrize(
    'environment, expected',
    [
        ({'TIMM_SMPCONV_CACHE': '~/weights', 'XDG_CACHE_HOME': '/elsewhere'}, 'weights'),
        ({'XDG_CACHE_HOME': '{home}/cache'}, 'cache/timm_smpconv'),
        ({}, '.cache/timm_smpconv'),
    ],
)
def test_places_of_the_store(environment, expected, tmp_path, monkeypatch):
    for key in ('TIMM_SMPCONV_CACHE', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(key, raising=False)
    for key in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(key, str(tmp_path))
    for key, value in environment.items():
        monkeypatch.setenv(key, value.format(home=tmp_path))
    assert store.store_dir() == tmp_path / expected


def test_explicit_sources_that_are_none(own, tmp_path):
    """Nothing else is taken in their place."""
    path = tmp_path / 'nowhere' / 'x.pth'
    for overlay, words in ((dict(file=str(path)), re.escape(str(path))), (dict(state_dict={}), 'empty')):
        with pytest.raises(WeightsError, match=words):
            timm.create_model('smpconv_seq_mnist', pretrained=True, pretrained_cfg_overlay=overlay)


def test_folder_with_pickled_weights(tmp_path):
    """As timm writes it on request, and older versions did anyway."""
    model = timm.create_model(MODEL, num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=False)
    assert files(tmp_path) == ['config.json', 'pytorch_model.bin']
    for create_model in (timm.create_model, timm_smpconv.create_model):
        loaded = create_model(f'local-dir:{tmp_path}', pretrained=True)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    'text',
    [
        'http://me:secret@host:9/x',
        'cannot reach https://hf_token@host',
        'http://host/a@b and //u:p@h/',
        'https://me:p@secret@host/x',
    ],
)
def test_passwords_are_not_shown(text):
    shown = without_password(text)
    assert 'secret' not in shown and 'hf_token' not in shown and 'u:p' not in shown and 'host' in shown


@pytest.mark.parametrize('address', ['http://me:secret@localhost:{}/x', 'http://me:secret@localhost/x'])
def test_passwords_of_addresses_are_not_shown(address, own, monkeypatch):
    with socket.create_server(('localhost', 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv('TIMM_SMPCONV_DRIVE_URL', address.format(port))  # where nobody listens
    with pytest.raises(WeightsError) as e:
        timm.create_model('smpconv_tiny', pretrained=True)
    assert 'secret' not in str(e.value) and 'localhost' in str(e.value)


@pytest.mark.parametrize(
    'error, words',
    [
        (PermissionError(13, 'Permission denied', '/cache/blobs/ab12.incomplete'), ['Permission denied', 'ab12']),
        (PermissionError(13, 'Permission denied', '/home/connector/hf'), ['Permission denied', '/home/connector']),
        (OSError(28, 'No space left on device', '/mnt/timeout/x'), ['No space left']),
        (ConnectionRefusedError(111, 'Connection refused'), ['no connection']),
        (TimeoutError('timed out'), ['no answer']),
    ],
)
def test_causes(error, words):
    """Are told by what an error is, not by words in the name of a file."""
    text = fetch.hub_cause(error, 'me/x')
    assert all(word in text for word in words), text


def test_endpoint_that_is_no_address():
    code = "import timm_smpconv; timm_smpconv.create_model('hf-hub:me/x', pretrained=True)"
    environment = {**os.environ, 'HF_ENDPOINT': 'nonsense', 'HF_HUB_OFFLINE': '0'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert 'check HF_ENDPOINT' in done.stderr.splitlines()[-1]
