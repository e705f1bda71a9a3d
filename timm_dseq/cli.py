"""The `timm-dseq` command: models, convert, verify, push, explain.

Exit codes: 0 done, 1 something the message names is wrong, 2 the command was not understood.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from . import __version__
from .errors import UserError
from .hub.load import NAMES, load_backbone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        _refuse_empty(options)
        result, fault = options.run(options)
    except UserError as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        print(f"timm-dseq {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"timm-dseq {options.command}: stopped", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2) if options.json else options.show(result))
    if fault:
        print(f"timm-dseq {options.command}: {fault}", file=sys.stderr)
    return 1 if fault else 0


def _refuse_empty(options: argparse.Namespace) -> None:
    empty = next((name for name, value in vars(options).items() if value == ""), None)
    if empty:
        raise UserError(f"The {empty} given is empty: is a variable of your shell not set?")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="timm-dseq",
        description="DSeq-JEPA backbones: see them, make Hub-ready folders of checkpoints, check and publish these.",
        epilog='In Python: import timm_dseq, timm; timm.create_model("dseq_jepa_vit_b16")',
    )
    parser.add_argument("--version", action="version", version=f"timm-dseq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, show, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(run=run, show=show)
        return sub

    command("models", _models, _show_models, "list the backbones: size, cost, weights published or cached here")

    sub = command("convert", _convert, _show_convert, "make a Hub-ready folder of a checkpoint")
    sub.add_argument("source", metavar="SRC", help="our training checkpoint, Meta's I-JEPA, the authors', any timm ViT")
    sub.add_argument("-o", "--output", metavar="DIR", help="folder to write (default: ./MODEL.TAG)")
    sub.add_argument("--encoder", choices=("target", "student"), default="target", help="default: target")
    sub.add_argument("--model", metavar="NAME[.TAG]", help="what it is, where the file cannot tell")
    sub.add_argument("--img-size", type=int, nargs=2, metavar=("H", "W"), help="resample the positions to this size")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    sub.add_argument("--license", metavar="ID", help="licence of the weights, as the Hub writes it")
    sub.add_argument("--with-pretraining-state", action="store_true", help="also student and predictor, to train on")

    sub = command("verify", _verify, _show_checks, "load a folder or repository in every way, and compare the outputs")
    sub.add_argument("source", metavar="DIR|REPO", help="a Hub-ready folder, or ORGANISATION/NAME[@REVISION]")

    sub = command("push", _push, _show_push, "publish a Hub-ready folder in one commit, and load it back")
    sub.add_argument("folder", metavar="DIR")
    sub.add_argument("repository", metavar="REPO", nargs="?", help="default: $TIMM_DSEQ_NAMESPACE/MODEL.TAG")
    sub.add_argument("--private", action="store_true", help="create it private")
    sub.add_argument("--revision", metavar="BRANCH", help="default: main")
    sub.add_argument("--dry-run", action="store_true", help="show what would go, send nothing")

    sub = command("explain", _explain, _show_explain, "draw where a model looks, its ranked regions and their sequence")
    sub.add_argument("image", metavar="IMAGE")
    sub.add_argument("--model", required=True, metavar="NAME", help=NAMES)
    sub.add_argument("-o", "--output", "--out", metavar="PNG", help="default: IMAGE's name, with .explained.png")
    return parser


def _models(options: argparse.Namespace) -> tuple[list[dict], str | None]:
    import huggingface_hub

    from .dseq_jepa import ARCHITECTURES, default_cfgs, namespace
    from .hub.stock import macs, registered

    namespace()  # a wrong one hides what is published

    def cached(repository: str | None) -> bool:
        if not repository:
            return False
        repo_id, _, revision = repository.partition("@")
        found = huggingface_hub.try_to_load_from_cache(repo_id, "model.safetensors", revision=revision or None)
        return isinstance(found, str)

    rows = []
    for name in ARCHITECTURES:
        model = registered(name).blueprint
        rows.append(
            {
                "model": name,
                "image": list(registered(name).img_size),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "macs": macs(model),
                "weights": {
                    tag: {"published": cfg.hf_hub_id, "cached": cached(cfg.hf_hub_id)}
                    for tag, cfg in default_cfgs[name].cfgs.items()
                },
            }
        )
    return rows, None


def _show_models(rows: list[dict]) -> str:
    lines = [f"{'model':24}{'image':>10}{'params':>10}{'GMACs':>9}  weights"]
    for row in rows:
        published = [
            f"{tag} ({'cached' if state['cached'] else state['published']})"
            for tag, state in row["weights"].items()
            if state["published"]
        ]
        lines.append(
            f"{row['model']:24}{'×'.join(map(str, row['image'])):>10}{row['parameters'] / 1e6:>8.1f} M"
            f"{row['macs'] / 1e9:>9.2f}  {', '.join(published) or 'none published'}"
        )
    tags = ", ".join(rows[0]["weights"])
    return "\n".join([*lines, "", f"tags: {tags}", "import timm_dseq before timm.create_model(NAME)"])


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
    if result["left_out"]:
        lines.append(f"left out: {', '.join(result['left_out'])}")
    if result["blanks"]:
        lines.append(f"blanks to fill in {result['output']}/README.md before a push: {result['blanks']}")
    lines += [
        f'load it: timm.create_model("local-dir:{result["output"]}", pretrained=True)',
        f"check it: timm-dseq verify {result['output']}",
    ]
    return "\n".join(lines)


def _verify(options: argparse.Namespace) -> tuple[dict, str | None]:
    from pathlib import Path

    from .hub.download import snapshot
    from .hub.verify import verify

    if Path(options.source).exists() or options.source.count("/") != 1:
        checks = verify(options.source)
    else:
        checks = verify(snapshot(options.source), repository=options.source)
    return checks, _failed(checks)


def _failed(checks: dict) -> str | None:
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

    from PIL import Image, UnidentifiedImageError
    from timm.models import VisionTransformer

    from .explain import explain

    output = Path(options.output or Path(options.image).with_suffix(".explained.png").name)
    if output.is_dir() or Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{output} names no picture that can be written: give an --output that ends in .png.")
    try:
        image = Image.open(options.image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{options.image} is no image that can be read: give a JPEG, PNG or WebP.") from error
    except OSError as error:
        raise UserError(f"{options.image} cannot be opened ({error.strerror or error}): check the file.") from error
    model, _ = load_backbone(options.model, random=None)
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{options.model} is a {type(model).__name__}: only plain ViTs with a class token are explained."
        )
    try:
        explain(model, image).save(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): name another --output.") from error
    return {"output": str(output)}, None


def _show_explain(result: dict) -> str:
    return f"drawn: {result['output']}"


if __name__ == "__main__":
    sys.exit(main())
