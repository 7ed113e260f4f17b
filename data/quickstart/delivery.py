"""Problem kinds: everything between the warehouse and the front door."""

from __future__ import annotations

from .kinds import Problem

PROBLEMS = (
    Problem(
        "late",
        "",
        "no",
        says=(
            "I ordered {a} [ten days ago|two weeks ago|on {date}] and [nothing has come|I'm still "
            "waiting|there's no sign of {them}].",
            "The {p} {was} [supposed|meant] to be here by {day}. It's now [the weekend|days later] and "
            "I've heard nothing.",
            "[How much longer|How long] will my {p} take? You promised [two|three] day delivery and that "
            "was [last week|ages ago].",
            "still no {p}. ordered on {date}, [paid for next day delivery|paid extra for express]",
            "I [took {day} off work|stayed in all of {day}] for the {p} and nobody came.",
            "Your email said the {p} would arrive [before {day}|this week at the latest]. No van, no text, nothing.",
        ),
        about=("the long wait for your {p}", "this delay", "the late delivery"),
        that=("your {p} {has}n't arrived yet", "you're still waiting for your {p}"),
        feels=(
            "Waiting for a parcel that never shows is [really|so] frustrating",
            "Thank you for being so patient; your {p} should have been with you by now",
        ),
        steps=(
            "please reply with your order number so I can [chase the courier|get a firm delivery date] this afternoon",
            "I can send {another} by express courier tomorrow if you confirm your address",
            "could you confirm your delivery address so I can [resend {them}|send {another}] by express post?",
            "I'll refund the delivery charge today and push your parcel to the front of the queue",
            "I've asked the courier for a firm delivery date and will text it to you by [noon|five o'clock]",
        ),
    ),
    Problem(
        "tracking_stuck",
        "",
        "no",
        says=(
            "The tracking for my {p} has said [in transit|out for delivery|at depot] since {day}.",
            "[Tracking page|The tracking link] hasn't moved in [six|five|eight] days. Where {is} my {p}?",
            "my {p} must be lost, tracking stuck at the {city} depot for a week",
            "According to the tracking, the {p} went to {city}, then back to the warehouse, then nowhere. "
            "I live nowhere near {city}.",
            "You sent me a tracking number for the {p} but it [doesn't exist|just gives an error|shows "
            "somebody else's parcel].",
        ),
        about=("the tracking being stuck", "the missing updates on your {p}", "the silence from the courier"),
        that=("the tracking [told you nothing useful|stopped moving]", "your {p} {has} got stuck on the way"),
        feels=(
            "I can see why staring at the same tracking page for days is annoying",
            "I understand the worry when a parcel with your {p} goes quiet",
        ),
        steps=(
            "please send me the tracking number and I'll have the depot search for the parcel this morning",
            "I can open a trace with the courier now and email you the result by tomorrow evening",
            "if the parcel hasn't moved by {day2}, I will send {another} without charge",
            "could you reply with your postcode so the courier can match it to the parcel?",
            "I've opened a search at the depot, and a new tracking link will reach you tonight",
        ),
    ),
    Problem(
        "says_delivered",
        "",
        "no",
        says=(
            "It says my {p} {was} delivered [on {day}|yesterday at noon] but there's nothing here.",
            "Your website claims the {p} {was} handed to me. [I was at work all day|Nobody was home|I was "
            "sitting right here], so who signed?",
            "got a 'delivered' text for my {p}, looked everywhere, asked next door, nothing",
            "The delivery photo for my {p} shows [a green door. Mine is red!|a porch. I don't have a "
            "porch!|somebody's garage. I live in a flat!]",
            "My {p} {is} marked as delivered, yet the doorstep is empty and [the neighbours|both "
            "neighbours] haven't seen a thing.",
        ),
        about=("the missing parcel", "the {p} that never reached you", "this mix-up over the delivery"),
        that=("your {p} never reached you", "the courier marked the parcel as delivered"),
        feels=(
            "Seeing 'delivered' beside an empty doorstep is upsetting",
            "You've every right to be annoyed when a parcel goes astray, and I apologise",
        ),
        steps=(
            "please reply with your house number so I can compare it with the driver's delivery photo",
            "I will ask the driver for the exact drop-off address and phone you before six",
            "I can send {another} today if you confirm your full address",
            "could you check with the neighbour named on the delivery card, then tell me your order number?",
            "I've reported the parcel as lost, so {new} will leave our warehouse tomorrow",
        ),
    ),
    Problem(
        "left_in_rain",
        "",
        "any",
        says=(
            "The driver [left|dumped] my {p} [on the front step|by the bins|on the lawn] in the pouring "
            "rain. Everything is soaked.",
            "Came home to a [soggy|dripping|sodden] box on the drive with my {p} inside.",
            "your driver left the {p} out in the rain ALL DAY, box fell apart in my hands",
            "I asked for the {p} to be left in the shed. {It} {was} left [against the gate|on the path] "
            "and {is} now wet through.",
        ),
        about=("the soaked parcel", "the state your {p} arrived in", "the driver's carelessness"),
        that=("your {p} {was} left out in the rain", "the driver ignored your instructions"),
        feels=(
            "Nobody should come home to a dripping box, and I apologise",
            "I understand how cross you must be to find your {p} soaked",
        ),
        steps=(
            "please send us a photo of the wet box so I can [order {new}|post {another}] today",
            "I can have the courier collect the wet {one} on {day2} and bring {another}",
            "could you reply with your order number so I can send {another} at no cost?",
            "I will refund {them} in full as soon as you upload a picture of the damage",
            "please keep the box, because the courier will collect it on {day2} and hand you {another}",
        ),
    ),
    Problem(
        "driver_rude",
        "",
        "any",
        says=(
            "The delivery driver who brought my {p} [shouted at me|swore at my husband|threw the box over "
            "the gate]. [Disgraceful.|I was shaken.|Unbelievable.]",
            "I'd like to report the man who delivered the {p} on {day}. He was [very rude|aggressive] to {who}.",
            "{Who} opened the door for the {p} and the courier [laughed at her accent|called her "
            "lazy|told her to hurry up].",
            "the driver blocked my drive for half an hour while delivering {a} and then swore at me",
        ),
        about=("the driver's behaviour", "the way you were spoken to", "that scene at your door"),
        that=("our driver treated you like that", "the delivery of your {p} was so unpleasant"),
        feels=(
            "Nobody should be spoken to like that on their own doorstep, and I apologise",
            "Thank you for reporting this; I understand why you were upset",
        ),
        steps=(
            "please reply with the time of the delivery so the depot manager can identify the driver",
            "I can have the depot manager call you tomorrow if you send me a phone number",
            "I've passed the driver's name to the depot manager, who will ring you by {day2}",
            "could you send me your order number so I can attach your account to a formal complaint?",
            "I will refund the delivery charge today and keep that driver off your address",
        ),
    ),
    Problem(
        "part_of_order",
        "",
        "any",
        says=(
            "Only half my order came. The {other} is here but the {p} {is}n't.",
            "I ordered {a} and {a_other} together. One box arrived with just the {other} in it.",
            "Where's the rest of my order? I've got the {other}, no {p}, and no note to explain.",
            "opened the parcel, {other} yes, {p} no. did someone forget?",
            "The delivery note lists {a} but somebody forgot to pack {them}; there was [only the "
            "{other}|nothing but the {other}] in the box.",
        ),
        about=("the half-empty delivery", "the {p} missing from your order", "the gap in your order"),
        that=("only part of your order reached you", "the {p} {was} left out of the box"),
        feels=(
            "Opening a box and finding half the order gone is disappointing",
            "Thanks for letting us know that the {p} {was}n't in the box",
        ),
        steps=(
            "please reply with your order number so I can see whether the {p} went in a second parcel",
            "I can send the {p} on {day2} by tracked courier if you confirm the address",
            "could you send a photo of the delivery note that was in the box?",
            "I've asked the warehouse to send your {p} today, and the tracking number follows by text",
            "I will either post the {p} or refund {them}, so please tell me which with your order number",
        ),
    ),
    Problem(
        "change_address",
        "",
        "no",
        says=(
            "I'm moving on {day} and the {p} I ordered will go to the old address. Can you change it?",
            "Typed the wrong house number when I ordered the {p}. It should be [12 not 21|14b not 14|6 not 9].",
            "need to change address on my {p} order asap, its going to my ex's flat",
            "I've just noticed the {p} {is} being sent to my [work|parents' house|holiday let] instead of "
            "home. [Is it too late to change?|How do I fix that?]",
            "[Could|Can] the {p} go to {who}'s house in {city}? I won't be in all week.",
        ),
        about=("the worry over the address", "the address mix-up on your {p} order"),
        that=("the address for your {p} caused you worry", "the website didn't let you edit the address"),
        feels=(
            "Thank you for spotting the address in good time",
            "I understand, moving house is stressful enough without chasing {a}",
            "Thanks for catching this before the {p} left us",
        ),
        steps=(
            "please reply with the new address and postcode before five so I can update the label",
            "I can redirect the parcel tonight if you send me the full new address",
            "could you confirm the order number and the correct postcode so I can change the label?",
            "I've paused the parcel at the depot; please send the right address by tomorrow",
            "please open the tracking link and choose 'change address', which stays open until the van leaves",
        ),
    ),
    Problem(
        "not_collected",
        "",
        "any",
        says=(
            "I waited in [twice|all {day}] for the courier to pick up the {p} I'm returning. [Nobody came.|No show.]",
            "The collection for my {p} return has now been missed [twice|three times].",
            "The {p} {has} been boxed up in my hallway for [a fortnight|three weeks] because your courier "
            "never turns up to take {them} back.",
            "collection no show AGAIN. want the {p} out of my hall",
        ),
        about=("the missed collection", "the {p} still sitting in your hallway", "the no-show"),
        that=("nobody came to collect your {p}", "you lost a day waiting for our courier"),
        feels=(
            "Losing a whole day to a courier who never comes is infuriating, and I apologise",
            "I understand how annoying it is to keep tripping over a box that we should have taken away",
        ),
        steps=(
            "please reply with a day that suits you and I'll book a morning collection slot",
            "I can email you a prepaid label so you can drop the box at any post office",
            "I've booked a new courier for {day2} between nine and eleven",
            "I will refund the {p} now, and the courier can collect the box next week",
            "could you send me your order number so I can book a different courier for {day2}?",
        ),
    ),
    Problem(
        "opened_box",
        "",
        "yes",
        says=(
            "The box my {p} came in had been opened and [taped up again|stuck back together with brown tape].",
            "I paid for a new {p} ... what arrived {is} clearly somebody's return. There's [hair|a name "
            "sticker|dust] all over {them}.",
            "{This} {p} {is} not new. [Fingerprints everywhere|The seal is broken|The tags are gone] and "
            "the wrapping is torn.",
            "pretty sure you sent me a used {p}, theres an old receipt from {city} in the box lol",
            "Why {is} my {p} second hand? The bag was already open and someone's shopping list was inside.",
        ),
        about=("the opened box", "the used {p} you received", "this disappointing delivery"),
        that=("your {p} didn't arrive new and sealed", "you were sent something that looks used"),
        feels=(
            "You paid for new and should have got new, so I apologise",
            "I understand how disappointing it is to unwrap {a} that somebody else has had",
        ),
        steps=(
            "please send a photo of the broken seal so I can post a sealed replacement",
            "I can swap {them} for {a} fresh from the factory if you reply with your order number",
            "could you send me the sticker number on the box so I can trace which return this was?",
            "I've set aside a sealed replacement, which the courier will bring on {day2}",
            "please pack {them} back in the box and use the prepaid label that I'm emailing you",
        ),
    ),
    Problem(
        "wrong_item",
        "",
        "yes",
        says=(
            "I ordered {a} and got {a_other}. [Nice, but no.|How does that happen?|Not what I asked for.]",
            "You've sent me {a_other} instead of my {p}.",
            "Opened the box expecting my {p}, found {a_other}. [Somebody out there must have mine.|My "
            "kids think it's hilarious.]",
            "wrong item. wanted {p}, got {other}",
            "The packing slip says {p}, the box says {p}, and inside there is {a_other}!",
        ),
        about=("the mix-up", "the wrong parcel", "the wrong delivery"),
        that=("you got somebody else's order", "your {p} went to the wrong house"),
        feels=(
            "Opening a box and finding {a_other} is not what you paid for, and I apologise",
            "I understand the surprise, and the annoyance, of finding the wrong thing in the box",
        ),
        steps=(
            "please reply with the number on the packing slip so I can send the {p} today",
            "I can send the {p} tomorrow and have the driver collect the {other} at the same time",
            "could you send a photo of the label on the box so I can trace your {p}?",
            "I've sent the right parcel out by express, and you'll get a tracking link tonight",
            "please put the {other} back in its box with the prepaid label that I'm emailing",
        ),
    ),
    Problem(
        "short_count",
        "multi",
        "yes",
        says=(
            "The {p} came one short. I paid for [six|eight] and there are [five|seven].",
            "I've counted the {p} twice. Definitely one too few.",
            "One is missing from the {p}, and I have guests on {day}.",
            "only got part of the {p}, box was sealed so it left you like that",
        ),
        about=("the one missing from your {p}", "the miscount", "the short count"),
        that=("your {p} came one short", "we miscounted your {p}"),
        feels=(
            "Being one short with guests coming is annoying",
            "Thank you for counting; we should have done the same, and I apologise",
        ),
        steps=(
            "please reply with your order number so I can post the missing one today",
            "I can send a single extra by express if you confirm your address",
            "could you send a photo of the open box so I can fix it with the packers?",
            "I've sent the missing one by first class post, with delivery by {day2}",
            "please take the receipt to your nearest store and pick up the missing one there",
        ),
    ),
)
