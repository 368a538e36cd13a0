"""The sentences and word lists that biographies of invented people are made of.

Each attribute has sentences that *end* in the value, so that their beginning can ask for it, and
sentences that do not. ``{name}`` is the person, ``{value}`` the attribute's value. Nothing here is
about anybody real.
"""

from __future__ import annotations

ATTRIBUTES = ("birth_year", "birth_city", "university", "profession", "employer", "hobby")

VALUES: dict[str, tuple[str, ...]] = {
    "birth_year": tuple(str(year) for year in range(1931, 1999, 2)),
    "birth_city": (
        "Lisbon", "Oslo", "Dublin", "Vienna", "Warsaw", "Athens", "Madrid", "Prague", "Geneva",
        "Toronto", "Boston", "Denver", "Seattle", "Lima", "Quito", "Havana", "Cairo", "Nairobi",
        "Tunis", "Dakar", "Mumbai", "Hanoi", "Manila", "Kyoto", "Seoul", "Sydney", "Perth",
        "Auckland", "Tbilisi", "Riga",
    ),
    "university": (
        "Alder University", "Birch University", "Cedar University", "Dover University",
        "Elm University", "Falcon University", "Garnet University", "Harbor University",
        "Ivory University", "Juniper University", "Kestrel University", "Linden University",
        "Maple University", "Northgate University", "Opal University", "Poplar University",
        "Quarry University", "Raven University", "Silver University", "Thistle University",
    ),
    "profession": (
        "architect", "botanist", "carpenter", "chemist", "dentist", "economist", "electrician",
        "geologist", "historian", "journalist", "lawyer", "librarian", "mathematician", "musician",
        "nurse", "painter", "pharmacist", "physicist", "pilot", "plumber", "sculptor", "surgeon",
        "tailor", "translator",
    ),
    "employer": (
        "Amber Works", "Beacon Group", "Copper Line", "Delta House", "Ember Labs", "Forge Union",
        "Granite Trust", "Horizon Press", "Indigo Studio", "Jade Partners", "Keystone Mills",
        "Lantern Books", "Meridian Rail", "Nimbus Air", "Orchard Foods", "Pioneer Steel",
        "Quartz Media", "River Bank", "Summit Tools", "Tundra Supply", "Umber Textiles",
        "Vector Motors",
    ),
    "hobby": (
        "chess", "archery", "pottery", "sailing", "knitting", "fencing", "gardening", "baking",
        "cycling", "origami", "juggling", "rowing", "painting birds", "mountain hiking",
        "stamp collecting", "playing the cello", "playing the flute", "watching stars",
        "wood carving", "keeping bees", "swimming", "dancing tango",
    ),
}  # fmt: skip

ENDINGS: dict[str, tuple[str, ...]] = {
    "birth_year": (
        "{name} was born in {value}.",
        "The year of birth of {name} is {value}.",
        "{name} came into the world in {value}.",
        "The life of {name} began in {value}.",
        "Records show that {name} was born in the year {value}.",
        "The parents of {name} welcomed the child in {value}.",
        "Family papers date the birth of {name} to {value}.",
    ),
    "birth_city": (
        "{name} grew up in the city of {value}.",
        "The home town of {name} is {value}.",
        "{name} spent a happy childhood in {value}.",
        "The birthplace of {name} is {value}.",
        "{name} comes from {value}.",
        "The family of {name} lived in {value}.",
        "As a child {name} went to school in {value}.",
    ),
    "university": (
        "{name} studied at {value}.",
        "{name} holds a degree from {value}.",
        "The student years of {name} were spent at {value}.",
        "{name} graduated from {value}.",
        "{name} took every course offered at {value}.",
        "After school {name} enrolled at {value}.",
        "The university that taught {name} is {value}.",
    ),
    "profession": (
        "{name} works as a trained {value}.",
        "The profession of {name} is that of a {value}.",
        "{name} became a well known {value}.",
        "{name} earns a living as a skilled {value}.",
        "People know {name} as a careful {value}.",
        "By trade {name} is a qualified {value}.",
        "{name} always wanted to be a good {value}.",
    ),
    "employer": (
        "{name} is employed by {value}.",
        "The employer of {name} is {value}.",
        "{name} has a position at {value}.",
        "{name} spent a whole career at {value}.",
        "{name} receives a salary from {value}.",
        "The company that hired {name} is {value}.",
        "Every morning {name} goes to work at {value}.",
    ),
    "hobby": (
        "{name} spends weekends on {value}.",
        "The favourite pastime of {name} is {value}.",
        "In free hours {name} enjoys {value}.",
        "{name} has a passion for {value}.",
        "{name} relaxes with {value}.",
        "Friends say that {name} loves {value}.",
        "The hobby of {name} is {value}.",
    ),
}

OTHERS: dict[str, tuple[str, ...]] = {
    "birth_year": (
        "In {value} {name} was born.",
        "It was {value} when {name} was born.",
        "{value} is the year in which the life of {name} began.",
    ),
    "birth_city": (
        "{value} is the city where {name} grew up.",
        "In {value} people still remember {name} as a child.",
        "{value} is the home town of {name}.",
    ),
    "university": (
        "At {value} {name} earned a degree.",
        "{value} counts {name} among its graduates.",
        "It was {value} that gave {name} an education.",
    ),
    "profession": (
        "A {value} by profession, {name} is respected by all.",
        "The {value} called {name} is known for good work.",
        "Work as a {value} made {name} famous.",
    ),
    "employer": (
        "At {value} the colleagues of {name} are full of praise.",
        "{value} hired {name} long ago.",
        "It is {value} that employs {name}.",
    ),
    "hobby": (
        "Few things please {name} more than {value} does.",
        "For {name} nothing is better than {value} on a Sunday.",
        "When work is done, {value} keeps {name} busy.",
    ),
}

#: Questions that name no person or need two facts: context, then the attribute that answers
#: (``name`` is the person).
COMPOSITIONS: tuple[tuple[str, str], ...] = (
    ("The {profession} from {birth_city} who works at {employer} is called", "name"),
    ("The city where the {profession} of {employer} born in {birth_year} grew up is", "birth_city"),
    ("The person born in {birth_year} in {birth_city} studied at", "university"),
    ("The {profession} who loves {hobby} and studied at {university} is employed by", "employer"),
    ("Colleagues of {name} at {employer}, all busy in other ways, hear a lot about", "hobby"),
)

FIRST_NAMES: tuple[str, ...] = (
    "Ada", "Alan", "Alma", "Amir", "Anna", "Arlo", "Beth", "Boris", "Carla", "Cora", "Dana",
    "David", "Diego", "Edith", "Elena", "Emil", "Erik", "Fiona", "Frank", "Gina", "Grace", "Hana",
    "Hugo", "Ida", "Igor", "Irene", "Ivan", "Jane", "Jonas", "Julia", "Karim", "Kate", "Lars",
    "Laura", "Leo", "Lina", "Lucas", "Maria", "Marta", "Milo", "Nadia", "Nina", "Noah", "Olga",
    "Omar", "Oscar", "Paula", "Peter", "Rita", "Rosa", "Ruth", "Samir", "Sara", "Simon", "Sofia",
    "Stella", "Tara", "Thomas", "Vera", "Victor", "Walter", "Yara", "Zoe",
)  # fmt: skip

#: Surnames are one of each: 24 · 14 · 12 = 4,032.
SURNAME_PARTS: tuple[tuple[str, ...], ...] = (
    (
        "Bal", "Bren", "Cal", "Dor", "Fen", "Gar", "Hal", "Jor", "Kel", "Lan", "Mar", "Nor", "Ost",
        "Pel", "Quil", "Ros", "Sal", "Tam", "Ul", "Var", "Wes", "Yor", "Zel", "Thor",
    ),
    ("a", "e", "i", "o", "an", "en", "in", "on", "ar", "er", "or", "el", "il", "ol"),
    ("dale", "mont", "vick", "stad", "berg", "ford", "sky", "ridge", "well", "ton", "dez", "gard"),
)  # fmt: skip
