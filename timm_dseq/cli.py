"""The `timm-dseq` command: models, get, convert, verify, push, explain, and doors to the recipes.

Exit codes: 0 done, 1 a mistake or a failed check, which stderr names in one line, 2 a misspelt command, 130 Ctrl-C.
"""

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

from . import __version__
from .early import ready
from .errors import UserError, one_line
from .hub.load import NAMES, load_backbone
from .recipes import RECIPES, enter

EXPLAINED = "dseq_jepa_vit_ti16"  # its weights are part of this package


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. A command returns its result, and one line if a check failed."""
    ready()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows few letters shows the others as "?"
            stream.reconfigure(errors="replace")
    words = sys.argv[1:] if arguments is None else [*arguments]
    if not words:
        _parser().print_help()
        return 0
    if words[0] in RECIPES:
        raise SystemExit(enter(words[0], words[1:]))
    options = _parser().parse_args(arguments)
    try:
        _check_words(options)
        result, failure = options.run(options)
        _print(json.dumps(result, indent=2) if options.json else options.show(result))
    except KeyboardInterrupt:
        print(f"timm-dseq {options.command}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        failure = one_line(error)
        if options.json:
            with suppress(UserError):
                _print(json.dumps({"error": failure}))
    if failure:
        print(f"timm-dseq {options.command}: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        # Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has read enough, as `head`
            raise SystemExit(141) from error
        raise UserError(f"The output cannot be written ({error.strerror}).") from error


def _check_words(options: argparse.Namespace) -> None:
    """Refuse words that are empty, or that would bring lines of their own into a card."""
    for name, value in vars(options).items():
        if value == "":
            raise UserError(f"The {name} given is empty: is a variable of your shell not set?")
        if isinstance(value, str) and not value.isprintable():
            raise UserError(f"The {name} given, {value!r}, holds letters that cannot be printed: write it anew.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-dseq",
        description="DSeq-JEPA backbones: list them, convert checkpoints for the Hub, check, publish and explain them.",
        epilog='In Python: import timm_dseq, timm; timm.create_model("dseq_jepa_vit_b16")',
    )
    parser.add_argument("--version", action="version", version=f"timm-dseq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, show, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(run=run, show=show)
        return sub

    command("models", _models, _show_models, "list the backbones: size, cost, and which weights are here or on the Hub")

    sub = command("get", _get, _show_get, "bring weights of others into the store of this machine, ready for timm")
    sub.add_argument("name", metavar="NAME.TAG", nargs="?", help="which weights")
    sub.add_argument("--file", metavar="PATH", help="the checkpoint, if you have downloaded it by other means")
    sub.add_argument("--list", action="store_true", help="show what can be brought, and what is here")
    sub.add_argument("--remove", action="store_true", help="remove NAME.TAG, or what has arrived of it")

    sub = command("convert", _convert, _show_convert, "turn a checkpoint into a folder ready for the Hub")
    sub.add_argument("source", metavar="SRC", help="our training checkpoint, Meta's I-JEPA, the authors', any timm ViT")
    sub.add_argument("-o", "--output", metavar="DIR", help="folder to write (default: ./MODEL.TAG)")
    sub.add_argument("--encoder", choices=("target", "student"), default="target", help="default: target")
    sub.add_argument("--model", metavar="NAME[.TAG]", help="what it is, if the file does not show it")
    sub.add_argument("--img-size", type=int, nargs=2, metavar=("H", "W"), help="resample the positions to this size")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    sub.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub writes it")
    sub.add_argument("--with-pretraining-state", action="store_true", help="student and predictor, too, to train on")

    sub = command("verify", _verify, _show_checks, "load a folder or repository in every way, and compare the outputs")
    sub.add_argument("source", metavar="DIR|REPO", help="a folder ready for the Hub, or ORGANISATION/NAME[@REVISION]")

    sub = command("push", _push, _show_push, "publish a folder ready for the Hub in one commit, and load it back")
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("repository", metavar="REPO", nargs="?", help="default: $TIMM_DSEQ_NAMESPACE/MODEL.TAG")
    sub.add_argument("--private", action="store_true", help="create it private")
    sub.add_argument("--revision", metavar="BRANCH", help="default: main")
    sub.add_argument("--dry-run", action="store_true", help="show what would go, send nothing")

    sub = command("explain", _explain, _show_explain, "draw where a model looks, its ranked regions and their sequence")
    sub.add_argument("image", metavar="IMAGE")
    sub.add_argument("--model", default=EXPLAINED, metavar="NAME", help=f"{NAMES} (default: {EXPLAINED})")
    sub.add_argument("--query", default="border", help="scores patches; cls_param is the paper's (default: border)")
    sub.add_argument("-o", "--output", "--out", metavar="PNG", help="default: IMAGE's name, with .explained.png")
    for name, help in RECIPES.items():
        commands.add_parser(name, help=help)
    return parser


def _models(_: argparse.Namespace) -> tuple[list[dict], str | None]:
    from .hub.store.models import listing

    return listing(), None


def _show_models(rows: list[dict]) -> str:
    from .hub.store.models import shown

    return shown(rows)


def _get(options: argparse.Namespace) -> tuple[dict | list, str | None]:
    from pathlib import Path

    from .hub.store.get import get, listing, remove

    if options.list and (options.name or options.remove or options.file):
        raise UserError("--list shows all: give it alone.")
    if options.remove and options.file:
        raise UserError("--remove takes no --file: give NAME.TAG alone.")
    if not options.name and (options.remove or options.file):
        raise UserError("no NAME.TAG is given: timm-dseq get --list shows the names.")
    if not options.name:
        return listing(), None
    say = (lambda line: None) if options.json else _print
    if options.remove:
        return remove(options.name, say), None
    return get(options.name, Path(options.file) if options.file else None, say), None


def _show_get(result: dict | list) -> str:
    from .hub.store.shown import shown

    return shown(result)


def _convert(options: argparse.Namespace) -> tuple[dict, str | None]:
    from .hub.convert import convert

    size = tuple(options.img_size) if options.img_size else None
    return convert(
        options.source,
        options.output,
        encoder=options.encoder,
        model=options.model,
        img_size=size,
        dtype=options.dtype,
        license=options.license,
        with_pretraining_state=options.with_pretraining_state,
    ), None


def _show_convert(result: dict) -> str:
    lines = [
        f"{result['model']}: a checkpoint of kind {result['kind']}, its {result['encoder']} encoder, "
        f"{result['tensors']} tensors; in stock timm {result['stock']}",
        *(f"  {name}  {size:,} bytes" for name, size in result["files"].items()),
    ]
    if result["assumed_heads"]:
        lines.append(f"no shape shows its heads, {result['assumed_heads']} are assumed: --model NAME says otherwise")
    if result["left_out"]:
        lines.append(f"left out: {', '.join(result['left_out'])}")
    if result["blanks"]:
        lines.append(f"blanks to fill in {result['output']}/README.md before a push: {result['blanks']}")
    lines += [
        f'load it: timm.create_model("local-dir:{result["output"]}", pretrained=True)',
        f"check it: timm-dseq verify {shlex.quote(str(result['output']))}",
    ]
    return "\n".join(lines)


def _verify(options: argparse.Namespace) -> tuple[dict, str | None]:
    from pathlib import Path

    from .hub.download import snapshot
    from .hub.verify import verify

    folder, repository = (options.source.removeprefix(prefix) for prefix in ("local-dir:", "hf-hub:"))
    if repository == options.source and (Path(folder).exists() or folder.count("/") != 1):
        checks = verify(folder)
    else:
        checks = verify(snapshot(repository), repository=repository)
    return checks, _failed(checks)


def _failed(checks: dict) -> str | None:
    """One line if any check failed."""
    failed = [name for name, check in checks.items() if not check["ok"]]
    return f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)})." if failed else None


def _show_checks(checks: dict) -> str:
    return "\n".join(f"{'ok  ' if check['ok'] else 'FAIL'}  {name}: {check['seen']}" for name, check in checks.items())


def _push(options: argparse.Namespace) -> tuple[dict, str | None]:
    from .hub.push import push

    result = push(
        options.folder,
        options.repository,
        private=options.private,
        revision=options.revision,
        dry_run=options.dry_run,
    )
    if options.dry_run:
        blanks = result["blanks"]
        return result, f"README.md has {len(blanks)} blanks: fill them in before the push." if blanks else None
    return result, _failed(result["checks"])


def _show_push(result: dict) -> str:
    done = "pushed to" if "commit" in result else "would go to"
    private = ", private" if result["private"] else ""
    lines = [f"{done} {result['repository']} ({result['revision']}{private}), in one commit:"]
    lines += [f"  {name}  {size:,} bytes" for name, size in sorted(result["files"].items())]
    lines += [f"  stays here: {name}" for name in result["left_behind"]]
    lines += [f"  blank, push will refuse it: {blank}" for blank in result["blanks"]]
    if "commit" in result:
        lines += [result["url"], _show_checks(result["checks"])]
    return "\n".join(lines)


def _explain(options: argparse.Namespace) -> tuple[dict, str | None]:
    from pathlib import Path

    import timm
    from PIL import Image

    from .explain import explain
    from .hub.stock import registered

    output = Path(options.output or f"{Path(options.image).stem}.explained.png")
    if output.is_dir() or Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{output} names no picture that can be written: give an --output that ends in .png.")
    if output.exists() and Path(options.image).exists() and output.samefile(options.image):
        raise UserError(f"{output} is the picture to explain, and would be lost: name another --output.")
    image = _photo(options.image)
    if timm.is_model(options.model) and not Path(options.model).exists():
        _check_explainable(registered(options.model).blueprint, options.model)  # before a download
    model, _ = load_backbone(options.model, random=None)
    _check_explainable(model, options.model)
    try:
        explain(model, image, query=options.query).save(output)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{output} cannot be written ({reason}): name another --output, such as a PNG.") from error
    return {"output": str(output)}, None


def _photo(path: str):
    """A file as an upright image of 8-bit RGB."""
    from .images import UnreadableImage, decode

    try:
        return decode({"bytes": None, "path": path})
    except UnreadableImage as error:
        raise UserError(f"{path} cannot be read ({error}): give a JPEG, PNG or WebP.") from error


def _check_explainable(model, name: str) -> None:
    """Refuse what has no saliency map: that of a plain ViT compares its class token with its patches."""
    from .hub.stock import check_plain_vit

    check_plain_vit(model, name)
    if model.cls_token is None:
        raise UserError(
            f"{name} has no class token, which shows where a model looks: name one that has, such as "
            "dseq_jepa_vit_b16 or vit_base_patch16_224."
        )


def _show_explain(result: dict) -> str:
    return f"drawn: {result['output']}"


if __name__ == "__main__":
    sys.exit(main())
