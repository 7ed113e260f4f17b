"""What the shop sells. One line a product: `name ; unit ; tags`.

`unit` is how one of it is bought ("pair of" headphones; empty: one kettle). `pl` among the tags makes the name plural;
the other tags say which problems it can have. The held-out list is used by the evaluation prompts alone.
"""

from __future__ import annotations

from dataclasses import dataclass

# The slots that agree with the product's number: one, several.
FORMS = {
    "is": ("is", "are"), "was": ("was", "were"), "has": ("has", "have"), "isnt": ("isn't", "aren't"),
    "doesnt": ("doesn't", "don't"), "it": ("it", "they"), "them": ("it", "them"), "this": ("this", "these"),
    "itis": ("it's", "they're"), "s": ("s", ""), "one": ("one", "ones"),
}  # fmt: skip


@dataclass(frozen=True)
class Product:
    name: str
    unit: str
    tags: frozenset[str]

    @property
    def plural(self) -> bool:
        return "pl" in self.tags

    def counted(self, adjective: str = "") -> str:
        """The product with its article: `a kettle`, `an iron`, `a new pair of jeans`."""
        words = " ".join(w for w in (adjective, self.unit, self.name) if w)
        vowel = words[0] in "aeiou" and not words.startswith("uku")
        return f"{'an' if vowel else 'a'} {words}"

    def slots(self) -> dict[str, str]:
        """Everything the wordings may say about the product, with the grammar of its number."""
        forms = {name: pair[self.plural] for name, pair in FORMS.items()}
        another = " ".join(w for w in ("another", self.unit, self.name) if w)
        return forms | {
            "p": self.name,
            "a": self.counted(),
            "new": self.counted("new"),
            "another": another,
        }


TRAIN_TEXT = """
kettle ; ; elec hot water hard handle colour
toaster ; ; elec hot hard colour
blender ; ; elec motor water hard parts
coffee machine ; ; elec hot water motor parts
slow cooker ; ; elec hot glass handle
air fryer ; ; elec hot hard handle parts
rice cooker ; ; elec hot glass
frying pan ; ; hard metal handle
casserole dish ; ; glass colour
knife set ; ; metal multi
teapot ; ; glass colour
wine glasses ; set of ; pl glass multi
dinner plates ; set of ; pl glass multi colour
cutlery set ; ; metal multi
headphones ; pair of ; pl elec batt bt colour hard
earbuds ; pair of ; pl elec batt bt
tablet ; ; elec batt app screen hard
laptop ; ; elec batt screen hot hard
keyboard ; ; elec bt hard
phone case ; ; colour
charger ; ; elec hot
power bank ; ; elec batt hot
smart watch ; ; elec batt bt app screen
printer ; ; elec motor app parts
webcam ; ; elec
radio ; ; elec batt
speaker ; ; elec batt bt hard colour
monitor ; ; elec screen hard
game controller ; ; elec batt bt colour
video doorbell ; ; elec batt app
electric toothbrush ; ; elec batt motor
hair dryer ; ; elec hot motor
winter coat ; ; wear fab zip colour
raincoat ; ; wear fab zip colour
jumper ; ; wear fab colour
dress ; ; wear fab zip colour
jeans ; pair of ; pl wear fab zip colour
trainers ; pair of ; pl wear colour smell
walking boots ; pair of ; pl wear smell
shirt ; ; wear fab colour
swimsuit ; ; wear fab colour
dressing gown ; ; wear fab colour
gloves ; pair of ; pl wear fab colour
leggings ; pair of ; pl wear fab colour
school shoes ; pair of ; pl wear
bookcase ; ; furn parts smell hard
desk ; ; furn parts hard
office chair ; ; furn parts wheel smell
bed frame ; ; furn parts metal
wardrobe ; ; furn parts hard smell handle
coffee table ; ; furn parts hard
bar stool ; ; furn parts metal
sofa ; ; furn fab smell colour
chest of drawers ; ; furn parts handle hard smell
shoe rack ; ; furn parts metal
mattress ; ; smell
rug ; ; fab smell colour
curtains ; pair of ; pl fab colour
duvet cover ; ; fab colour
table lamp ; ; elec hard colour
mirror ; ; glass
picture frame ; ; glass colour
cushion ; ; fab zip colour
bath towels ; set of ; pl fab multi colour
blanket ; ; fab colour smell
wall clock ; ; batt glass
vacuum cleaner ; ; elec motor wheel handle parts
iron ; ; elec hot water
fan heater ; ; elec hot motor
lawnmower ; ; motor wheel handle parts
garden hose ; ; water
garden bench ; ; furn parts metal
parasol ; ; fab colour
barbecue ; ; metal wheel parts handle
plant pots ; set of ; pl glass multi colour
hedge trimmer ; ; elec motor batt
bird feeder ; ; metal
train set ; ; parts batt
board game ; ; parts
scooter ; ; wheel parts colour
doll's house ; ; parts hard
yoga mat ; ; smell colour
tent ; ; zip parts
sleeping bag ; ; zip fab
bike helmet ; ; hard colour
rucksack ; ; zip colour
dumbbells ; pair of ; pl metal
treadmill ; ; elec motor screen parts
pushchair ; ; wheel parts
cot ; ; furn parts
dog bed ; ; fab smell
cat tree ; ; furn parts
baby monitor ; ; elec batt screen app
high chair ; ; furn parts
food hamper ; ; food
coffee beans ; bag of ; pl food
chocolates ; box of ; pl food
vitamins ; bottle of ; pl food
face cream ; jar of ; beauty
shampoo ; bottle of ; beauty
perfume ; bottle of ; beauty
sun lotion ; bottle of ; beauty
"""

HELD_OUT_TEXT = """
microwave ; ; hard
waffle maker ; ; hard
juicer ; ; hard
projector ; ; hard
e-reader ; ; small
record player ; ; hard
drone ; ; small
dishwasher ; ; big fit
dehumidifier ; ; hard
sewing machine ; ; hard
hammock ; ; soft
greenhouse ; ; big fit
wheelbarrow ; ; hard
telescope ; ; small
ukulele ; ; small
skateboard ; ; hard
suitcase ; ; hard
umbrella ; ; small
hoodie ; ; soft
cardigan ; ; soft
slippers ; pair of ; pl soft
waistcoat ; ; soft
futon ; ; big
ottoman ; ; big
trampoline ; ; big fit
kite ; ; small
snow globe ; ; small
aquarium ; ; big fit
binoculars ; pair of ; pl small
chandelier ; ; big fit
kayak ; ; big
bracelet ; ; small
fountain pen ; ; small
hot tub ; ; big fit
"""


def _parse(text: str) -> tuple[Product, ...]:
    rows = (line.split(";") for line in text.strip().splitlines())
    return tuple(Product(name.strip(), unit.strip(), frozenset(tags.split())) for name, unit, tags in rows)


TRAIN = _parse(TRAIN_TEXT)
HELD_OUT = _parse(HELD_OUT_TEXT)
