"""The Hugging Face Hub, as new processes with empty caches meet it: publishing, loading, and every failure."""

import json
import shutil

import pytest
import servers
import timm
import torch
from datasets import write_trajectories
from failures import _HUB, MODEL, NAME, ROWS, cached_weights, make_folder, publish, run_client, run_row
from forks import run_python
from minihub import Entry
from safetensors.torch import load_file, save, save_file

from timm_smpconv._files import save_tensors
from timm_smpconv.convert import convert


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('hub'))


@pytest.fixture(scope='session')
def weights_sum(folder):
    return _sum(folder)


def _sum(folder):
    state = load_file(folder / 'model.safetensors')
    statistics = ('running_mean', 'running_var', 'num_batches_tracked', 'base_radius')  # no parameters
    return sum(value.double().sum().item() for key, value in state.items() if not key.endswith(statistics))


def command(environment, *args, expected=0):
    done = run_python(environment, '-m', 'timm_smpconv', *map(str, args))
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


_ASK = """
import json, sys
import timm, timm_smpconv
from timm_smpconv.publish import push, verify

def total(model):
    return sum(p.double().sum().item() for p in model.parameters())

def wrong(repo):
    return [check.name for check in verify(repo) if not check.ok]

for expression in sys.argv[1:]:
    try:
        result = eval(expression)
    except Exception as e:
        result = f'{type(e).__name__}: {e}'
    print(json.dumps(result, default=repr))
"""


def ask(environment, *expressions):
    """Values of expressions, or what they raise, in one new process."""
    done = run_python(environment, '-c', _ASK, *expressions)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(expressions) :]]


def other_weights(hub, folder):
    """Weights with another classifier, as a file of a local Hub."""
    state = load_file(folder / 'model.safetensors')
    state['head.fc.weight'] *= 2
    entry = Entry(save(state), lfs=True)
    hub.store[entry.sha256] = entry.data
    return entry


@pytest.mark.parametrize('key', ROWS)
def test_failure(key, folder, tmp_path):
    """One kind of exception, which says what is wrong, within seconds; what was damaged is not kept for use."""
    row = ROWS[key]
    result = run_row(row, folder, tmp_path)
    if row.succeeds:
        assert result['ok'], result
        return
    assert not result['ok'] and result['ours'] and result['type'] == 'WeightsError', result
    message = result['message']
    if 'Hugging Face Hub' in message:  # the other sources have causes of their own
        message = message.partition('Hugging Face Hub')[2].partition("authors' file")[0]
    assert NAME in result['message'] and not [w for w in row.expected if w not in message], result['message']
    assert 'pretrained=False' in result['message'] or row.how == 'timm_smpconv', result['message']
    assert result['seconds'] < 25, result


@pytest.mark.parametrize('fault', ['truncated', 'garbage', 'flipped'])
def test_recovery(fault, folder, tmp_path, weights_sum):
    """A damaged download does not stay: in the same cache, the next call succeeds once the server has recovered."""
    with servers.hub_server() as server:
        publish(server.hub, folder)
        environment = servers.hub_environment(server, tmp_path)
        server.hub.faults.append(ROWS[fault].fault)
        first = run_client(environment, _HUB)
        assert not first['ok'] and first['ours'], first
        server.hub.faults.clear()
        second = run_client(environment, _HUB)
        assert second['ok'] and second['sum'] == pytest.approx(weights_sum, rel=1e-9)
        # a byte of the cached file flips: found by its hash, fetched again
        path = cached_weights(tmp_path)
        data = bytearray(path.read_bytes())
        servers.flip(data)
        path.write_bytes(data)
        third = run_client(environment, _HUB)
        assert third['ok'] and third['sum'] == pytest.approx(weights_sum, rel=1e-9)
        assert list(path.parent.glob('*.corrupt'))


def test_inputs_do_not_depend_on_the_cache(tmp_path):
    """The weights say how inputs were normalised: a config.json is there only if somebody has asked for it."""
    saved = dict(mean=[0.1, 0.2, 0.3], std=[2.0] * 3)
    save_tensors(tmp_path / 'a.safetensors', timm.create_model(MODEL).state_dict(), saved)
    folder = convert(tmp_path / 'a.safetensors', MODEL, tmp_path / 'out').folder
    with servers.hub_server() as server:
        publish(server.hub, folder)
        plain = f"timm.create_model('{MODEL}', pretrained=True"
        named = f"timm.create_model('hf-hub:me/{NAME}', pretrained=True"
        other = f"{plain}, pretrained_cfg_overlay=dict(hf_hub_id='me/{NAME}')"
        means = [f"{call}).pretrained_cfg['mean']" for call in (plain, other, named, plain, other)]
        assert ask(servers.hub_environment(server, tmp_path / 'home'), *means) == [saved['mean']] * 5


def test_private_means_private(folder, tmp_path):
    with servers.hub_server() as server:
        environment = servers.hub_environment(server, tmp_path)
        server.hub.create('me/public')
        before = dict(server.hub.repos['me/public']['refs'])
        message = command(environment, 'push', folder, '--repo', 'me/public', '--private', expected=2)
        assert 'me/public exists and is public' in message
        assert server.hub.repos['me/public']['refs'] == before and not server.hub.repos['me/public']['private']
        assert 'me/public/commit/' in command(environment, 'push', folder, '--repo', 'me/public')


def test_push_load_verify(folder, tmp_path, weights_sum):
    """Push, then load by all names in new processes, without the server too; verify finds nothing, then a change."""
    repo = f'me/{NAME}'
    with servers.hub_server() as server:
        environment = servers.hub_environment(server, tmp_path / 'one')
        assert f'{repo}/commit/' in command(environment, 'push', folder, '--repo', repo, '--private')
        assert server.hub.repos[repo]['private']
        published = server.hub.repos[repo]['commits'][server.hub.repos[repo]['refs']['main']]['tree']
        assert set(published) == {'config.json', 'model.safetensors', 'README.md', 'test/rand_tensors.safetensors'}

        environment = servers.hub_environment(server, tmp_path / 'two')
        for name in (_HUB, NAME, NAME.partition('.')[0]):
            result = run_client(environment, name)
            assert result['ok'] and result['sum'] == pytest.approx(weights_sum, rel=1e-9), (name, result)
        assert run_client(environment, _HUB, 'timm_smpconv')['sum'] == pytest.approx(weights_sum, rel=1e-9)
        offline = dict(environment, HF_HUB_OFFLINE='1')
        assert run_client(offline, _HUB)['sum'] == pytest.approx(weights_sum, rel=1e-9)
        assert run_client(offline, NAME)['sum'] == pytest.approx(weights_sum, rel=1e-9)

        checks = json.loads(command(environment, 'verify', repo, '--json'))
        assert {check['name'] for check in checks} == {
            'hash of model.safetensors', 'hash of test/rand_tensors.safetensors', 'files', 'config', 'card', 'logits',
        }  # fmt: skip
        assert all(check['ok'] for check in checks)

        server.hub.faults.append(servers.changed(servers.flip))
        assert 'FAILED  hash of model.safetensors' in command(environment, 'verify', repo, expected=1)
        server.hub.faults.clear()
        assert 'no such repository' in command(environment, 'verify', 'me/nothing', expected=2)


def test_push_refuses(folder, tmp_path):
    """An incomplete or wrong folder is not uploaded; neither is anything without the right to."""
    import shutil

    from timm_smpconv.publish import push

    for name in ('model.safetensors', 'config.json', 'README.md', 'test/rand_tensors.safetensors'):
        broken = tmp_path / name.replace('/', '_')
        shutil.copytree(folder, broken)
        data = (broken / name).read_bytes()
        (broken / name).unlink()
        with pytest.raises(ValueError, match=f'missing: {name}'):
            push(broken, f'me/{NAME}')
        (broken / name).write_bytes(data[: len(data) // 3].replace(b'license', b'lic'))
        with pytest.raises(ValueError, match='cannot be published'):
            push(broken, f'me/{NAME}')
    with servers.hub_server() as server:
        environment = servers.hub_environment(server, tmp_path, HF_TOKEN='hf_wrong')
        text = command(environment, 'push', folder, '--repo', f'me/{NAME}', expected=2)
        assert 'log in' in text and not server.hub.repos


@pytest.mark.parametrize('fault', ['server_error', 'flipped'])
def test_next_source_follows(fault, folder, tmp_path):
    """What the Hub cannot give comes from the authors' file."""
    from synth import reference_state

    path = tmp_path / 'authors.pth'
    torch.save(dict(model=reference_state('smpconv_seq_chartraj')), path)
    with servers.hub_server() as server, servers.serve(servers.Drive(path.read_bytes())) as drive:
        publish(server.hub, folder)
        server.hub.faults.append(ROWS[fault].fault)
        environment = servers.hub_environment(server, tmp_path / 'home', TIMM_SMPCONV_DRIVE_URL=drive.url)
        result = run_client(environment)
        assert result['ok'] and result['seconds'] < 15
        # from then on it is in the store, and nobody is asked
        count = len(drive.requests)
        assert run_client(dict(environment, HF_HUB_OFFLINE='1'))['sum'] == result['sum']
        assert len(drive.requests) == count


def test_push_of_other_weights(folder, tmp_path):
    """Deployed weights of earlier weights do not stay beside new ones; the card names the repository."""
    repo = 'me/elsewhere'
    with_deployed = tmp_path / 'with'
    convert(folder / 'model.safetensors', NAME, with_deployed, deployed=True)
    with servers.hub_server() as server:
        environment = servers.hub_environment(server, tmp_path / 'home')

        def published():
            r = server.hub.repos[repo]
            return r['commits'][r['refs']['main']]['tree']

        command(environment, 'push', with_deployed, '--repo', repo)
        assert 'deployed.safetensors' in published()
        assert 'logits, deployed' in command(environment, 'verify', repo)
        data = write_trajectories(tmp_path / 'data')
        assert f'hf-hub:{repo}: ' in command(environment, 'validate', '--model', f'hf-hub:{repo}', '--data', data)
        command(environment, 'push', folder, '--repo', repo)
        assert 'deployed.safetensors' not in published()
        card = published()['README.md'].data.decode()
        assert f"'hf-hub:{repo}'" in card and 'ORG/NAME' not in card
    (with_deployed / 'deployed.safetensors').write_bytes(b'garbage' * 100)
    assert 'logits, deployed' in command(environment, 'push', with_deployed, '--repo', repo, expected=2)


@pytest.mark.parametrize('code', [403, 408, 429])
def test_a_server_that_refuses_leaves_the_cache(code, folder, tmp_path, weights_sum):
    with servers.hub_server() as server:
        publish(server.hub, folder)
        environment = servers.hub_environment(server, tmp_path)
        assert run_client(environment, NAME)['ok']
        server.hub.faults.append(servers.status(code))
        result = run_client(environment, NAME)
        assert result['ok'] and result['sum'] == pytest.approx(weights_sum, rel=1e-9), result


@pytest.mark.parametrize('what', ['nan', 'nan in a pickle', 'other', 'code'])
def test_unusable_files_on_the_hub(what, folder, tmp_path):
    """Whole files that are of no use are one cause among others, for every way to ask."""
    state = load_file(folder / 'model.safetensors')
    wrong = tmp_path / 'wrong'
    shutil.copytree(folder, wrong)
    if 'nan' in what:
        state['head.fc.weight'][0, 0] = float('nan')
    elif what == 'other':
        state['head.fc.weight'] = torch.zeros(3, 3)
    save_file(state, wrong / 'model.safetensors')
    names = [NAME] if what == 'other' else [NAME, _HUB]
    if what in ('nan in a pickle', 'code'):
        (wrong / 'model.safetensors').unlink()
        torch.save(dict(state, **(dict(hook=json.dumps) if what == 'code' else {})), wrong / 'pytorch_model.bin')
    words = {'other': 'shape of head.fc.weight', 'code': 'could run code'}.get(what, 'not finite')
    with servers.hub_server() as server:
        publish(server.hub, wrong)
        environment = servers.hub_environment(server, tmp_path / 'home')
        for message in ask(environment, *(f'timm.create_model({name!r}, pretrained=True)' for name in names)):
            assert message.startswith('WeightsError') and words in message, message
            assert 'weights_only=False' not in message


def test_pickled_weights(folder, tmp_path, weights_sum):
    """A repository that has nothing but pytorch_model.bin, as older ones do; without a network too, once cached."""
    pickled = tmp_path / 'pickled'
    shutil.copytree(folder, pickled)
    torch.save(load_file(folder / 'model.safetensors'), pickled / 'pytorch_model.bin')
    (pickled / 'model.safetensors').unlink()
    with servers.hub_server() as server:
        publish(server.hub, pickled)
        environment = servers.hub_environment(server, tmp_path / 'home')
        assert run_client(environment, _HUB)['sum'] == pytest.approx(weights_sum, rel=1e-9)
    offline = dict(environment, HF_HUB_OFFLINE='1')
    for name in (_HUB, NAME):
        result = run_client(offline, name)
        assert result['ok'] and result['sum'] == pytest.approx(weights_sum, rel=1e-9), (name, result)


def test_causes(tmp_path):
    """What is wrong is said, not what is not."""
    with servers.hub_server() as server:
        environment = servers.hub_environment(server, tmp_path)
        assert 'no name of a repository' in command(environment, 'verify', 'a b/c', expected=2)
        offline = dict(environment, HF_HUB_OFFLINE='1')
        text = command(offline, 'verify', 'me/x', expected=2)
        assert 'offline (HF_HUB_OFFLINE is set)' in text and 'no connection' not in text
        server.hub.faults.append(servers.status(403))
        assert 'refused (403)' in command(environment, 'verify', 'me/x', expected=2)
        secret = dict(environment, HF_ENDPOINT='http://user:s3cret@127.0.0.1:9')
        assert 's3cret' not in run_client(secret, _HUB, 'timm_smpconv')['message']


def test_revisions(folder, tmp_path, weights_sum):
    """ORG/NAME@REVISION is the repository as it was then, to load and to verify."""
    repo = f'me/{NAME}'
    with servers.hub_server() as server:
        publish(server.hub, folder)
        first = server.hub.repos[repo]['refs']['main']
        commit = server.hub.repos[repo]['commits'][first]
        tree = {**commit['tree'], 'model.safetensors': other_weights(server.hub, folder)}
        server.hub.commit(repo, 'main', commit, tree)
        *sums, now, then, problems, lost, unverified = ask(
            servers.hub_environment(server, tmp_path),
            f"total(timm.create_model('{_HUB}@{first}', pretrained=True))",
            f"total(timm_smpconv.create_model('{_HUB}@{first}', pretrained=True))",
            f"total(timm_smpconv.create_model('{_HUB}', pretrained=True))",
            f"wrong('{repo}@{first}')",
            f"wrong('{repo}')",
            f"timm_smpconv.create_model('{_HUB}@nope', pretrained=True)",
            f"verify('{repo}@nope')",
        )
    assert sums == [pytest.approx(weights_sum, rel=1e-9)] * 2 and now != pytest.approx(weights_sum, rel=1e-9)
    assert (then, problems) == ([], ['logits'])
    for message in (lost, unverified):
        assert message.startswith('WeightsError') and f'{repo} has no such revision' in message, message


def test_pull_request(folder, tmp_path):
    """Its address is returned, and the branch stays as it was."""
    with servers.hub_server() as server:
        server.hub.create('me/public')
        before = server.hub.repos['me/public']['refs']['main']
        address, wrong = ask(
            servers.hub_environment(server, tmp_path),
            f"push({str(folder)!r}, 'me/public', create_pr=True)",
            "wrong('me/public@refs/pr/1')",
        )
        assert address == f'{server.url}/me/public/discussions/1' and wrong == []
        assert server.hub.repos['me/public']['refs']['main'] == before


def test_gated_repositories(folder, tmp_path):
    """Who may not read one is told whom to ask, by every way to it."""
    with servers.hub_server() as server:
        publish(server.hub, folder)
        server.hub.faults.append(servers.status(403, 'GatedRepo'))
        messages = ask(
            servers.hub_environment(server, tmp_path),
            f"timm_smpconv.create_model('{_HUB}', pretrained=True)",
            f"timm.create_model('{MODEL}', pretrained=True)",
            f"verify('me/{NAME}')",
        )
    for message in messages:
        assert message.startswith('WeightsError') and f'access to me/{NAME} must be granted by its owner' in message


def test_other_files_of_a_repository(folder, tmp_path, weights_sum):
    """hf_hub_filename chooses one."""
    with servers.hub_server() as server:
        publish(server.hub, folder)
        (commit,) = server.hub.repos[f'me/{NAME}']['commits'].values()
        commit['tree']['more/ema.safetensors'] = other_weights(server.hub, folder)

        def load(**overlay):
            overlay = dict(hf_hub_id=f'me/{NAME}', **overlay)
            return f'total(timm.create_model({MODEL!r}, pretrained=True, pretrained_cfg_overlay={overlay!r}))'

        usual, other, message = ask(
            servers.hub_environment(server, tmp_path),
            load(),
            load(hf_hub_filename='more/ema.safetensors'),
            load(hf_hub_filename='nothing.bin'),
        )
    doubled = load_file(folder / 'model.safetensors')['head.fc.weight'].double().sum().item()
    assert usual == pytest.approx(weights_sum, rel=1e-9)
    assert other == pytest.approx(weights_sum + doubled, rel=1e-9)
    assert message.startswith('WeightsError') and 'the repository has no nothing.bin' in message, message
