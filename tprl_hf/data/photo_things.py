"""The photographs of Photo-VQA: which files of which Debian packages, and what they show.

Each name is one token of SmolLM2's tokenizer with a space before it. Paths are relative to `STAMPS` and `WALLPAPERS`
below the root of an unpacked package.
"""

from dataclasses import dataclass

STAMPS = "usr/share/tuxpaint/stamps"
WALLPAPERS = "usr/share/backgrounds"
PACKAGES = ("tuxpaint-stamps-default", "lomiri-wallpapers-16.04", "mate-backgrounds")

# Photographs without a thing in the middle that a question could be about.
WALLPAPER_FILES = (
    *(
        f"{name}.jpg"
        for name in (
            "Bridge_by_Sander_Klootwijk",
            "Dragonfly_by_Bolly",
            "Picture_0B_by_freespace",
            "Picture_1A_by_freespace",
            "Wine_by_Jakkub_Mede",
            "aitzgorri_by_Aitzol_Berasategi",
            "free_by_Peter_Nerlich",
            "greentock_by_Peter_Nerlich",
            "life_by_Aitzol_Berasategi",
            "picosdeeuropa_by_Aitzol_Berasategi",
            "seeding_by_Clements_Engelhardt",
            "sunset_by_Aitzol_Berasategi",
        )
    ),
    *(f"mate/nature/{name}.jpg" for name in ("Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm", "Wood")),
)

# kind -> folder -> "name: files" of each thing; things of the kind "" have no kind to be asked about.
_TABLE: dict[str, dict[str, str]] = {
    "bird": {
        "animals/birds": "crow: crow; crane: crowned_crane; duck: drake duck; goose: gander; "
        "chicken: chicken_profile hen; penguin: little-penguin penguin magellanic_penguin; owl: owl; pigeon: pigeon; "
        "parrot: adelaide-rosella rainbow-lorikeet; turkey: turkey; gull: seagull silver-gull",
    },
    "mammal": {
        "animals/mammals": "elephant: elephant; giraffe: giraffe; pig: pig pig_golden pig_golden2; rhino: rhino_black",
        "animals/mammals/apes": "gorilla: gorilla",
        "animals/mammals/aquatic": "dolphin: dolphin; whale: whale",
        "animals/mammals/bears": "bear: bear european-bear",
        "animals/mammals/bovines": "bison: bison; bull: bull; cow: cow cow_white; goat: goat; sheep: sheep sheep_lamb",
        "animals/mammals/camel": "camel: camel dromedary",
        "animals/mammals/cats": "lion: lion lion-2; tiger: tiger tiger_sumatran",
        "animals/mammals/deer": "deer: deer doe",
        "animals/mammals/dogs": "dog: dog; fox: fox",
        "animals/mammals/equines": "donkey: donkey donkey_eating; horse: horse; zebra: zebra",
        "animals/mammals/rodents": "beaver: beaver; mouse: mouse; rabbit: rabbit-2 rabbit; squirrel: squirrel",
        "animals/marsupials": "kangaroo: kangaroo",
    },
    "fruit": {
        "food/fruit": "cherry: Cherry_Stella; strawberry: Strawberry2 strawberry; avocado: avocado; banana: banana; "
        "apple: apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty; grapes: grapes; kiwi: kiwi; "
        "lemon: lemon; orange: mandarine orange sliced_orange orange_seville; mango: mango; pear: pear; "
        "pineapple: pineapple; pomegranate: pomegranate; lime: sliced_lime",
    },
    "vegetable": {
        "food/vegetables": "broccoli: broccoli; carrot: carrot; chili: chilepepper; corn: corn; eggplant: eggplant; "
        "garlic: garlic garlics; lettuce: lettuce redlettuce; onion: onion; pepper: pepper yellowpepper; "
        "potato: potato; pumpkin: pumpkin_small; tomato: tomato",
    },
    "tool": {
        "household/tools": "hammer: hammer; saw: saw; shovel: spade; brush: paintbrush_large; tape: measuring_tape; "
        "wrench: wrench wrench_plumbers wrench_adjustable",
        "household/arttools": "scissors: scissors_small_open scissors_small_closed",
    },
    "instrument": {
        "hobbies/music/brass": "trumpet: trumpet",
        "hobbies/music/percussion": "drum: drum_tomtom_floor",
        "hobbies/music/string": "violin: violin; "
        "guitar: guitar2 guitar_classical guitar_electric guitar_electric_bass",
    },
    "vehicle": {
        "military/vehicles": "tank: bradley",
        "vehicles/auto": "car: beetle sedan sportscar2; truck: truck",
        "vehicles/flight": "balloon: balloon360",
        "vehicles/flight/planes": "airplane: 747",
        "vehicles/masstransit": "bus: green_korean_bus",
        "vehicles/ship": "boat: chineseJunk walnutBoat",
    },
    "": {
        "animals/amphibians": "frog: frog frog-1",
        "animals/fish": "lobster: lobster; shrimp: shrimp",
        "animals/insects": "bee: bee; fly: fly; moth: xanthia",
        "animals/lizards": "lizard: iguana",
        "food/nuts": "almond: almond; walnut: walnut",
        "hobbies": "camera: camera_35mm",
        "household": "bulb: Lightbulb; bin: wheelie_bin; kettle: kettle; key: key; toilet: toilet",
        "household/dishes": "glass: glass",
        "plants/flowers": "iris: iris; rose: rose",
        "plants/mushrooms": "mushroom: cep-1 cep-2 cep",
        "plants/trees": "palm: liberia-palm; tree: holm_oak",
        "seasonal": "candle: candle",
        "space": "astronaut: spacewalk",
        "space/moon": "moon: moon_full moon_crescent moon_3qt",
        "space/planets": "earth: 3_earth",
        "sports": "basketball: basketball; football: football; trophy: trophy_cup",
        "town/roadsigns": "cone: traffic_cone",
        "vehicles": "wheel: 7spoke256 wheel_tractor",
    },
}

# Never on a picture nor in a question of the splits train, validation and test.
NEW_THINGS = frozenset(
    "owl pigeon gorilla squirrel zebra mango pineapple eggplant onion hammer violin bus lobster trophy camera".split()
)
# The last picture of these things is never on a picture of those splits.
MIN_PICTURES_TO_HOLD_ONE_OUT = 3


@dataclass(frozen=True)
class Thing:
    """A name, the kind it belongs to ("" for none), and files that show it: `seen`, and `unseen` in training."""

    name: str
    kind: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...]


def _things() -> dict[str, Thing]:
    things = {}
    for kind, folders in _TABLE.items():
        for folder, listed in folders.items():
            for entry in listed.split("; "):
                name, files = entry.split(": ")
                paths = tuple(f"{STAMPS}/{folder}/{file}.png" for file in files.split())
                last = len(paths) - (len(paths) >= MIN_PICTURES_TO_HOLD_ONE_OUT)
                things[name] = Thing(name, kind, paths[:last], paths[last:])
    return things


THINGS = _things()
KINDS = tuple(kind for kind in _TABLE if kind)
PICTURE_FILES = (
    *(path for thing in THINGS.values() for path in thing.seen + thing.unseen),
    *(f"{WALLPAPERS}/{name}" for name in WALLPAPER_FILES),
)
