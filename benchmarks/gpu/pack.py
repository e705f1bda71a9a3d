"""Images → a folder small enough to be copied to a machine at once: WebP in Parquet, with a list of SHA-256.

    python benchmarks/gpu/pack.py PHOTOS/train-*.parquet --out pack               # three copies of at most 45 MiB
    python benchmarks/gpu/pack.py PHOTOS/train-*.parquet --out pack --parts 1     # one, of poorer pictures
    python benchmarks/gpu/pack.py --check pack                                    # on the other side

Each part is `part-N/train-N.parquet` with its manifest. Copied into one folder, whatever its name, they are a data set:
`--data.path FOLDER`. Images stay as they are where they fit; else the quality is the best at which they will, as far as
some of them tell.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from parts import PartsError, check, digest
from PIL import Image

QUALITIES = (None, 80, 70, 60, 50, 40, 30, 20, 10)  # None: the bytes as they are
TRIED = 400  # images from which a quality's size is told
ROOM = 0.985  # of the size asked for, so that it is kept


def encoded(content: bytes, side: int, quality: int | None) -> bytes:
    """One image, its shorter side at most `side`, as WebP; without a quality as it is."""
    if quality is None:
        return content
    image = Image.open(io.BytesIO(content)).convert("RGB")
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality)
    return file.getvalue()


def images_of(paths: list[Path], column: str, every: int = 1) -> Iterator[bytes]:
    """Every `every`-th image of some Parquet files, encoded as it is."""
    number = 0
    for path in paths:
        for batch in pq.ParquetFile(path).iter_batches(1024, columns=[column]):
            for row in batch.column(0).to_pylist():
                if number % every == 0:
                    yield row["bytes"]
                number += 1


def best_quality(paths: list[Path], column: str, side: int, count: int, limit: float) -> int | None:
    """The first of QUALITIES at which `count` images stay below `limit` bytes, as far as some of them tell."""
    some = list(images_of(paths, column, max(1, count // TRIED)))
    for quality in QUALITIES:
        size = sum(len(encoded(content, side, quality)) for content in some) / len(some) * count
        if size < ROOM * limit:
            return quality
    raise PartsError(
        f"{count} images of side {side} take {size / 2**20:.0f} MiB even at quality {quality}: give a smaller --side, "
        "fewer --images, or more --parts."
    )


def pack(
    paths: list[Path], out: Path, side: int, mib: float, parts: int, images: int | None, column: str, workers: int
) -> int | None:
    """Write the parts; returns the quality."""
    for path in paths:
        if column not in (names := pq.ParquetFile(path).schema_arrow.names):
            raise PartsError(f"{path} has no column {column!r}: --column is one of {', '.join(names)}.")
    count = sum(pq.ParquetFile(path).metadata.num_rows for path in paths)
    count = min(count, images or count)
    quality = best_quality(paths, column, side, count, mib * 2**20 * parts)
    encode = partial(encoded, side=side, quality=quality)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    schema = pa.schema([("image", kind)], metadata={"huggingface": json.dumps(features)})
    with ProcessPoolExecutor(workers) as pool:
        stream = images_of(paths, column)
        for number in range(parts):
            own = count * (number + 1) // parts - count * number // parts
            folder = out / f"part-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"train-{number}.parquet"
            with pq.ParquetWriter(file, schema, compression="none") as writer:
                while own:
                    some = list(islice(stream, min(own, 2048)))
                    rows = [{"bytes": content, "path": None} for content in pool.map(encode, some, chunksize=64)]
                    writer.write_table(pa.table({"image": pa.array(rows, kind)}, schema=schema))
                    own -= len(some)
            size = file.stat().st_size
            if size > mib * 2**20:
                raise PartsError(f"{file} has {size / 2**20:.1f} MiB, more than --mib {mib:g}: give {ROOM * mib:.0f}.")
            record = {"name": file.name, "size": size, "sha256": digest(file), "of": parts, "quality": quality}
            file.with_suffix(".manifest").write_text(json.dumps(record))
            how = "as they were" if quality is None else f"side {side}, quality {quality}"
            print(f"{file}: {size / 2**20:.1f} MiB, images {how}")
    return quality


def checked(folder: Path) -> list[Path]:
    """The pack's files, all there and as they were written, wherever below `folder` they lie."""
    records = {path: json.loads(path.read_text()) for path in sorted(folder.rglob("train-*.manifest"))}
    if not records:
        raise PartsError(f"{folder} holds no pack: name the folder into which its parts were copied.")
    for path, record in records.items():
        check(path.with_name(record["name"]), record, path.parent)
    if len(records) < (wanted := max(record["of"] for record in records.values())):
        raise PartsError(f"{folder} holds {len(records)} of the pack's {wanted} parts: copy the others, too.")
    return [path.with_name(record["name"]) for path, record in records.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="Parquet files of images")
    parser.add_argument("--out", type=Path, default=Path("pack"))
    parser.add_argument("--mib", type=float, default=45, help="most MiB of a part")
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--side", type=int, default=84, help="of re-encoded images, the shorter one, in pixels")
    parser.add_argument("--images", type=int, help="only the first so many")
    parser.add_argument("--column", default="image")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="check a pack that was copied")
    args = parser.parse_args()
    try:
        if args.check:
            print(f"{len(checked(args.check))} parts, all whole")
        elif args.files:
            pack(args.files, args.out, args.side, args.mib, args.parts, args.images, args.column, args.workers)
        else:
            parser.error("name the Parquet files to pack, or a pack to --check")
    except PartsError as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
