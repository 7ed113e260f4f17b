"""Problem kinds: the wrong thing, or the right thing badly made."""

from __future__ import annotations

from .kinds import Problem

PROBLEMS = (
    Problem(
        "wrong_colour", "colour", "yes",
        says=(
            "I chose the {p} in {col} and got {col2}.",
            "The {p} I received {is} {col2}. The picture online is clearly {col}.",
            "{Col}, I said. {Col}! So why {is} my {p} {col2}?",
            "{p} wrong colour, ordered {col} not {col2}",
            "Lovely {p}, only {itis} {col2} and everything else in the [room|house|set] is {col}.",
        ),
        about=("the wrong colour", "the colour mix-up", "the {col2} {p}"),
        that=("your {p} came in {col2}", "we picked the wrong colour"),
        feels=(
            "You chose {col} for a reason, so I understand your disappointment",
            "I can see how annoying it is to unwrap {col2} when you ordered {col}",
        ),
        steps=(
            "please reply with your order number so I can post the {col} {one}",
            "I can swap {them} for {col} on {day2} if you confirm your address",
            "could you send a photo of the label so I can fix the stock error?",
            "I've put the {col} {one} in tonight's post with a prepaid label for the other",
            "please take the {p} to any store and the desk will exchange {them} for {col}",
        ),
    ),
    Problem(
        "wrong_size", "wear", "yes",
        says=(
            "The {p} {is} [far|much|way] too [small|tight|big|short]. I went by your size chart.",
            "I ordered a [medium|size 12|large] and the {p} fit{s} like [a child's|a tent|two sizes down].",
            "The label says [14|large|10] but {this} {p} {is} nothing like my other [14|large|10] ones from you.",
            "{p} dont fit, whats the exchange process",
            "I measured twice before buying the {p}, and I still can't [get into {them}|do {them} up].",
        ),
        about=("the poor fit", "the size chart letting you down", "the trouble with the size"),
        that=("the {p} {doesnt} fit", "our size chart misled you"),
        feels=(
            "I understand how disappointing it is when something new won't fit",
            "Thank you for measuring first; our chart should have been right",
        ),
        steps=(
            "please reply with the size you need and I'll reserve it today",
            "I can send the next size by tracked post if you confirm your address",
            "could you measure something similar that fits you well and send me the figures?",
            "I've emailed a prepaid exchange label; please write the new size on the slip",
            "please take the {p} to your nearest store, where the desk will swap the size",
        ),
    ),
    Problem(
        "broken_glass", "glass", "yes",
        says=(
            "My {p} arrived [smashed|in pieces|cracked right through].",
            "Opened the box and heard tinkling. The {p} {is} [in bits|broken|shattered].",
            "There's a [chip on the rim|long crack|piece missing] on the {p}, and sharp bits in the "
            "wrapping. I've cut my [thumb|finger].",
            "{p} smashed in post, one thin sheet of bubble wrap, what did you expect",
            "The {p} I bought for {who} broke in the post. The party is on {day}.",
        ),
        about=("the broken {p}", "the breakage", "the sad state of your {p}"),
        that=("your {p} arrived broken", "our packing didn't protect your {p}"),
        feels=(
            "What a horrible thing to unwrap, and I apologise for the poor packing",
            "I understand how upsetting it is to open a box of broken pieces",
        ),
        steps=(
            "please send a photo of the pieces so I can post {another} today",
            "I can have {new} with you by {day2} if you reply with your order number",
            "could you send a picture of the packing so I can refund you without a return?",
            "I've ordered {new} in a double box; please put the broken pieces safely in the bin",
            "I will refund {them} to your card today, so please throw the pieces away safely",
        ),
    ),
    Problem(
        "scratched", "hard", "yes",
        says=(
            "My {p} came with [a deep scratch|scratches|a dent] [on the front|down one side|right across the top].",
            "There's [a dent|an ugly scratch] on the {p}. I'd hardly notice on an old one, but {this} {is} new!",
            "I've just unwrapped the {p} and the finish is [scuffed|peeling at the corner|marked].",
            "scratch on my brand new {p}, about 10cm, see pic",
            "Would you keep {a} with a scratch [that long|like a lightning bolt]? [I wouldn't.|Neither will I.]",
        ),
        about=("the scratch", "the mark on your {p}", "the damaged finish"),
        that=("your {p} arrived marked", "your brand new {p} {has} a scratch"),
        feels=(
            "New should look new, and I understand your disappointment",
            "I can see why a mark on a new {p} is annoying",
        ),
        steps=(
            "please send a photo of the mark so I can offer a swap or a part refund",
            "I can refund a fifth of the price to your card today if you prefer to keep {them}",
            "could you reply with the order number so I can post {another}?",
            "I've booked a courier to bring {another} on {day2} and take the marked {one}",
            "please take a picture of the label on the box so I can check the batch",
        ),
    ),
    Problem(
        "missing_part", "parts", "yes",
        says=(
            "There's [a bag of screws|one small part|part C] missing from my {p}.",
            "I've spent [two hours|all morning] on the {p} and the last piece [isn't there|is not in the box].",
            "The instructions for the {p} show [eight|twelve|six] pieces. I count [seven|eleven|five].",
            "{p} parts missing, cant finish, whole lot in bits on the floor",
            "I'm one [piece|part|bolt] short. Can you send it without making me return the whole {p}?",
        ),
        about=("the missing part", "the incomplete set", "the gap in the parts for your {p}"),
        that=("a part was missing from your {p}", "you couldn't finish your {p}"),
        feels=(
            "Getting nearly to the end and finding a piece missing is maddening, and I apologise",
            "Thank you for counting the pieces; I understand how annoying that is",
        ),
        steps=(
            "please send me the letter of the missing part from page two so I can post it",
            "I can post a complete parts bag today if you confirm your address",
            "could you send a photo of the parts laid out so I can see which one is missing?",
            "I've put the spare part in tonight's post, and it should land by {day2}",
            "please reply with the order number and the part number printed in the booklet",
        ),
    ),
    Problem(
        "wobbly", "furn", "yes",
        says=(
            "The {p} wobble{s} however hard I tighten [the bolts|everything]. One leg seems short.",
            "I've built the {p} exactly as shown and {it} lean{s} to the [left|right].",
            "The holes on the {p} don't line up. [I am no beginner.|My husband is a joiner and even he gave up.]",
            "{p} wonky, holes drilled in wrong place",
            "Is there a knack to putting {this} {p} together? [Step seven|Page five] makes no sense at all.",
        ),
        about=("the wobble", "the badly drilled holes", "the struggle with your {p}"),
        that=("your {p} won't stand straight", "building your {p} was such a struggle"),
        feels=(
            "After an afternoon of building, a wobble is the last thing you want, and I apologise",
            "I understand how frustrating it is when the pieces don't line up",
        ),
        steps=(
            "please loosen all the bolts half a turn, stand the {p} on a flat floor and tighten them again",
            "could you send a photo of the joint so I can post the right panel?",
            "I can send a new leg set today if you reply with the order number",
            "I've emailed a link to the assembly video; please check step seven first",
            "please send a picture of the holes so I can order a replacement panel",
        ),
    ),
    Problem(
        "seam", "fab", "yes",
        says=(
            "The seam on the {p} [split|came undone|ripped] [after one wash|the first day|when I sat down].",
            "There's a hole in my {p} [the size of a coin|along the stitching], and I've barely used {them}.",
            "Loose threads everywhere on the {p}, and the stitching is already [going|coming apart].",
            "{p} ripped first time out, really poor quality",
        ),
        about=("the split seam", "the poor stitching on your {p}", "the hole in your {p}"),
        that=("the stitching on your {p} gave way", "your {p} came apart so soon"),
        feels=(
            "Stitching should last longer than a week, and I apologise",
            "I can see why you're disappointed with the quality of your {p}",
        ),
        steps=(
            "please send a photo of the seam so I can approve an exchange",
            "I can post {another} today if you reply with your order number",
            "could you send a picture of the care label so I can tell the factory which batch it was?",
            "I will refund your card today, so please keep the {p} or pass {them} on",
            "please bring the {p} to any store, where our tailor will mend the seam",
        ),
    ),
    Problem(
        "washed_badly", "fab", "yes",
        says=(
            "I washed the {p} at thirty like it says and {it} [shrank|ran|came out a different shape].",
            "The dye from the {p} turned [my whole wash|the bath|my white towels] {col}.",
            "After one gentle wash the {p} {is} [two sizes smaller|covered in bobbles|faded]. The label "
            "said machine washable!",
            "{p} shrunk in the wash, followed the label exactly",
        ),
        about=("the laundry disaster", "the ruined {p}", "the dye running"),
        that=("your {p} didn't survive a gentle wash", "the care label got it wrong"),
        feels=(
            "You followed the label to the letter, so I understand how annoyed you are",
            "Thank you for telling us what the wash did; that dye should have held",
        ),
        steps=(
            "please send a photo of the care label so I can report the batch and refund you",
            "I can post {another} today if you confirm your order number",
            "could you send a picture of the damage so I can refund your card?",
            "please wash any stained things again with a colour remover sheet before they dry",
            "I've refunded your card today and emailed a prepaid label",
        ),
    ),
    Problem(
        "smell", "smell", "yes",
        says=(
            "The {p} smell{s} [awful|of petrol|like a chemistry lab]. I've aired {them} for [a week|ten days].",
            "We can't use the room because of the smell from the new {p}.",
            "Is the glue smell on the {p} safe? {Who} has asthma.",
            "{p} stinks of chemicals, gave me a headache",
        ),
        about=("the smell", "the fumes from your {p}", "the strong smell of the new {p}"),
        that=("your {p} smell{s} so strong", "the smell has spoilt your {p}"),
        feels=(
            "I understand how unpleasant it is to live with that smell",
            "A smell like that is worrying, and you were right to write to us; I apologise",
        ),
        steps=(
            "please leave the {p} near an open window for two days with a bowl of baking soda",
            "I can book a courier to collect the {p} on {day2} and refund your card",
            "could you send me the batch number from the label so I can check it with the maker?",
            "I've put {new} aside from a different batch; please confirm your address",
            "please wrap the {p} in the cover provided and use the return label I'm emailing",
        ),
    ),
    Problem(
        "rusty", "metal", "yes",
        says=(
            "There are [rust spots|orange marks|brown streaks] on the {p} after [two weeks|one wash|a "
            "single shower of rain].",
            "You call the {p} stainless. Then what is all this rust?",
            "My {p} {is} rusting at the [joints|edges|screws]. I've kept {them} dry.",
            "rust on {p} already, only had {them} since {date}",
        ),
        about=("the rust", "the rust on your {p}", "the orange spots"),
        that=("your {p} {has} started to rust", "rust appeared so soon"),
        feels=(
            "Rust in the first month is disappointing, and it shouldn't happen",
            "I understand why you expected the {p} to stay clean and bright",
        ),
        steps=(
            "please send a photo of the spots so I can order {new}",
            "I can swap {them} on {day2} if you reply with the order number",
            "could you tell me the batch number on the sticker so I can check it with the factory?",
            "I will refund your card this afternoon, so please drop the {p} at any store",
            "please wipe the spots with lemon juice, then send a picture if the marks stay",
        ),
    ),
    Problem(
        "stale", "food", "yes",
        says=(
            "The {p} went out of date [two weeks ago|last month|on {date}], before you even posted {them}!",
            "My {p} taste{s} [stale|of soap|off]. [I threw half away.|Even the dog refused.]",
            "The best before date on the {p} has been covered with a new sticker. [Is that legal?|Care to explain?]",
            "{p} mouldy when opened, was going to serve {them} to my in-laws",
        ),
        about=("the stale {p}", "the date on your {p}", "the spoilt treat"),
        that=("your {p} {was}n't fresh", "out of date stock reached you"),
        feels=(
            "Food past its date should never leave us, and I apologise",
            "I understand how off-putting that is; thank you for checking the date",
        ),
        steps=(
            "please send a photo of the date stamp so I can refund you today",
            "I can post {another} with a long date tomorrow if you confirm your address",
            "could you read me the batch number on the seal so I can pull the rest?",
            "I've refunded your card, so please put the {p} in the bin",
            "please keep the packet and send a picture of the sticker so I can warn the supplier",
        ),
    ),
    Problem(
        "rash", "beauty", "yes",
        says=(
            "I used the {p} once and came out in [a rash|red spots|itchy patches].",
            "My skin is burning after trying the {p}. It says 'for sensitive skin' on the front.",
            "Does the {p} contain [nuts|lanolin|alcohol]? {Who} had a bad reaction [this morning|last night].",
            "allergic to the {p} i think, arms all red",
            "The {p} smelled off and left my face [sore|swollen|stinging].",
        ),
        about=("the reaction you had", "the rash", "the trouble with the {p}"),
        that=("the {p} hurt your skin", "you had such a bad reaction"),
        feels=(
            "That sounds painful, and I'm sorry you were hurt",
            "I understand how worrying a reaction like that can be",
        ),
        steps=(
            "please stop using the {p} and send me the batch number under the lid",
            "I will refund your card today, so please show the label to your pharmacist",
            "could you send a photo of the ingredients label so I can pass it to our safety team?",
            "I can email the full ingredients list in five minutes if you tell me the batch number",
            "please rinse the skin with cool water and show the label to a pharmacist",
        ),
    ),
)
