"""Pictures of the method for one photo: the saliency map, the ranked regions, the order in which it predicts them.

Photos and pictures are PIL images.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer

from .engine.plans import Plan, plan_regions
from .engine.regions import Regions, rank_regions
from .engine.saliency import check_query, saliency_map
from .engine.vit import block_index, embed, final_norm, full_precision, grid_of
from .errors import UserError

# Of the regions, by rank: hues that the common kinds of colour blindness keep apart. REST: of the remainder.
COLOURS = [(230, 97, 0), (26, 133, 255), (0, 158, 115), (204, 61, 143), (240, 228, 66), (93, 58, 155)]
REST = (120, 124, 134)
PAPER, INK, SOFT = (255, 255, 255), (24, 26, 32), (110, 114, 124)
# Dark blue over violet and orange to pale yellow, as in the usual perceptual maps.
_HEAT = torch.tensor([[9, 6, 40], [77, 18, 104], [150, 41, 99], [221, 81, 58], [252, 155, 31], [252, 247, 174]]).float()


@torch.no_grad()
def explain(
    model: VisionTransformer,
    image: Image.Image,
    num_regions: int = 5,
    min_area: float = 0.02,
    query: str = "cls_param",
    block: int | float = 11 / 12,
    cell: int = 336,
) -> Image.Image:
    """One sheet for one photo: photo, saliency, ranked regions and patch features above; the sequence below."""
    check_query(model, query)
    x = to_tensor(model, image)
    model = model.eval()
    h, w = grid_of(model, x)
    saliency = saliency_map(model, x, query, block)
    regions = rank_regions(saliency, num_regions, min_area)
    photo = crop_like(model, image).resize((cell, round(cell * h / w)), Image.Resampling.BICUBIC)
    count = int(regions.count[0])
    plan = plan_regions(regions)
    top = [
        (photo, "photo"),
        (draw_saliency(photo, saliency[0]), f"saliency ({query}, block {block_index(model, block)})"),
        (draw_regions(photo, regions), f"{count} region{'s' * (count != 1)} and the remainder"),
        (draw_features(model, x, photo.size), "patch features, 3 principal components"),
    ]
    sheet = _sheet([top, draw_sequence(photo, plan)], photo.size)
    legend = (
        "visible: the photo · target: stripes · hidden: blank" if count else "no region stands out: nothing to predict"
    )
    ImageDraw.Draw(sheet).text((sheet.width - 18, sheet.height - 26), legend, fill=SOFT, font=_font(15), anchor="ra")
    return sheet


def to_tensor(model: VisionTransformer, image: Image.Image) -> torch.Tensor:
    """The photo as the model takes it: (1, 3, H, W)."""
    config = resolve_model_data_config(model)
    picture = crop_like(model, image)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    pixels = pixels.view(picture.height, picture.width, 3)
    pixels = (pixels - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    parameter = model.patch_embed.proj.weight
    return pixels.permute(2, 0, 1)[None].to(parameter.device, parameter.dtype)


def crop_like(model: VisionTransformer, image: Image.Image) -> Image.Image:
    """The largest centred part of the photo in the model's aspect ratio, resized to the model's image size."""
    height, width = model.patch_embed.img_size
    scale = max(width / image.width, height / image.height)
    box_w, box_h = width / scale, height / scale
    left, top = (image.width - box_w) / 2, (image.height - box_h) / 2
    box = (left, top, left + box_w, top + box_h)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box=box)


def draw_saliency(photo: Image.Image, saliency: torch.Tensor, strength: float = 0.62) -> Image.Image:
    """The map (h, w) in [0, 1] as colours over the grey photo, interpolated between patches."""
    grey = Image.fromarray((saliency.cpu() * 255).round().to(torch.uint8).numpy())
    smooth = torch.frombuffer(bytearray(grey.resize(photo.size, Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8)
    at = smooth.float() / 255 * (len(_HEAT) - 1)
    low = at.floor().clamp(max=len(_HEAT) - 2).long()
    colours = torch.lerp(_HEAT[low], _HEAT[low + 1], (at - low)[:, None]).view(photo.height, photo.width, 3)
    heat = Image.fromarray(colours.round().to(torch.uint8).numpy())
    return Image.blend(photo.convert("L").convert("RGB"), heat, strength)


def draw_regions(photo: Image.Image, regions: Regions, index: int = 0) -> Image.Image:
    """The ranked regions of one image, tinted, outlined and numbered; the remainder stays grey."""
    masks = regions.masks[index].cpu()
    picture = _tint(photo.convert("L").convert("RGB"), masks[-1], REST, 0.25)
    ranked = [(rank, mask) for rank, mask in enumerate(masks[:-1]) if mask.any()]
    for rank, mask in ranked:
        picture.paste(_tint(photo, mask, _colour(rank), 0.42), (0, 0), _stencil(mask, photo.size))
    draw = ImageDraw.Draw(picture)
    for rank, mask in ranked:
        _outline(draw, mask, photo.size, _colour(rank))
    for rank, mask in ranked:
        _badge(draw, mask, photo.size, str(rank + 1), _colour(rank))
    if masks[-1].any() and ranked:
        _badge(draw, masks[-1], photo.size, str(len(ranked) + 1), REST)
    return picture


def draw_sequence(photo: Image.Image, plan: Plan, image: int = 0) -> list[tuple[Image.Image, str]]:
    """One captioned picture for each step: visible patches as in the photo, the target striped, the rest blank."""
    of_image = plan.context_image[plan.target_context] == image
    contexts, targets = plan.visible()[of_image].cpu(), plan.targets[of_image].cpu()
    step = plan.step[of_image].tolist()
    h, w = _grid_for(contexts.shape[1], photo.size)
    pictures = []
    for k, visible, target in zip(step, contexts.view(-1, h, w), targets.view(-1, h, w), strict=True):
        picture = Image.new("RGB", photo.size, (232, 233, 237))
        picture.paste(photo, (0, 0), _stencil(visible, photo.size))
        last = k == max(step)
        colour = REST if last else _colour(k)
        picture.paste(_stripes(photo.size, colour), (0, 0), _stencil(target, photo.size))
        draw = ImageDraw.Draw(picture)
        _outline(draw, target, photo.size, colour)
        _badge(draw, target, photo.size, str(k + 1), colour)
        before = " + ".join(str(i) for i in range(1, k + 1))
        pictures.append((picture, f"step {k}: from {before} predict {k + 1}{' (remainder)' * last}"))
    return pictures


@torch.no_grad()
def draw_features(model: VisionTransformer, x: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """The last block's patch features of one image (1, 3, H, W): their first three principal components as colours."""
    h, w = grid_of(model, x)
    tokens = embed(model, x)
    for block in model.blocks:
        tokens = block(tokens)
    patches = full_precision(final_norm(model)(tokens))[0, model.num_prefix_tokens :]
    if not patches.isfinite().all():
        raise UserError("The model's features are not finite: its weights hold NaN or infinity, check the checkpoint.")
    centred = patches - patches.mean(0)
    u, s, _ = torch.linalg.svd(centred.cpu(), full_matrices=False)
    parts = u[:, :3] * s[:3]
    # the sign of a component is arbitrary: make the border dark on average, so that what differs from it is bright
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    parts = parts * torch.where(parts[border.flatten()].mean(0) > 0, -1.0, 1.0)
    low, high = parts.quantile(0.02, dim=0), parts.quantile(0.98, dim=0)
    parts = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    picture = Image.fromarray((parts.view(h, w, 3) * 255).round().to(torch.uint8).numpy())
    return picture.resize(size, Image.Resampling.BICUBIC)


def _colour(rank: int) -> tuple[int, int, int]:
    return COLOURS[rank % len(COLOURS)]


def _grid_for(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many patches on a picture of this shape."""
    return min(
        ((h, patches // h) for h in range(1, patches + 1) if patches % h == 0),
        key=lambda grid: abs(grid[1] / grid[0] - size[0] / size[1]),
    )


def _stencil(mask: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray((mask * 255).to(torch.uint8).numpy()).resize(size, Image.Resampling.NEAREST)


def _tint(photo: Image.Image, mask: torch.Tensor, colour: tuple[int, int, int], strength: float) -> Image.Image:
    tinted = Image.blend(photo, Image.new("RGB", photo.size, colour), strength)
    return Image.composite(tinted, photo, _stencil(mask, photo.size))


def _stripes(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    """Diagonal stripes of a colour and its paler self."""
    pale = tuple(round(c + (255 - c) * 0.35) for c in colour)
    picture = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(picture)
    for x in range(-size[1], size[0] + size[1], 18):
        draw.line([(x, size[1]), (x + size[1], 0)], fill=pale, width=6)
    return picture


def _outline(
    draw: ImageDraw.ImageDraw, mask: torch.Tensor, size: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """A line along the border of a mask, patch by patch."""
    h, w = mask.shape
    inside = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    xs = [round(size[0] * j / w) for j in range(w + 1)]
    ys = [round(size[1] * i / h) for i in range(h + 1)]
    for i, j in mask.nonzero().tolist():
        left, right, top, bottom = xs[j], xs[j + 1] - 1, ys[i], ys[i + 1] - 1
        for (di, dj), line in {
            (-1, 0): [(left, top), (right, top)],
            (1, 0): [(left, bottom), (right, bottom)],
            (0, -1): [(left, top), (left, bottom)],
            (0, 1): [(right, top), (right, bottom)],
        }.items():
            if not inside[i + 1 + di, j + 1 + dj]:
                draw.line(line, fill=colour, width=3)


def _badge(
    draw: ImageDraw.ImageDraw, mask: torch.Tensor, size: tuple[int, int], text: str, colour: tuple[int, int, int]
) -> None:
    """A numbered disc on the patch of the mask that lies deepest inside it."""
    h, w = mask.shape
    depth = inside = torch.nn.functional.pad(mask.float(), (1, 1, 1, 1))[None, None]
    for _ in range(max(h, w) // 2):
        inside = -torch.nn.functional.max_pool2d(-inside, 3, 1, 1)
        depth = depth + inside
    depth = depth[0, 0, 1:-1, 1:-1]
    rows, columns = torch.arange(h)[:, None] / h - 0.5, torch.arange(w)[None] / w - 0.5
    at = (depth - 0.1 * (rows.square() + columns.square())).argmax().item()  # of equals, the nearest to the centre
    radius = max(11, min(size) // 22)
    places = size[0] * (at % w + 0.5) / w, size[1] * (at // w + 0.5) / h
    x, y = (min(max(place, radius), side - 1 - radius) for place, side in zip(places, size, strict=True))  # whole
    draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour, outline=PAPER, width=2)
    light = sum(c * k for c, k in zip(colour, (0.299, 0.587, 0.114), strict=True)) > 170
    draw.text((x, y), text, fill=INK if light else PAPER, font=_font(round(radius * 1.25)), anchor="mm")


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _sheet(rows: list[list[tuple[Image.Image, str]]], size: tuple[int, int]) -> Image.Image:
    """Rows of captioned pictures on white."""
    gap, caption = 18, 34
    width = gap + max(len(row) for row in rows) * (size[0] + gap)
    rows = [row for row in rows if row]
    sheet = Image.new("RGB", (width, gap + len(rows) * (size[1] + caption + gap // 2) + 22), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = gap + i * (size[1] + caption + gap // 2)
        for j, (picture, text) in enumerate(row):
            x = gap + j * (size[0] + gap)
            sheet.paste(picture, (x, y))
            draw.text((x, y + size[1] + 7), text, fill=INK if i == 0 else SOFT, font=_font(17))
    return sheet
