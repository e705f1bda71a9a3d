"""Images of every kind become upright 8-bit RGB; what cannot be read is replaced, counted and named."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from common.data.decoded import Crops, collate
from common.data.framing import Framing
from common.data.scenes import LABELS, Scenes
from common.data.settings import Data
from common.data.source import open_source
from PIL import Image

from timm_dseq import UserError
from timm_dseq.engine.views.windows import cut
from timm_dseq.images import decode, measure

from .. import runs


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def two_halves(left, right, size=(64, 32)):
    """Left and right half of one colour each."""
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return image


def test_ordinary_images_keep_their_pixels():
    image = two_halves((200, 30, 30), (20, 20, 220))
    assert decode(encoded(image, "PNG")).tobytes() == image.tobytes()
    assert decode(image).tobytes() == image.tobytes()


def test_grayscale_palette_cmyk_and_transparent_images_become_rgb():
    image = two_halves((255, 255, 255), (0, 0, 0))
    kinds = {
        "gray": encoded(image.convert("L"), "PNG"),
        "bilevel": encoded(image.convert("1"), "PNG"),
        "palette": encoded(image.quantize(4), "GIF"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=95),
        "transparent": encoded(image.convert("RGBA"), "WEBP", lossless=True),
        "gray with alpha": encoded(image.convert("LA"), "PNG"),
    }
    for name, value in kinds.items():
        pixels = np.asarray(decode(value)).astype(int)
        assert pixels.shape == (32, 64, 3), name
        assert pixels[16, 10].min() > 240 and pixels[16, 50].max() < 15, name


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(4, 0)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp), "PNG"))).astype(int)
    assert pixels.shape == (4, 64, 3)
    assert abs(pixels[0, :, 0] - ramp[0] / 257).max() <= 1


def waves(width=900, height=640):
    """A smooth picture in which every place looks different."""
    x, y = np.meshgrid(np.arange(width) / 40, np.arange(height) / 55)
    levels = [np.sin(x + k) * np.cos(y * (1 + k / 3)) * 90 + 128 for k in range(3)]
    return Image.fromarray(np.stack(levels, 2).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_size_of_an_image_is_known_before_it_is_decoded(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    value = encoded(waves(64, 32), kind, exif=exif)
    image, size = measure(value)
    assert size == decode(value).size[::-1] == decode(image).size[::-1]


@pytest.mark.parametrize("size", [32, 64, 150])
def test_a_large_jpeg_is_decoded_smaller_and_the_crop_stays(size):
    crops = Crops(None, Framing(0, size, (0.3, 1.0)))
    draws = crops.draws([(0, index) for index in range(20)])
    large = encoded(waves(), "JPEG", quality=95)
    whole = decode(large)
    assert decode(large, 3.9).size == (450, 320) and decode(large, 9).size == (113, 80)
    for each in draws:
        gap = (crops.crop(large, each)["images"].int() - crops.crop(whole, each)["images"].int()).abs().float()
        assert 0 < gap.mean() < 0.6 and gap.max() < 8
    shifted = (
        (crops.crop(whole, draws[0])["images"].int() - crops.crop(whole, draws[1])["images"].int()).abs().float().mean()
    )
    assert shifted > 10  # other boxes would be seen


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_large_jpeg_that_is_turned_is_cropped_upright(orientation):
    exif, crops = Image.Exif(), Crops(None, Framing(0, 32, (0.3, 1.0)))
    exif[0x0112] = orientation
    large = encoded(waves(), "JPEG", exif=exif, quality=95)
    for draws in crops.draws([(0, index) for index in range(4)]):
        assert torch.equal(crops.crop(large, draws)["images"], crops.crop(decode(large), draws)["images"])


def test_a_crop_that_needs_all_pixels_gets_them():
    image, crops = encoded(waves(120, 100), "JPEG", quality=95), Crops(None, Framing(0, 64, (0.3, 1.0)))
    whole = decode(image)  # what is lossless now has the same pixels, and no smaller version
    for draws in crops.draws([(0, index) for index in range(20)]):
        assert torch.equal(crops.crop(image, draws)["images"], crops.crop(whole, draws)["images"])


def test_rotation_by_exif_is_undone():
    image = two_halves((255, 255, 255), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    pixels = np.asarray(decode(encoded(image, "JPEG", exif=exif, quality=95))).astype(int)
    assert pixels.shape == (64, 32, 3)
    assert pixels[10, 16].min() > 240 and pixels[50, 16].max() < 15


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    value = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(value))[8, 8].tolist() == [255, 0, 0]


@pytest.fixture
def folder(tmp_path):
    """An image folder of two classes, 12 images."""
    for index in range(12):
        path = tmp_path / "photos" / "train" / ("cat" if index % 2 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60 + index, 50), (20 * index, 99, 0)).save(path)
    return tmp_path / "photos"


def parquet_of(path, count=12, **columns):
    values = {"picture": [encoded(Image.new("RGB", (40, 40), (9 * i, 0, 0)), "PNG") for i in range(count)], **columns}
    features = datasets.Features({"picture": datasets.Image(), **{name: datasets.Value("int64") for name in columns}})
    datasets.Dataset.from_dict(values, features=features).to_parquet(path)
    return str(path)


def test_a_folder_of_images_is_a_data_set_with_classes(folder):
    source = open_source(Data(path=str(folder)))
    assert (len(source), source.classes, source.label) == (12, 2, "label")
    assert source.picture(0).mode == "RGB"
    assert sorted(source.labels(range(12)).tolist()) == [0] * 6 + [1] * 6


def test_a_parquet_file_finds_its_columns(tmp_path):
    path = parquet_of(tmp_path / "x.parquet", label=[i % 3 for i in range(12)])
    source = open_source(Data(path=path))
    assert (source.image, source.label, source.classes) == ("picture", "label", 3)
    assert source.picture(11).getpixel((3, 3)) == (99, 0, 0)


def test_a_data_set_without_labels_works(tmp_path):
    source = open_source(Data(path=parquet_of(tmp_path / "x.parquet")))
    assert source.label is None and len(source) == 12


def test_webdataset_shards_are_a_data_set(tmp_path):
    import tarfile

    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "train-0000.tar", "w") as tar:
        for index in range(5):
            for name, content in (
                (f"{index:03d}.png", encoded(Image.new("RGB", (40, 40), (index, 0, 0)), "PNG")["bytes"]),
                (f"{index:03d}.cls", str(index % 2).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = open_source(Data(path=str(tmp_path / "shards")))
    assert (len(source), source.image, source.label, source.classes) == (5, "png", "cls", 2)
    assert source.picture(4).getpixel((0, 0)) == (4, 0, 0)


def empty(tmp_path):
    return {"path": parquet_of(tmp_path / "x.parquet", count=0)}


def wrong_image(tmp_path):
    return {"path": parquet_of(tmp_path / "x.parquet"), "image": "img"}


def wrong_label(tmp_path):
    return {"path": parquet_of(tmp_path / "x.parquet"), "label": "cls"}


def no_image(tmp_path):
    datasets.Dataset.from_dict({"a": [1, 2]}).to_parquet(tmp_path / "x.parquet")
    return {"path": str(tmp_path / "x.parquet")}


def garbage(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet at all")
    return {"path": str(tmp_path / "x.parquet")}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (empty, "is empty: check data.path and data.split"),
        (wrong_image, "has no column 'img': data.image is one of picture"),
        (wrong_label, "has no column 'cls': data.label is one of picture"),
        (no_image, "has no image column: name one with data.image, of a"),
        (garbage, "cannot be opened"),
        (lambda tmp_path: {"path": str(tmp_path / "nowhere.parquet")}, "nowhere.parquet does not exist"),
        (lambda tmp_path: {"path": str(tmp_path / "nowhere")}, "nowhere does not exist"),
        (lambda tmp_path: {"path": "some/dataset"}, "some/dataset, split train, cannot be opened"),
        (lambda tmp_path: {"path": "scenes", "split": "val"}, "no split 'val'"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_named_in_one_line(settings, says, tmp_path, hub):
    with pytest.raises(UserError, match=says) as error:
        open_source(Data(**settings(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_crop_is_a_function_of_seed_epoch_and_index(folder):
    source = open_source(Data(path=str(folder)))
    crops = Crops(source, Framing(3, 32, (0.3, 1.0)))
    torch.manual_seed(0)
    first = crops[0, 5][0]["images"]
    torch.rand(7)
    assert torch.equal(first, crops[0, 5][0]["images"])
    assert first.shape == (1, 3, 32, 32) and first.dtype == torch.uint8
    scenes = Crops(open_source(Data(path="scenes")), Framing(3, 32, (0.3, 1.0)))
    assert not torch.equal(scenes[0, 5][0]["images"], scenes[1, 5][0]["images"])
    assert not torch.equal(
        scenes[0, 5][0]["images"], Crops(scenes.source, Framing(4, 32, (0.3, 1.0)))[0, 5][0]["images"]
    )


def test_the_first_of_several_views_is_the_crop_without_views_and_each_is_seen_through_its_windows():
    source = open_source(Data(path="scenes"))
    one, three = (
        Crops(source, Framing(3, 32, (0.3, 1.0), 0.5, views=views, grid=(4, 4), share=1.0))[1, 5][0] for views in (0, 3)
    )
    assert torch.equal(one["images"], three["images"]) and one.keys() == {"images"}
    assert three["pixels"].shape == (3, 3, 16 * 8, 8)
    windows = Framing(3, 32, (0.3, 1.0), views=3, grid=(4, 4), share=1.0).draw(torch.tensor([[1, 5]])).windows
    assert torch.equal(three["pixels"][:1], cut(one["images"], windows[:1], (4, 4)))
    assert not any(torch.equal(three["pixels"][i], three["pixels"][j]) for i in range(3) for j in range(i))


def test_images_smaller_than_the_crop_are_enlarged(tmp_path):
    crops = Crops(open_source(Data(path=parquet_of(tmp_path / "x.parquet"))), Framing(0, 96, (0.3, 1.0)))
    assert crops[0, 0][0]["images"].shape == (1, 3, 96, 96)


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_and_named(folder):
    broken = sorted(folder.rglob("*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    source = open_source(Data(path=str(folder)))
    crops = Crops(source, Framing(0, 32, (1.0, 1.0)))
    at = next(i for i in range(len(source)) if broken.name in source.where(i))
    pixels, sample, said = crops[2, at]
    assert sample == (2, at)
    assert len(said) == 1 and str(broken) in said[0] and f"row {at}" in said[0]
    assert torch.equal(pixels["images"][..., 16, 16], crops[2, at + 1][0]["images"][..., 16, 16])
    together, samples, broken_ones = collate([crops[2, at], crops[2, at + 1]])
    assert (
        together["images"].shape == (2, 3, 32, 32)
        and samples.tolist() == [[2, at], [2, at + 1]]
        and broken_ones == said
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_column_without_images_is_one_line(folder, tmp_path, workers):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    code, said = runs.train(tmp_path / "run", data__path=folder, watch__probe_every=0, data__workers=workers)
    (line,) = [line for line in said.splitlines() if "pretrain.py: " in line]
    assert code == 1 and "12 images in a row cannot be read, the first " in line and "Traceback" not in said, said


def test_a_run_counts_what_it_could_not_read_and_stops_above_a_rate(folder, tmp_path):
    for path in sorted(folder.rglob("*.png"))[::3]:
        path.write_bytes(b"")
    code, said = runs.train(
        tmp_path / "few", data__path=folder, optim__epochs=4, data__max_broken=0.5, watch__probe_every=0
    )
    assert code == 0, said
    assert runs.log_of(tmp_path / "few")[-1]["broken"] == 16
    assert len((tmp_path / "few" / "unreadable.txt").read_text().splitlines()) == 16
    assert said.count("an image cannot be read and is replaced by another") == 1
    code, said = runs.train(tmp_path / "many", data__path=folder, optim__epochs=40, watch__probe_every=0)
    assert code == 1
    assert "images cannot be read, more than data.max_broken=0.01: see" in said


def test_a_data_set_of_nothing_but_broken_images_ends_at_once(folder, tmp_path):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    code, said = runs.train(tmp_path / "run", data__path=folder, optim__epochs=4, watch__probe_every=0)
    assert code == 1 and "images in a row cannot be read" in said
    assert "Traceback" not in said


def test_scenes_are_always_the_same_and_their_labels_true():
    scenes = Scenes("test")
    assert scenes[3]["image"].tobytes() == Scenes("test")[3]["image"].tobytes()
    assert scenes[3]["image"].tobytes() != Scenes("train")[3]["image"].tobytes()
    found = {name: {scenes[i][name] for i in range(200)} for name in LABELS}
    assert found == {name: set(range(count)) for name, count in LABELS.items()}
    assert json.dumps({k: v for k, v in scenes[0].items() if k != "image"})


def test_a_scenes_masks_are_its_shapes_apart_from_each_other_and_lie_where_they_were_painted():
    """Patterns are of a dark and a light colour, backgrounds of two that are neither."""
    for index in range(6):
        scene, shapes = Scenes("train").drawn(index)
        assert len(shapes) == scene["count"] + 1
        assert scene["image"].tobytes() == Scenes("train")[index]["image"].tobytes()
        masks = torch.stack([torch.from_numpy(np.array(mask)) for _, mask in shapes])
        assert set(masks.unique().tolist()) == {0, 255} and ((masks > 0).sum(0) <= 1).all()
        inside = (masks > 0).any(0)
        grey = torch.from_numpy(np.array(scene["image"].convert("L"), np.float32))
        assert grey[inside].std() > 1.5 * grey[~inside].std()
