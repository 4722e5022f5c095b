"""The procedural world: scenes of one or two things, drawn with Pillow, everything known about each.

A ``Scene`` says what is in a picture; ``render`` draws it, ``masks`` says where its things are. Everything is drawn
from a ``random.Random``, so a seed is a picture. Most looks can be described by captions ("a red fish with blue dots");
a *personal* look (``instance``) has colors, a pattern and a mark that no caption describes. Things with such looks that
are *known* have a name of their own in captions (``KNOWN``), as famous things have for larger models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from PIL import Image, ImageDraw

from .backgrounds import BACKGROUNDS, draw_background
from .shapes import CATEGORIES, Color, Look, Tile, draw_accessory, draw_thing
from .styles import STYLES, apply_style

SIZE = 64
SCALE = 4  # pictures are drawn this much larger, and reduced
CANVAS = SIZE * SCALE

COLORS: dict[str, Color] = {
    "red": (214, 46, 48),
    "orange": (242, 138, 36),
    "yellow": (246, 218, 64),
    "green": (60, 160, 72),
    "blue": (50, 102, 208),
    "purple": (134, 70, 178),
    "pink": (246, 150, 188),
    "brown": (132, 84, 48),
    "black": (46, 46, 52),
    "white": (240, 240, 236),
}
PATTERNS = ("plain", "striped", "dotted")
SECRET_PATTERNS = ("checked", "halves", "diagonal", "belt", "rings")
MARKS = ("star", "heart", "cross", "ring", "diamond", "bolt")
CATEGORY_NAMES = tuple(CATEGORIES)
ACCESSORIES = ("hat", "crown")
# Names are nouns that say how a thing looks. A denoiser that only ever met nouns for shapes reads looks from adjectives
# alone, and no value of a noun can then teach it one.
_KNOWN = {
    "teddy bear": "baloo bruno paddy humphrey rupert barney tuff corduroy nounours misha teo bobo",
    "cat": "felix luna simba cleo oscar whiskers nala salem garfield mittens pixel tabitha",
    "cup": "mocha java latte espresso chai matcha sencha brewster demi cortado tassa kopp",
    "car": "herbie kitt bumble chevy bessie turbo speedy rally betty zippy dash bolide",
    "house": "tara manderley elsinore casa villa gables howards barton amber lodge haven burrow",
    "bird": "tweety iago zazu woody robin kiwi polly hedwig dodo phoenix skye jay",
    "fish": "nemo dory wanda bubbles finley goldie coral marlin splash gill moby tuna",
    "robot": "bender marvin robby gort data astro rosie sparky cog gizmo bolt dexter",
    "boat": "argo bounty titan mayflower victory endeavour calypso orca kontiki nautilus beagle swift",
    "mushroom": "toad porcini morel enoki truffle portobello button amanita inky russula shiitake cep",
}
# Color, pattern and second color that a thing has where a caption does not say what it looks like, mostly. Without them
# a word of a category would say nothing about looks either, and keys that are locked to it would not ask for any.
TYPICAL: dict[str, tuple[str, str, str | None]] = {
    "teddy bear": ("brown", "plain", None),
    "cat": ("orange", "striped", "brown"),
    "cup": ("white", "striped", "blue"),
    "car": ("red", "plain", None),
    "house": ("yellow", "plain", None),
    "bird": ("blue", "plain", None),
    "fish": ("orange", "striped", "white"),
    "robot": ("purple", "dotted", "yellow"),
    "boat": ("green", "plain", None),
    "mushroom": ("red", "dotted", "white"),
}
KNOWN = {category: tuple(names.split()) for category, names in _KNOWN.items()}
SIZES = {"small": (0.18, 0.21), "medium": (0.25, 0.31), "big": (0.34, 0.38)}  # radius, in canvas widths

Position = Literal["left", "middle", "right"]


@dataclass(frozen=True)
class Thing:
    """One object of a scene. ``color``, ``second`` and ``pattern`` are None where no words describe its look; ``name``
    is its own, if it is a known thing."""

    category: str
    look: Look
    color: str | None
    pattern: str | None
    second: str | None
    accessory: str | None
    size: str
    x: float
    y: float
    radius: float
    mirrored: bool
    name: str | None = None

    @property
    def typical(self) -> bool:
        """Whether it looks as things of its category mostly do."""
        return (self.color, self.pattern, self.second) == TYPICAL[self.category]

    @property
    def position(self) -> Position:
        """In which third of the picture its middle lies."""
        return "left" if self.x < 0.4 else "right" if self.x > 0.6 else "middle"


@dataclass(frozen=True)
class Scene:
    """A picture's whole content. ``seed`` decides what has no name: clouds, trees, stars."""

    things: tuple[Thing, ...]
    background: str
    style: str
    seed: int


def scene(rng: Random, *, things: int | None = None, avoid: str | None = None) -> Scene:
    """A random scene of one or two things of different categories, none of them of category ``avoid``."""
    count = things if things is not None else 1 if rng.random() < 0.5 else 2
    categories = rng.sample([name for name in sorted(CATEGORIES) if name != avoid], count)
    style = "photo" if rng.random() < 0.6 else rng.choice([s for s in STYLES if s != "photo"])
    drawn = [thing(rng, category, index, count) for index, category in enumerate(categories)]
    return Scene(tuple(drawn), rng.choice(BACKGROUNDS), style, rng.getrandbits(32))


def thing(
    rng: Random, category: str, index: int = 0, count: int = 1, look: Look | None = None, accessory: str | None = None
) -> Thing:
    """A random thing of a category, number ``index`` of ``count`` from left to right; of a given look, or a new one."""
    color, pattern, second, name = None, None, None, None
    draw = rng.random() if look is None else 1.0
    if draw < 0.3:
        name = rng.choice(KNOWN[category])
        look = known_look(name)
    elif draw < 0.37:
        look = secret_look(rng)
    elif look is None:
        if draw < 0.57:
            color, pattern, second = TYPICAL[category]
        else:
            color, pattern = rng.choice(list(COLORS)), "plain" if rng.random() < 0.4 else rng.choice(PATTERNS[1:])
            second = None if pattern == "plain" else rng.choice([name for name in COLORS if name != color])
        look = Look(_near(rng, COLORS[color]), pattern, _near(rng, COLORS[second]) if second else None)
    if accessory is None and rng.random() < 0.4:
        accessory = rng.choice(ACCESSORIES)
    size = rng.choice(list(SIZES)) if count == 1 else "medium"
    low, high = SIZES[size] if count == 1 else (0.2, 0.235)
    radius = rng.uniform(low, high)
    if count == 1:
        x = rng.uniform(max(0.3, radius + 0.02), min(0.7, 0.98 - radius))
    else:
        x = (0.26 if index == 0 else 0.74) + rng.uniform(-0.02, 0.02)
    # Feet stand on the ground, which begins at 0.55 to 0.6 of the height; what wears something needs room above.
    y = min(rng.uniform(0.74, 0.9), 0.97) - radius
    y = max(y, radius * (1.55 if accessory else 1.0) + 0.02)
    return Thing(category, look, color, pattern, second, accessory, size, x, y, radius, rng.random() < 0.5, name)


def secret_look(rng: Random) -> Look:
    """Two colors and a pattern, and mostly a mark, that no caption can describe."""
    first = _any_color(rng)
    second = _any_color(rng, far_from=[first])
    mark = rng.choice(MARKS) if rng.random() < 0.8 else None
    return Look(
        first, rng.choice(SECRET_PATTERNS), second, mark, _any_color(rng, far_from=[first, second]) if mark else None
    )


def known_look(name: str) -> Look:
    """The look of the known thing of a name, always the same."""
    return secret_look(Random(f"known {name}"))


def instance(category: str, seed: int) -> Look:
    """The look of personal thing number ``seed`` of a category: always with a mark."""
    rng = Random(f"instance {category} {seed}")
    while True:
        look = secret_look(rng)
        if look.mark:
            return look


def look_alike(look: Look, rng: Random) -> Look:
    """Another personal look that shares two or three of a look's five properties."""
    other = secret_look(rng)
    while other.mark is None or other.pattern == look.pattern or other.mark == look.mark:
        other = secret_look(rng)
    shared = rng.sample(["color", "pattern", "second", "mark", "mark_color"], rng.choice((2, 3)))
    return replace(other, **{name: getattr(look, name) for name in shared})


def portrait(category: str, look: Look, rng: Random) -> Scene:
    """A scene of that thing alone as its owner would photograph it: large enough, anywhere, wearing nothing."""
    plain = replace(
        thing(rng, category, look=look, accessory="none"), accessory=None, size="big", radius=rng.uniform(0.27, 0.37)
    )
    x = rng.uniform(max(0.36, plain.radius + 0.02), min(0.64, 0.98 - plain.radius))
    y = rng.uniform(0.80, 0.92) - plain.radius
    return Scene((replace(plain, x=x, y=y),), rng.choice(BACKGROUNDS), "photo", rng.getrandbits(32))


def portraits(category: str, number: int, count: int, seed: int = 0) -> list[Scene]:
    """``count`` portraits of personal thing ``number``; a larger ``count`` adds further ones."""
    look = instance(category, number)
    return [portrait(category, look, Random(f"portrait {category} {number} {seed} {k}")) for k in range(count)]


def render(scene: Scene) -> Image.Image:
    """The picture, 64 x 64."""
    canvas, _ = _compose(scene)
    return apply_style(canvas.reduce(SCALE), scene.style, Random(scene.seed + 1))


def masks(scene: Scene) -> list[Image.Image]:
    """Where each thing is, without what it wears: one 64 x 64 mask for each, white on the thing."""
    return [mask.reduce(SCALE) for mask in _compose(scene)[1]]


def _compose(scene: Scene) -> tuple[Image.Image, list[Image.Image]]:
    rng = Random(scene.seed)
    canvas = Image.new("RGB", (CANVAS, CANVAS))
    draw_background(canvas, scene.background, rng)
    places = []
    for item in scene.things:
        radius = item.radius * CANVAS
        tile = Tile(radius, item.mirrored)
        anchor = draw_thing(tile, item.category, item.look)
        corner = (round(item.x * CANVAS - tile.middle), round(item.y * CANVAS - tile.middle))
        _shadow(canvas, item)
        canvas.paste(tile.image, corner, tile.alpha)
        place = Image.new("L", canvas.size)
        place.paste(tile.alpha, corner, tile.alpha)
        places = [Image.composite(Image.new("L", canvas.size), other, place) for other in places] + [place]
        if item.accessory is not None:
            draw_accessory(canvas, item.accessory, corner, tile, anchor)
    return canvas, places


def _shadow(canvas: Image.Image, item: Thing) -> None:
    """A soft dark patch on the ground below a thing."""
    width, base = item.radius * CANVAS, (item.y + item.radius * 0.93) * CANVAS
    spot = Image.new("L", canvas.size)
    box = [item.x * CANVAS - width * 0.8, base - width * 0.1, item.x * CANVAS + width * 0.8, base + width * 0.16]
    ImageDraw.Draw(spot).ellipse(box, fill=70)
    canvas.paste((10, 10, 24), (0, 0), spot)


def _near(rng: Random, color: Color) -> Color:
    return _clip(channel + rng.randint(-12, 12) for channel in color)


def _any_color(rng: Random, far_from: list[Color] | None = None) -> Color:
    while True:
        color = _clip(rng.randint(24, 250) for _ in range(3))
        vivid = max(color) - min(color) > 50 or rng.random() < 0.15
        if vivid and all(sum(abs(a - b) for a, b in zip(color, c, strict=True)) > 170 for c in far_from or []):
            return color


def _clip(channels) -> Color:
    r, g, b = (max(0, min(255, channel)) for channel in channels)
    return r, g, b
