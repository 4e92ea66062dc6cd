"""Word lists from which keys and values of facts are drawn (ASCII)."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    north south east west upper lower inner outer old new first last central hidden secret quiet
    silent bright dark pale amber azure crimson scarlet golden silver copper bronze iron marble
    granite wooden stone glass ivory emerald ruby velvet frozen burning windy stormy sunny rainy
    misty snowy dusty rusty broken ancient modern royal noble humble gentle wild calm deep
    shallow narrow wide tall little great empty crowded sacred haunted lonely distant nearby
    northern southern eastern western coastal inland mossy sandy rocky grassy hollow crooked
    straight round square painted polished carved sunken floating hanging rolling sleeping
    waiting forgotten famous private public common rare plain splendid green blue red white
    black grey yellow purple orange brown spotted striped second third fourth fifth winter
    summer spring autumn morning evening midnight
    """
)

PLACES = _words(
    """
    tower harbour library garden bridge station museum cellar attic gate vault office workshop
    kitchen chapel castle cottage tavern market mill barn stable warehouse laboratory
    observatory lighthouse school hospital theatre gallery archive courtyard fountain orchard
    meadow valley river lake island mountain forest cave quarry mine tunnel canal dock pier
    ferry train wagon carriage ship submarine balloon glider hangar airfield depot factory
    foundry forge bakery brewery dairy farm ranch greenhouse vineyard pavilion palace temple
    monastery abbey cathedral fortress barracks armoury prison court parliament embassy bank
    treasury mint exchange hotel inn hostel lodge cabin tent camp bunker shelter locker cupboard
    cabinet drawer chest safe elevator staircase corridor hall ballroom studio classroom nursery
    pantry laundry garage shed arena stadium pool gymnasium clinic pharmacy post reservoir dam
    windmill beacon
    """
)

HELD_OUT_ADJECTIVES = _words(
    """
    indigo tilted thirsty mirrored lunar braided
    """
)

HELD_OUT_PLACES = _words(
    """
    citadel aquarium rooftop sawmill planetarium kiosk
    """
)
"""Key words that occur in no training task: for the evaluation with unseen phrasing."""

FIRST_NAMES = _words(
    """
    Alice Arthur Beatrice Bernard Camilla Cedric Clara Daniel Diana Edgar Edith Felix Fiona
    George Gloria Harold Helen Hugo Irene Isaac Julia Julian Katherine Kenneth Laura Leonard
    Lydia Magnus Margaret Martin Matilda Nadia Nathan Nora Oliver Olivia Oscar Paula Peter
    Philip Rachel Ralph Rebecca Robert Rosa Rupert Samuel Sarah Simon Sophia Stella Teresa
    Theodore Thomas Ursula Valerie Victor Vincent Viola Walter Wanda William Winifred Agnes
    Albert Amelia Anton Barbara Benedict Bruno Carmen Conrad Dora Edmund Elena Ernest Esther
    Frank Greta Gustav Hilda Hannah Ivan Ingrid Jacob Joanna Karl Lucy Marcus Miriam Otto
    Pauline Raymond Ruth Sylvia Tobias Vera Wallace Yvonne Zachary
    """
)

LAST_NAMES = _words(
    """
    Abbott Anderson Archer Atkins Bailey Barker Baxter Bennett Bishop Blake Bolton Bradley
    Brooks Burton Carter Chambers Clarke Collins Cooper Crawford Cross Dalton Dawson Dixon Drake
    Duncan Ellis Emerson Fairfax Fisher Fleming Foster Fowler Gardner Gibson Gordon Graham Grant
    Griffin Hammond Hardy Harper Hawkins Hayes Holland Holmes Hudson Hughes Hunter Irving
    Jennings Jordan Keller Kennedy Lambert Lawson Lindsay Marshall Mason Maxwell Mercer Miller
    Monroe Morgan Nelson Newton Norris Osborne Palmer Parker Pearce Perkins Porter Powell Quinn
    Ramsey Reynolds Richards Robson Russell Sanders Saunders Shaw Shelton Sinclair Spencer
    Stanton Stevens Sutton Tanner Thornton Tucker Turner Vaughan Vincent Wallis Walker Warren
    Watson Webster Weston Wheeler Whitaker Winslow Wright York
    """
)

CITIES = _words(
    """
    Amsterdam Athens Auckland Baghdad Bangkok Barcelona Beijing Berlin Bogota Boston Bristol
    Brussels Budapest Cairo Calcutta Cardiff Chicago Copenhagen Dallas Damascus Delhi Denver
    Dresden Dublin Edinburgh Florence Frankfurt Geneva Genoa Glasgow Hamburg Hanoi Havana
    Helsinki Houston Istanbul Jakarta Kyoto Lagos Leipzig Lima Lisbon London Lyon Madrid
    Manchester Manila Marseille Melbourne Miami Milan Montreal Moscow Munich Nairobi Naples Nice
    Osaka Oslo Oxford Palermo Paris Perth Porto Prague Quebec Rome Rotterdam Salzburg Santiago
    Seattle Seoul Seville Shanghai Singapore Stockholm Sydney Tokyo Toronto Turin Utrecht
    Valencia Venice Vienna Warsaw Zurich
    """
)

COLOURS = _words(
    """
    red blue green yellow orange purple brown black white grey pink silver gold violet turquoise
    crimson scarlet amber beige maroon ivory olive copper lavender
    """
)

OBJECTS = _words(
    """
    lantern compass telescope violin piano drum mirror candle clock necklace ring crown sword
    shield hammer ladder basket bottle teapot kettle mug plate spoon knife carpet curtain
    blanket pillow painting statue vase globe map diary letter novel dictionary camera radio
    lamp bicycle kite puppet chessboard microscope thermometer barometer anchor rope net bucket
    shovel wheelbarrow umbrella hat coat scarf glove boot suitcase trunk barrel coin medal
    trophy flute trumpet harp guitar bell whistle feather shell fossil crystal magnet battery
    typewriter calculator notebook pencil brush easel
    """
)

ANIMALS = _words(
    """
    horse donkey cow goat sheep pig dog cat rabbit mouse fox wolf bear deer squirrel hedgehog
    badger otter beaver seal whale dolphin shark salmon trout eagle hawk falcon raven crow swan
    goose duck heron stork pigeon parrot penguin turtle lizard frog toad bee butterfly spider
    camel lion tiger leopard monkey giraffe zebra panda kangaroo
    """
)

PROFESSIONS = _words(
    """
    baker carpenter dentist doctor farmer gardener lawyer librarian mechanic musician painter
    photographer pilot plumber postman professor sailor shepherd singer soldier surgeon tailor
    teacher translator waiter watchmaker blacksmith butcher chemist cook dancer diver driver
    fireman fisherman jeweller journalist judge mason miner nurse poet potter printer sculptor
    """
)

FOODS = _words(
    """
    apples bread cheese soup rice pasta mushrooms tomatoes potatoes carrots onions pears plums
    cherries grapes lemons oranges walnuts almonds honey chocolate pancakes porridge salmon
    beans lentils spinach cucumbers olives dumplings noodles pickles figs dates raspberries
    """
)

MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)

CODE_NOUNS = (
    "passkey",
    "access code",
    "secret code",
    "PIN",
    "combination",
    "password",
    "key code",
    "entry code",
    "magic number",
    "serial number",
)
