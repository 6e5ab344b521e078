"""Training of timm_smpconv.train on a few made-up digits: reproducible, resumable, and clear about what is wrong."""

import csv
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timm_smpconv import train as module
from timm_smpconv.train import Recipe, augment_digits, evaluate, load_mnist, train

RECIPE = Recipe(epochs=2, batch_size=4, val_images=5, lr=1e-3)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Twenty-five training and ten test images in MNIST's own file format."""
    folder = tmp_path_factory.mktemp('data')
    raw = folder / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (('train', 25), ('t10k', 10)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([0x803, count, 28, 28], '>i4').tobytes()
        (raw / f'{prefix}-images-idx3-ubyte').write_bytes(header + images.tobytes())
        (raw / f'{prefix}-labels-idx1-ubyte').write_bytes(np.array([0x801, count], '>i4').tobytes() + labels.tobytes())
    return folder


def test_load_mnist(data_dir, tmp_path):
    images, labels = load_mnist(data_dir, train=False)
    assert images.shape == (10, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.tolist() == list(range(10))
    with pytest.raises(FileNotFoundError, match='MNIST/raw'):
        load_mnist(tmp_path, train=True)


def test_interrupted_run_continues(data_dir, tmp_path, monkeypatch):
    """A run that dies in its second epoch and is started again ends with the weights of an unbroken run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = load_file(train(RECIPE, data_dir, tmp_path / 'whole', progress=False))
        batches = module._batches

        def dying(recipe, epoch, images, labels):
            for i, batch in enumerate(batches(recipe, epoch, images, labels)):
                if epoch == 1 and i == 2:
                    raise KeyboardInterrupt
                yield batch

        monkeypatch.setattr(module, '_batches', dying)
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, data_dir, tmp_path / 'broken', progress=False)
        assert not (tmp_path / 'broken' / 'model.safetensors').exists()
        monkeypatch.setattr(module, '_batches', batches)
        torch.manual_seed(123)  # the state of the generator is not what a run depends on
        resumed = load_file(train(RECIPE, data_dir, tmp_path / 'broken', progress=False))
    finally:
        torch.set_num_threads(threads)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    with (tmp_path / 'broken' / 'log.csv').open() as f:
        assert [row['epoch'] for row in csv.DictReader(f)] == ['1', '2']
    assert not list(tmp_path.glob('*/*.part'))


def test_other_recipe_in_the_same_folder(data_dir, tmp_path):
    train(dataclasses.replace(RECIPE, epochs=1), data_dir, tmp_path, progress=False)
    with pytest.raises(ValueError, match='another recipe'):
        train(dataclasses.replace(RECIPE, epochs=1, lr=1e-2), data_dir, tmp_path, progress=False)


def test_augment_digits():
    images = torch.zeros(400, 1, 28, 28)
    images[:, :, 8:20, 8:20] = 1.0
    augmented = augment_digits(images, torch.Generator().manual_seed(0))
    again = augment_digits(images, torch.Generator().manual_seed(0))
    assert torch.equal(augmented, again)
    assert augmented.shape == images.shape and augmented.min() >= 0 and augmented.max() <= 1 + 1e-6
    unchanged = (augmented == images).flatten(1).all(1).float().mean().item()
    # four operations with probability 1/2, and an erased patch may miss the digit
    assert 1 / 16 - 0.05 < unchanged < 1 / 16 + 0.12
    # the centre of mass moves by at most 2 pixels and what rotation and erasing add
    rows = (augmented.sum((1, 3)) * torch.arange(28)).sum(1) / augmented.sum((1, 2, 3))
    assert (rows - 13.5).abs().max() < 4 and (rows - 13.5).abs().mean() > 0.2


def test_evaluate(data_dir):
    import timm

    images, labels = load_mnist(data_dir, train=False)
    model = timm.create_model('smpconv_seq_mnist')
    predictions = evaluate(model, images, labels, batch_size=3, progress=False)
    x = (images.float() / 255 - 0.1307) / 0.3081
    with torch.no_grad():
        assert torch.equal(predictions, model.eval()(x).argmax(1))
