"""Publishing on the Hugging Face Hub, and checking what is published."""

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Callable, List, Optional, Union

import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from safetensors.torch import load_file
from torch import nn

from . import store
from ._text import one_line, without_password
from .cards import PLACEHOLDER
from .catalog import model_names
from .checkpoint import DEPLOYED_FILE, WEIGHTS_FILE
from .convert import FILES, TENSORS_FILE
from .factory import check_config, create_model
from .fetch import hub_cause
from .version import __version__
from .weights import WEIGHTS, WeightsError, hub_repo

__all__ = ['Check', 'check_folder', 'push', 'verify']

_PUBLISHED = (*FILES, DEPLOYED_FILE)
_TOLERANCE = 1e-4  # of the largest logit: other processors round differently


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        name: What.
        ok: It is right.
        detail: What was found.
    """

    name: str
    ok: bool
    detail: str


def push(
    folder: Union[str, Path],
    repo: str,
    private: bool = False,
    create_pr: bool = False,
    token: Optional[str] = None,
) -> str:
    """Uploads a folder made by `convert` to the Hub, in one commit, after checking it.

    The card gets the name of the repository. Deployed weights that the repository has and the folder lacks are removed:
    they are of other weights.

    Args:
        folder: Hub-ready folder.
        repo: `ORG/NAME`; made if it does not exist.
        private: Make it a private repository, and upload to no other.
        create_pr: Open a pull request instead of committing to the main branch.
        token: Token of the Hub in place of that of the environment or of the login.

    Returns:
        Address of the commit or of the pull request.

    Raises:
        ValueError: The folder is not complete and right.
        WeightsError: The repository is public and should not be, the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    wrong = [check for check in check_folder(folder) if not check.ok]
    if wrong:
        problems = '; '.join(f'{check.name}: {check.detail}' for check in wrong)
        raise ValueError(f'{folder} cannot be published: {problems}. Expected a folder made by timm-smpconv convert.')
    api = HfApi(token=token, library_name='timm_smpconv', library_version=__version__)
    try:
        # without --private the Hub decides: organisations have a default of their own
        repo = api.create_repo(repo, exist_ok=True, **(dict(private=True) if private else {})).repo_id
        if private and not api.model_info(repo).private:  # one that existed stays as it is
            raise WeightsError(f'{repo} exists and is public: make it private on its page, or choose another name.')
        with tempfile.TemporaryDirectory() as temporary:
            copy = Path(temporary)
            for name in _PUBLISHED:
                if (folder / name).exists():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / name, copy / name)
            card = (copy / 'README.md').read_text(encoding='utf-8')
            (copy / 'README.md').write_text(card.replace(PLACEHOLDER, repo), encoding='utf-8')
            info = api.upload_folder(
                repo_id=repo,
                folder_path=copy,
                delete_patterns=None if (copy / DEPLOYED_FILE).exists() else DEPLOYED_FILE,
                commit_message=f'Weights and card, by timm_smpconv {__version__}',
                create_pr=create_pr,
            )
    except WeightsError:
        raise
    except Exception as e:  # clients of different versions raise different families of exceptions
        raise WeightsError(
            f'Cannot push {folder} to {repo} ({without_password(api.endpoint)}): {hub_cause(e, repo)}'
        ) from e
    return str(info.pr_url or info.commit_url) if create_pr else str(info.commit_url)


def verify(repo: str, token: Optional[str] = None) -> List[Check]:
    """Downloads a published model afresh and checks it: hashes, configuration, card and logits.

    Args:
        repo: `ORG/NAME`, or `ORG/NAME@REVISION`.
        token: Token of the Hub in place of that of the environment or of the login.

    Returns:
        All checks.

    Raises:
        WeightsError: The repository cannot be reached.
    """
    name, _, revision = repo.partition('@')
    api = HfApi(token=token, library_name='timm_smpconv', library_version=__version__)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            info = api.model_info(name, revision=revision or None, files_metadata=True, timeout=10.0)
            files = {sibling.rfilename: sibling for sibling in info.siblings or []}
            folder = Path(temporary) / 'snapshot'
            for file in _PUBLISHED:
                if file in files:
                    # into a cache of its own: the usual one would be asked first
                    cached = hf_hub_download(name, file, revision=info.sha, token=token, cache_dir=temporary)
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(cached, folder / file)
        except Exception as e:
            raise WeightsError(f'Cannot verify {repo} ({without_password(api.endpoint)}): {hub_cause(e, name)}') from e
        checks = []
        for file, sibling in files.items():
            if file in _PUBLISHED and sibling.lfs is not None:
                found = store.file_sha256(folder / file)
                announced = sibling.lfs['sha256'] if isinstance(sibling.lfs, dict) else sibling.lfs.sha256
                checks.append(Check(f'hash of {file}', found == announced, f'sha256 {found}'))
        tag = name.partition('/')[2]
        known = WEIGHTS.get(tag) if name == hub_repo(tag) else None  # others may have weights of their own
        if known and known.sha256 and (folder / WEIGHTS_FILE).is_file():
            found = store.file_sha256(folder / WEIGHTS_FILE)
            detail = 'as in the table' if found == known.sha256 else f'{found}, the table has {known.sha256}'
            checks.append(Check('table of weights', found == known.sha256, detail))
        return checks + check_folder(folder)


def check_folder(folder: Path) -> List[Check]:
    """Checks a Hub-ready folder: files, configuration, weights, card and logits."""
    missing = [file for file in FILES if not (folder / file).is_file()]
    detail = f'missing: {", ".join(missing)}' if missing else f'{len(FILES)} files'
    checks = [Check('files', not missing, detail)]
    if missing:
        return checks
    wanted = [('config', _config), ('card', _card), ('logits', _logits)]
    if (folder / DEPLOYED_FILE).is_file():
        wanted.append(('logits, deployed', _deployed_logits))
    return checks + [_run(name, check, folder) for name, check in wanted]


def _run(name: str, check: Callable[[Path], str], folder: Path) -> Check:
    try:
        return Check(name, True, check(folder))
    except Exception as e:  # files of unknown contents fail in any way, and a failure is the finding
        return Check(name, False, one_line(e, 1000))


def _config(folder: Path) -> str:
    config = check_config(folder / 'config.json', str(folder))
    architecture = config['architecture']
    if architecture not in model_names():
        raise ValueError(f'architecture {architecture!r}, expected one of {", ".join(model_names())}')
    if not isinstance(config.get('pretrained_cfg'), dict):
        raise ValueError('no pretrained_cfg')
    return f'{architecture}, {config.get("num_classes")} classes'


def _card(folder: Path) -> str:
    card = ModelCard.load(folder / 'README.md')
    data = card.data.to_dict()
    for key in ('license', 'library_name', 'tags'):
        if not data.get(key):
            raise ValueError(f'no {key} in the metadata block of README.md')
    if data['library_name'] != 'timm':
        raise ValueError(f'library_name {data["library_name"]!r}, expected timm')
    return f'licence {data["license"]}, {len(card.text.split())} words'


@torch.inference_mode()
def _logits(folder: Path) -> str:
    return _compare(folder, create_model(f'local-dir:{folder}', pretrained=True))


@torch.inference_mode()
def _deployed_logits(folder: Path) -> str:
    model = create_model(f'local-dir:{folder}', inference_mode=True)
    model.load_state_dict(load_file(folder / DEPLOYED_FILE))
    return _compare(folder, model)


def _compare(folder: Path, model: nn.Module) -> str:
    tensors = load_file(folder / TENSORS_FILE)
    model.eval()
    error = (model(tensors['input']) - tensors['output']).abs().max() / tensors['output'].abs().max()
    if not error <= _TOLERANCE:
        raise ValueError(f'other than in {TENSORS_FILE}: relative error {error:.1e}, at most {_TOLERANCE:.0e} expected')
    return f'relative error {error:.1e}'
