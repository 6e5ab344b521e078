"""The command `timm-smpconv`."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

import timm
import torch
from timm.models import parse_model_name
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ._text import one_line
from .catalog import ModelInfo, check_known, describe_models
from .convert import convert
from .data import DATA_SETS, prepare
from .factory import architecture_of
from .kernels import LayerKernel, find_kernels
from .pictures import MAX_CLASSES, draw_confusion, draw_kernels
from .predict import FileResult, check_inputs, check_takes_files, load_model, predict_files
from .publish import push, verify
from .recipe import Recipe, field_texts, read_recipe
from .train import check_trainable, train
from .validate import validate
from .version import __version__
from .weights import WeightsError

__all__ = ['main']

_PROG = 'timm-smpconv'
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_DEFAULT_MODEL = 'smpconv_seq_mnist'
_MAX_THREADS = 1024
_TAKERS = {'opt_kwargs': 'optimizer', 'model_kwargs': 'model'}
_SHARES = (50, 90, 99)  # of a kernel, in percent, whose reach is told


class _CommandError(Exception):
    """A failure that the user can do something about: one line, no traceback."""


@contextlib.contextmanager
def _user_errors(*types: type, join: bool = True) -> Iterator[None]:
    try:
        yield
    except types as e:
        text = str(e) or type(e).__name__
        raise _CommandError(_one_line(text) if join else text) from e


@contextlib.contextmanager
def _own_weights(name: str) -> Iterator[None]:
    """Adds to the failures of a model's own weights what this command line can do about them."""
    try:
        yield
    except WeightsError as e:
        advice = '' if parse_model_name(name)[0] else ' On this command line: --checkpoint-path PATH.'
        raise _CommandError(_one_line(f'{e}{advice}')) from e


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        Exit status: 0 done, 1 files could not be read or checks failed, 2 the work could not begin or be finished,
        130 interrupted.
    """
    with contextlib.ExitStack() as stack:
        if sys.stdout is None:  # closed, by a service manager for one
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, 'w'))))
        if sys.stderr is None:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, 'w'))))
        return _main(argv)


def _main(argv: Optional[Sequence[str]]) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as e:  # --help, --version and errors in the arguments, already printed by argparse
        return int(e.code or 0)
    for stream in (sys.stdout, sys.stderr):
        # file names may hold what the terminal cannot show
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except _CommandError as e:
        _complain(str(e))
        return _USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        _give_up_output()
        return _FAILED
    except OSError as e:  # a full disk, for one
        _complain(one_line(e))
        _give_up_output()
        return _USAGE


def _give_up_output() -> None:
    """Lets Python write to nowhere what it could not write, as it tries once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str) -> None:
    with contextlib.suppress(OSError), tqdm.external_write_mode(sys.stderr):  # a full disk must not cost the results
        print(f'{_PROG}: {message}', file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description='SMPConv and PeLK: continuous and very large convolution kernels for timm.'
    )
    parser.add_argument('--version', action='version', version=f'{_PROG} {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

    command = commands.add_parser(
        'predict',
        help='classify image or sound files',
        description='Classify image files or, with the speech models, sound files.',
    )
    command.set_defaults(run=_predict)
    command.add_argument(
        'files', nargs='+', metavar='FILE', help='image of any format, size and mode; for the speech models a sound'
    )
    _add_model(command)
    command.add_argument('--topk', type=_positive, default=3, metavar='K', help='classes to print (default: 3)')
    command.add_argument('--invert', action='store_true', help='swap dark and light: for dark digits on light ground')
    command.add_argument('--json', action='store_true', help='print one JSON array')

    command = commands.add_parser('list', help='list the models', description='List the models of this package.')
    command.set_defaults(run=_list)
    command.add_argument('--json', action='store_true', help='print one JSON array')

    _add_validate(commands)
    _add_kernels(commands)
    _add_data(commands)
    _add_train(commands)
    _add_convert(commands)
    _add_push(commands)
    _add_verify(commands)
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '--model',
        default=_DEFAULT_MODEL,
        metavar='NAME',
        help=f'of this package (default: {_DEFAULT_MODEL}), hf-hub:ORG/NAME or local-dir:FOLDER',
    )
    command.add_argument('--checkpoint-path', metavar='FILE', help="weights to use in place of the model's own")


def _add_validate(commands: Any) -> None:
    command = commands.add_parser(
        'validate', help='measure accuracy', description='Measure the accuracy of a model on its test data.'
    )
    command.set_defaults(run=_validate)
    _add_model(command)
    _add_data_dir(command, "what 'timm-smpconv data' made, or a folder of class folders (ImageNet, CIFAR-10, your own)")
    command.add_argument(
        '--step-statistics',
        action='store_true',
        help="for the authors' weights of speech and trajectories: normalise each time step as the training data",
    )
    command.add_argument('--device', default='cpu', help='default: cpu')
    command.add_argument('--confusion', metavar='FILE.png', help='draw which classes are taken for which')
    command.add_argument('--json', action='store_true', help='print a JSON object')


def _add_kernels(commands: Any) -> None:
    command = commands.add_parser(
        'kernels',
        help='show the large kernels',
        description='Tell how far the large kernels of a model with its weights reach, layer by layer, and draw them.',
    )
    command.set_defaults(run=_kernels)
    _add_model(command)
    command.add_argument(
        '--deployed', action='store_true', help='with the small kernels beside them and the norms behind them folded in'
    )
    command.add_argument('--picture', metavar='FILE.png', help='draw points and kernels')
    command.add_argument(
        '--count', type=_positive, default=6, metavar='N', help='kernels of each layer to draw (default: 6)'
    )
    command.add_argument('--json', action='store_true', help='print one JSON array')


def _add_data(commands: Any) -> None:
    command = commands.add_parser(
        'data',
        help='prepare a data set',
        description='Put a data set into the form that recipes and validate read; without --archive it is downloaded.',
    )
    command.set_defaults(run=_data)
    command.add_argument('name', choices=list(DATA_SETS), metavar='NAME', help=', '.join(DATA_SETS))
    command.add_argument('folder', metavar='DIR', help='data folder, in which the data set gets a folder of its own')
    command.add_argument(
        '--archive',
        nargs='+',
        default=[],
        metavar='FILE',
        help='files of the original, or a folder that holds them; speech_commands also as two archives, training data '
        'first',
    )


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        'train',
        help='train a sequence model',
        description='Train a model on MNIST, Speech Commands or character trajectories; called again with the same '
        'output, a stopped run continues.',
    )
    command.set_defaults(run=_train)
    _add_data_dir(command, "what 'timm-smpconv data' made")
    command.add_argument('--output', required=True, metavar='DIR', help='folder for checkpoint, log and weights')
    command.add_argument('--config', metavar='FILE', help='recipe as YAML; the options below override its fields')
    command.add_argument('--threads', type=_threads, metavar='N', help='CPU threads')
    command.add_argument('--device', default='cpu', help='default: cpu')
    command.add_argument(
        '--recovery-interval',
        type=int,
        default=100,
        metavar='STEPS',
        help='steps between checkpoints within an epoch; one is also made whenever five minutes have passed; 0: none '
        'within an epoch (default: 100)',
    )
    recipe = command.add_argument_group('recipe')
    texts = field_texts()
    for field in dataclasses.fields(Recipe):
        kind: Dict[str, Any] = dict(action=argparse.BooleanOptionalAction)
        text = f'{texts.get(field.name, "")} Default without a config: {field.default}'.replace('%', '%%')
        if not isinstance(field.type, type):
            kind = dict(type=_keywords, metavar='JSON')
            text = f'further arguments of the {_TAKERS[field.name]}, as a JSON object'
        elif field.type is not bool:
            kind = dict(type=field.type, metavar=field.type.__name__.upper())
        recipe.add_argument('--' + field.name.replace('_', '-'), default=argparse.SUPPRESS, help=text, **kind)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        'convert',
        help='make a checkpoint ready for the Hub, or install it',
        description="Convert a checkpoint of the authors' code, of timm's train.py or of this package into a folder "
        'for the Hugging Face Hub, or install it as the pretrained weights of its model.',
    )
    command.set_defaults(run=_convert)
    command.add_argument('file', metavar='FILE', help='safetensors, or what torch.save wrote; no code in it is run')
    command.add_argument('--model', required=True, metavar='NAME', help='model, or model.tag')
    command.add_argument('--out', metavar='DIR', help='folder to make')
    command.add_argument('--install', action='store_true', help='put the weights where pretrained=True finds them')
    command.add_argument('--deployed', action='store_true', help='add the weights of the deployed form to the folder')
    command.add_argument('--no-ema', action='store_true', help='take the weights themselves, not their average')
    command.add_argument('--overwrite', action='store_true', help='replace the folder of an earlier conversion')
    command.add_argument('--license', metavar='ID', help='licence of the weights for the card, as the Hub names it')
    command.add_argument('--num-classes', type=_positive, metavar='N', help="classes, where not the model's own number")
    command.add_argument('--label-names', nargs='+', metavar='NAME', help="their names, where not the model's own")
    command.add_argument('--model-kwargs', type=_keywords, default={}, metavar='JSON', help='arguments of the model')


def _add_push(commands: Any) -> None:
    command = commands.add_parser(
        'push',
        help='publish a folder on the Hub',
        description='Check a folder that convert made, and upload it to the Hugging Face Hub. Log in first (hf auth '
        'login) or set HF_TOKEN.',
    )
    command.set_defaults(run=_push)
    command.add_argument('folder', metavar='DIR')
    command.add_argument('--repo', required=True, metavar='ORG/NAME', help='repository, made if it does not exist')
    command.add_argument('--private', action='store_true', help='make it a private repository')
    command.add_argument('--create-pr', action='store_true', help='open a pull request')


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        'verify',
        help='check a published model',
        description='Download a model from the Hugging Face Hub afresh, and check hashes, configuration, card, logits.',
    )
    command.set_defaults(run=_verify)
    command.add_argument('repo', metavar='ORG/NAME', help='repository, with @REVISION if not its main branch')
    command.add_argument('--json', action='store_true', help='print one JSON array')


def _add_data_dir(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument('--data', '--data-dir', dest='data_dir', required=True, metavar='DIR', help=text)


def _keywords(text: str) -> Dict[str, Any]:
    try:
        keywords = json.loads(text)
    except (ValueError, RecursionError):
        keywords = None
    if not isinstance(keywords, dict):
        raise argparse.ArgumentTypeError(f'expected a JSON object such as {{"dim": 16}}, got {text!r}')
    return keywords


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f'expected a positive whole number, got {text[:20]!r}')
    return int(text)


def _threads(text: str) -> int:
    threads = _positive(text)
    if threads > _MAX_THREADS:
        raise argparse.ArgumentTypeError(f'expected at most {_MAX_THREADS} threads, got {threads}')
    return threads


def _predict(args: argparse.Namespace) -> int:
    with _user_errors(ValueError):
        with _own_weights(args.model):
            check_takes_files(args.model, args.invert)
            check_inputs(args.model, args.checkpoint_path)
            model = load_model(args.model, args.checkpoint_path)
    results: List[FileResult] = []
    bar = tqdm(
        predict_files(model, args.files, args.topk, args.invert),
        total=len(args.files),
        unit='file',
        leave=False,
        disable=len(args.files) <= 20 or not sys.stderr.isatty(),
    )
    with _user_errors(ValueError, FloatingPointError):
        for result in bar:
            results.append(result)
            if result.error is not None:
                _complain(f'cannot read {result.file}: {result.error}')
            elif not args.json:
                text = ', '.join(f'{p.label} ({100 * p.probability:.2f} %)' for p in result.predictions)
                with tqdm.external_write_mode(sys.stdout):
                    print(f'{result.file}: {text}')
    if args.json:
        print(json.dumps([_result_entry(result) for result in results], indent=2))
    return _FAILED if any(result.error is not None for result in results) else 0


def _result_entry(result: FileResult) -> Dict[str, Any]:
    if result.error is not None:
        return dict(file=result.file, error=result.error)
    return dict(file=result.file, predictions=[dataclasses.asdict(p) for p in result.predictions])


def _list(args: argparse.Namespace) -> int:
    infos = describe_models()
    if args.json:
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
        return 0
    head = ['model', 'params', 'GMACs', 'input', 'weights', 'trained on', 'measured', 'paper', 'source of the weights']
    table = [head] + [_row(info) for info in infos]
    _print_table(table, ('params', 'GMACs', 'measured', 'paper'))
    print()
    print(
        'GMACs: multiply-adds of convolutions and linear layers but the classifier, for one input, both branches and '
        'padding included, before deployment.'
    )
    print('measured, paper: top-1 accuracy in percent, of the bundled weights here and of the authors in their paper.')
    print('Links to the files that the authors published: timm-smpconv list --json. Load one with --checkpoint-path.')
    return 0


def _print_table(table: List[List[str]], numbers: Sequence[str]) -> None:
    """Prints rows below a head, with the columns of these names aligned to the right."""
    head, widths = table[0], [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = [c.rjust(w) if head[i] in numbers else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print('  '.join(cells).rstrip())


def _row(info: ModelInfo) -> List[str]:
    return [
        info.name,
        f'{info.params:,}',
        f'{info.macs / 1e9:,.2f}',
        'x'.join(str(n) for n in info.input_size),
        info.tag,
        info.trained_on,
        '-' if info.accuracy is None else f'{info.accuracy:.2f}',
        f'{info.paper_accuracy:.2f}',
        info.source,
    ]


def _validate(args: argparse.Namespace) -> int:
    with _user_errors(ValueError, OSError, FloatingPointError):
        with _own_weights(args.model):
            classes = timm.get_pretrained_cfg(architecture_of(args.model)).num_classes
            if args.confusion and classes > MAX_CLASSES and not parse_model_name(args.model)[0]:
                raise ValueError(f'--confusion draws at most {MAX_CLASSES} classes, {args.model} has {classes}.')
            result = validate(
                args.model,
                args.data_dir,
                args.checkpoint_path,
                sys.stderr.isatty(),
                args.step_statistics,
                args.device,
            )
        hits, total, (low, high) = result.hits, result.total, result.interval
        accuracy = 100 * hits / total
        summary = f'{hits} of {total} test samples right, {accuracy:.2f} %'
    if args.json:
        entry = dict(model=args.model, hits=hits, total=total, accuracy=accuracy, interval=[100 * low, 100 * high])
        print(json.dumps({**entry, 'left_out': result.left_out}, indent=2))
    else:
        print(f'{args.model}: {summary} (95 % interval {100 * low:.2f} to {100 * high:.2f} %)')
        if result.left_out:
            print(f'{result.left_out} others were left out: these weights were trained on recordings of their speakers')
    if args.confusion:  # last, so that a picture that cannot be written does not cost the result
        with _user_errors(ValueError, OSError):
            draw_confusion(result.confusion, result.names, f'{args.model}: {summary}', Path(args.confusion))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    with _user_errors(ValueError), _own_weights(args.model):
        model = load_model(args.model, args.checkpoint_path, inference_mode=args.deployed)
    layers = list(find_kernels(model, args.count))
    if args.json:
        print(json.dumps([_kernel_entry(layer) for layer in layers], indent=2))
    else:
        head = ['layer', 'taps', 'filters', 'idle', 'points', *(f'{share} %' for share in _SHARES)]
        table = [head]
        for layer in layers:
            taps, filters = (' x '.join(str(n) for n in part) for part in (layer.shape[2:], layer.shape[:2]))
            points = '-' if layer.num_points is None else str(layer.num_points)
            reach = [str(layer.reach(share / 100)) for share in _SHARES]
            table.append([layer.name, taps, filters, str(layer.num_idle), points, *reach])
        _print_table(table, head[3:])
        print()
        print(
            'filters: number x channels of one. idle: filters of which training has left nothing. points: of a filter. '
            '50 %: taps that hold half of a kernel, by the sum of absolute values: side of a window around the middle '
            'or, of causal kernels, the latest steps.'
        )
    if args.picture:
        with _user_errors(ValueError, OSError):
            draw_kernels(layers, f'{args.model}: large kernels', Path(args.picture))
    return 0


def _kernel_entry(layer: LayerKernel) -> Dict[str, Any]:
    reach = {str(share): layer.reach(share / 100) for share in _SHARES}
    return dict(
        layer=layer.name,
        shape=layer.shape,
        idle_filters=layer.num_idle,
        points=layer.num_points,
        causal=layer.causal,
        taps_that_hold_percent=reach,
    )


def _data(args: argparse.Namespace) -> int:
    with _user_errors(ValueError, OSError):
        result = prepare(args.name, args.folder, args.archive, sys.stderr.isatty())
    if result.new:
        print(f'{result.path}: ' + ', '.join(f'{count} {part} samples' for part, count in result.counts.items()))
    else:
        print(f'{result.path}: already there')
    return 0


def _train(args: argparse.Namespace) -> int:
    with _user_errors(ValueError, OSError):
        fields = {} if args.config is None else read_recipe(Path(args.config))
        fields.update({f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe) if hasattr(args, f.name)})
        recipe = Recipe(**fields)
        check_known(recipe.model)
        check_trainable(recipe)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    with logging_redirect_tqdm(), _user_errors(ValueError, OSError, FloatingPointError, WeightsError):
        path = train(recipe, args.data_dir, args.output, True, args.recovery_interval, args.device)
    print(path)
    return 0


def _convert(args: argparse.Namespace) -> int:
    kwargs = dict(args.model_kwargs, **({'num_classes': args.num_classes} if args.num_classes else {}))
    # the list of differences keeps its lines
    with _user_errors(ValueError, OSError, WeightsError, join=False):
        result = convert(
            args.file,
            args.model,
            args.out,
            install=args.install,
            deployed=args.deployed,
            use_ema=not args.no_ema,
            overwrite=args.overwrite,
            model_kwargs=kwargs,
            license=args.license,
            label_names=args.label_names,
        )
    print(f'{result.name}: sha256 {result.sha256}')
    for path in (result.folder, result.installed):
        if path is not None:
            print(path)
    return 0


def _push(args: argparse.Namespace) -> int:
    with _user_errors(ValueError, WeightsError):
        print(push(args.folder, args.repo, args.private, args.create_pr))
    return 0


def _verify(args: argparse.Namespace) -> int:
    with _user_errors(WeightsError):
        checks = verify(args.repo)
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            print(f'{"ok    " if check.ok else "FAILED"}  {check.name}: {check.detail}')
    return 0 if all(check.ok for check in checks) else _FAILED
