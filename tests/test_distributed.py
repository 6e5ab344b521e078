"""Training spread over processes, here in one: parameters become views of flat vectors, or are split."""

import pytest
import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.device_mesh
import torch.distributed.fsdp
from conftest import build, make_input
from timm.layers import convert_sync_batchnorm

# one small network of each family
NETWORKS = {
    'pelk_tiny': dict(depths=(1, 1), dims=(16, 32), kernel_sizes=(9, 7)),
    'smpconv_cifar': dict(dims=(8, 8, 12), kernel_size=9),
    'smpconv_seq_speech': dict(depth=2, dim=8),
    'smpconv_tiny': dict(depths=(1, 1), dims=(16, 32), kernel_sizes=(9, 7)),
}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['flat', 'original', 'split'])
@pytest.mark.parametrize('name', NETWORKS)
def test_fully_sharded_training(name, kind, process_group):
    model, x = build(name, **NETWORKS[name]), make_input(name)
    if kind == 'split':
        if tuple(int(n) for n in torch.__version__.split('.')[:2]) < (2, 7):
            pytest.skip('fully_shard needs an accelerator before torch 2.7')
        mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
        sharded = torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    else:
        sharded = torch.distributed.fsdp.FullyShardedDataParallel(
            model, use_orig_params=kind == 'original', device_id=torch.device('cpu')
        )
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    outputs = []
    for _ in range(2):
        sharded.train()
        sharded(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sharded.eval()
        with torch.no_grad():
            outputs.append(sharded(x))
        torch.testing.assert_close(outputs[-1], sharded(x).detach(), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-2)
    assert sharded.state_dict().keys() == build(name, **NETWORKS[name]).state_dict().keys()
    if kind == 'split':
        torch.distributed.checkpoint.state_dict.get_model_state_dict(sharded)


def test_synchronised_norms_deploy(name, model, x):
    expected = model(x).detach()
    model = convert_sync_batchnorm(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
        model.reparameterize()
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    build(name, inference_mode=True).load_state_dict(model.state_dict())
