"""Draw text that comes from data: no mathematics, and fonts that have its characters."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

log = logging.getLogger(__name__)

PLACEHOLDER_FONTS = ("Last Resort",)  # these have a box for every character


@contextmanager
def plain_text(texts: Iterable[str]) -> Iterator[None]:
    """Draw text literally within this context: `$` starts no mathematics, and fonts are added for missing characters.

    Characters that no installed font has are logged with a warning. They appear as boxes.

    Args:
        texts: what the figure shows, such as the names of classes.
    """
    families = list(matplotlib.rcParams["font.family"])
    missing = {character for text in texts for character in text if character.isprintable() and not character.isspace()}
    missing -= _characters(font_manager.findfont(font_manager.FontProperties(family=families)))
    if missing:
        for font in sorted(font_manager.fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
            if font.name.startswith(PLACEHOLDER_FONTS) or not missing & (has := _characters(font.fname)):
                continue
            families.append(font.name)
            missing -= has
            if not missing:
                break
    if missing:
        log.warning("No installed font has %s, so pictures show boxes for these characters. Install a font of this script.", _list(missing))
    with matplotlib.rc_context({"text.parse_math": False, "font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Glyph .* missing|Matplotlib currently does not support)")  # the log has said so
        yield


def _characters(path: str) -> set[str]:
    return set(map(chr, FT2Font(path).get_charmap()))


def _list(characters: set[str], most: int = 10) -> str:
    first = " ".join(sorted(characters)[:most])
    return first if len(characters) <= most else f"{first} and {len(characters) - most} more"
