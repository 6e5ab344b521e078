"""Makes the cards and configurations of this folder, and the tables in README.md and MODEL_CARD.md.

All of it comes from the table of weights:

python hub/make.py           # writes what differs
python hub/make.py --check   # exits with 1 if anything differs
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Dict, Sequence

import timm

import timm_smpconv  # noqa: F401  (registers the models)
from timm_smpconv.cards import evaluation_table, file_table, model_card, model_table, replace_section
from timm_smpconv.convert import config_text, name_classes
from timm_smpconv.weights import WEIGHTS

ROOT = Path(__file__).resolve().parents[1]


def documents() -> Dict[Path, str]:
    """Files that are made, with their contents."""
    files = {}
    for name, sections in (
        ('README.md', {'models': model_table(), 'results': evaluation_table(brief=True)}),
        ('MODEL_CARD.md', {'results': evaluation_table(), 'files': file_table()}),
    ):
        text = (ROOT / name).read_text(encoding='utf-8')
        for section, content in sections.items():
            text = replace_section(text, section, content)
        files[ROOT / name] = text
    for name, weights in WEIGHTS.items():
        if weights.bundled is None and weights.authors_file is None:
            continue  # nothing to publish
        model = timm.create_model(name, device='meta')  # values are not looked at
        if weights.bundled:
            name_classes(model, name)
        files[ROOT / 'hub' / name / 'README.md'] = model_card(name, model)
        files[ROOT / 'hub' / name / 'config.json'] = config_text(model, {})
    return files


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description='Makes documents from the table of weights.')
    parser.add_argument('--check', action='store_true', help='write nothing, and fail if anything differs')
    check = parser.parse_args(argv).check
    os.environ.pop('TIMM_SMPCONV_HUB_ORG', None)  # the documents name the project's own organisation
    outdated = [
        (path, text)
        for path, text in documents().items()
        if not path.exists() or path.read_text(encoding='utf-8') != text
    ]
    for path, text in outdated:
        print(path.relative_to(ROOT))
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding='utf-8')
    return int(check and bool(outdated))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
