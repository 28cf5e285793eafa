"""Rendered text for networks that tell which way up it is: lines turned by 0 or 180 degrees, pages by 0 to 270.

Words, fonts (those that are installed), sizes, colours, noise and blur are drawn at random from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from se_prune.data import DataSource
from se_prune.data.batches import TensorImages

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "C:/Windows/Fonts")
TEXT = Path(__file__).parent.parent.parent / "LICENSE"
LINE_SIZE, PAGE_SIZE, SHORT_SIDE = (48, 192), (224, 224), 256
Colour = tuple[int, int, int]


def fonts() -> list[str]:
    """Return the text fonts that are installed, in a fixed order."""
    files = [file for folder in FONT_FOLDERS if Path(folder).is_dir() for file in Path(folder).rglob("*.ttf")]
    named = sorted((file.name, str(file)) for file in files)
    families = ("DejaVu", "Liberation", "Noto", "Arial", "Times", "Georgia", "Verdana")
    return [path for name, path in named if name.startswith(families) and "Math" not in name]


def words() -> list[str]:
    """Return the words of the licence, which stays as it is."""
    text = TEXT.read_text(encoding="utf-8")
    plain = [word.strip("`*|()[],.:;") for word in text.split()]
    return [word for word in plain if word.isascii() and 2 < len(word) < 15 and word.isalnum()]


def _colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Return paper and ink: dark on light, and light on dark in every fifth image."""
    light = tuple(rng.randint(180, 255) for _ in range(3))
    dark = tuple(rng.randint(0, 90) for _ in range(3))
    return (light, dark) if rng.random() < 0.8 else (dark, light)  # type: ignore[return-value]


def _worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add blur and noise, as a camera would."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    pixels = np.asarray(image, dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 10), pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def _upright_line(rng: random.Random, fonts: Sequence[str], words: Sequence[str]) -> Image.Image:
    font = ImageFont.truetype(rng.choice(fonts), rng.randint(24, 44))
    text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 3)))
    left, top, right, bottom = font.getbbox(text)
    paper, ink = _colours(rng)
    edge = [rng.randint(1, 8) for _ in range(4)]
    size = (int(right - left) + edge[0] + edge[1], int(bottom - top) + edge[2] + edge[3])
    image = Image.new("RGB", size, paper)
    ImageDraw.Draw(image).text((edge[0] - left, edge[2] - top), text, font=font, fill=ink)
    return image


def line(rng: random.Random, turns: int, fonts: Sequence[str], words: Sequence[str]) -> Image.Image:
    """Return a cropped line of text, turned by `turns` × 180 degrees, at the left of a grey strip."""
    height, width = LINE_SIZE
    image = _worn(_upright_line(rng, fonts, words), rng).rotate(180 * turns)
    image = image.resize((min(width, max(1, round(height * image.width / image.height))), height))
    strip = Image.new("RGB", (width, height), (128, 128, 128))
    strip.paste(image, (0, 0))
    return strip


def page(rng: random.Random, turns: int, fonts: Sequence[str], words: Sequence[str]) -> Image.Image:
    """Return the middle of a page of text that is turned by `turns` × 90 degrees clockwise."""
    width, height = rng.choice([(480, 640), (560, 560), (640, 480)])
    paper, ink = _colours(rng)
    image = Image.new("RGB", (width, height), paper)
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(rng.choice(fonts), rng.randint(16, 34))
    left, y = rng.randint(10, 50), rng.randint(10, 50)
    while y < height - 30:
        text, limit = "", width - left - (10 if rng.random() < 0.8 else width // 2)
        while True:
            longer = f"{text} {rng.choice(words)}".strip()
            if font.getlength(longer) > limit:
                break
            text = longer
        draw.text((left, y), text, font=font, fill=ink)
        y += round(font.size * rng.uniform(1.2, 1.8))
    image = _worn(image, rng).rotate(-90 * turns, expand=True)
    scale = SHORT_SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    x, top = (image.width - PAGE_SIZE[1]) // 2, (image.height - PAGE_SIZE[0]) // 2
    return image.crop((x, top, x + PAGE_SIZE[1], top + PAGE_SIZE[0]))


Render = Callable[[random.Random, int, Sequence[str], Sequence[str]], Image.Image]


def rendered(name: str, render: Render, classes: Sequence[str], train: int, test: int) -> DataSource:
    """Return images of every class in turn; the test images have words and seeds of their own."""
    known, vocabulary = fonts(), words()
    half = len(vocabulary) // 2
    parts = []
    for seed, count, some in ((0, train, vocabulary[:half]), (1, test, vocabulary[half:])):
        rng = random.Random(seed)  # noqa: S311 - the same images each time, no secrets
        images = [np.asarray(render(rng, i % len(classes), known, some)) for i in range(count)]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        parts.append(TensorImages(images=pixels, labels=torch.arange(count) % len(classes)))
    return DataSource(ref=name, classes=tuple(classes), train=parts[0], test=parts[1])
