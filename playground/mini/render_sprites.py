"""Renders the sprite sheet from Noto Color Emoji. Needed only to change the sheet, which is kept in the repository.

apt-get install fonts-noto-color-emoji
python -m playground.mini.render_sprites
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava.command import command_parser
from playground.mini.sprites import ASSETS, SHEET, SHEET_INDEX

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font's bitmaps
CELL_PX = 96
COLUMNS = 17
PALETTE_SIZE = 64  # colours of one sprite; keeps the sheet under 2 MiB without visible loss
NAMES = ASSETS / "sprite_names.csv"


def render_sprite(codepoint: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji, cut to its visible part and scaled so that its longer side is `CELL_PX` (RGBA)."""
    glyph = Image.new("RGBA", (FONT_SIZE * 2, FONT_SIZE * 2))
    ImageDraw.Draw(glyph).text((0, 0), chr(int(codepoint, 16)), font=font, embedded_color=True)
    box = glyph.getbbox()
    if box is None:
        raise ValueError(f"{NAMES}: the font has no picture for U+{codepoint}; remove the row or use a newer font")
    glyph = glyph.crop(box)
    scale = CELL_PX / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    return _few_colours(glyph.resize(size, Image.Resampling.LANCZOS))


def _few_colours(sprite: Image.Image) -> Image.Image:
    """The sprite with `PALETTE_SIZE` colours and 16 levels of alpha."""
    alpha = sprite.getchannel("A").point(lambda value: 0 if value < 12 else 255 if value > 243 else value // 16 * 17)
    colours = sprite.convert("RGB").quantize(PALETTE_SIZE, dither=Image.Dither.NONE).convert("RGB")
    colours.putalpha(alpha)
    transparent = Image.new("RGBA", sprite.size)
    return Image.composite(colours, transparent, alpha.point(lambda value: 255 if value else 0))


def render_sheet(font_path: Path) -> None:
    """Writes `sprites.png` and `sprites.json` from the table of names."""
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    with NAMES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    sheet = Image.new("RGBA", (COLUMNS * CELL_PX, -(-len(rows) // COLUMNS) * CELL_PX))
    sprites = []
    for index, row in enumerate(rows):
        sprite = render_sprite(row["codepoint"], font)
        left, top = index % COLUMNS * CELL_PX, index // COLUMNS * CELL_PX
        sheet.paste(sprite, (left, top))
        sprites.append(
            {
                "name": row["name"],
                "article": row["article"],
                "plural": row["plural"],
                "category": row["category"],
                "habitat": row["habitat"],
                "tokens": int(row["tokens"]),
                "simple": row["simple"] == "1",
                "codepoint": f"U+{row['codepoint']}",
                "box_xyxy_px": [left, top, left + sprite.width, top + sprite.height],
            }
        )
    sheet.save(SHEET, optimize=True)
    lines = ",\n".join(json.dumps(sprite) for sprite in sprites)
    SHEET_INDEX.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("playground.mini.render_sprites", __doc__)
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: %(default)s)")
    font = parser.parse_args(argv).font
    if not font.is_file():
        parser.error(f"{font} does not exist. Run `apt-get install fonts-noto-color-emoji` or pass --font.")
    render_sheet(font)
    print(f"{SHEET}: {SHEET.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
