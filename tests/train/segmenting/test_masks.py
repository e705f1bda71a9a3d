"""Masks of every kind: ids come out as they were stored, and what tells no classes is refused in one line."""

import io

import numpy as np
import pytest
from common.segmenting.masks import read_ids
from PIL import Image

from timm_dseq.images import UnreadableImage


def encoded(picture: Image.Image, kind: str = "PNG") -> dict:
    file = io.BytesIO()
    picture.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


IDS = np.array([[0, 1, 7], [200, 254, 255]], np.uint8)


def palette() -> Image.Image:
    """Indices whose colours say something else; two are of the same colour."""
    picture = Image.fromarray(IDS)
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette([255 - index // 2 for index in range(256) for _ in range(3)])
    return picture


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        (encoded(Image.fromarray(IDS)), IDS),
        (Image.fromarray(IDS), IDS),
        (encoded(palette()), IDS),
        (encoded(Image.fromarray(IDS.astype(np.uint16) * 257)), IDS.astype(int) * 257),
        (encoded(Image.fromarray(IDS.astype(np.uint16) * 257), "TIFF"), IDS.astype(int) * 257),
        (encoded(Image.fromarray(IDS.astype(np.int32) * 200), "TIFF"), IDS.astype(int) * 200),
        (encoded(Image.fromarray(IDS > 100)), (IDS > 100).astype(int)),
    ],
    ids=["grey", "open", "palette", "16 bits", "16 bits, tiff", "32 bits, tiff", "1 bit"],
)
def test_ids_are_read_as_they_were_stored(value, ids):
    assert read_ids(value).tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (encoded(palette().convert("RGB")), "a mask in colours (RGB) does not tell its classes"),
        (encoded(palette().convert("RGBA")), "a mask in colours (RGBA)"),
        (encoded(Image.fromarray(IDS).convert("LA")), "a mask in colours (LA)"),
        (encoded(Image.fromarray(IDS), "JPEG"), "a JPEG does not keep ids"),
        (encoded(Image.fromarray(IDS.astype(np.int32) * 300), "TIFF"), "its ids go from 0 to 76500"),
        (encoded(Image.fromarray(-IDS.astype(np.int32)), "TIFF"), "its ids go from -255 to 0"),
        (encoded(Image.fromarray(IDS.astype(np.float32)), "TIFF"), "a mask in colours (F)"),
        ({"bytes": b"no mask", "path": None}, "UnidentifiedImageError"),
        (None, "there is no image"),
    ],
)
def test_what_tells_no_classes_is_refused(value, says):
    with pytest.raises(UnreadableImage) as error:
        read_ids(value)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
