"""Problem kinds: things that do not work."""

from __future__ import annotations

from .kinds import Problem

PROBLEMS = (
    Problem(
        "dead",
        "elec",
        "yes",
        says=(
            "The {p} won't turn on. I've tried [two sockets|another socket|charging overnight] and nothing happens.",
            "My {p} worked [for a week|twice|until {day}] and now {itis} completely dead.",
            "There's no light, no sound, nothing at all from the {p} I [unpacked|bought] [today|{ago}].",
            "{p} dead out of the box, changed the fuse, still nothing",
            "Pressing the power button on the {p} does absolutely nothing. [Is there a trick to it?|Am I "
            "missing something?]",
        ),
        about=("the dead {p}", "the {p} that won't switch on", "this faulty {p}"),
        that=("your {p} won't switch on", "your {p} died so soon"),
        feels=(
            "{A} that won't even start is a real disappointment",
            "I understand how annoying it is when a new purchase is dead out of the box",
        ),
        steps=(
            "please hold the power button down for thirty seconds with the cable out",
            "I can post {another} today if you reply with your order number",
            "could you send a photo of the serial number underneath so I can approve a swap?",
            "please bring the {p} to any of our stores, where the repair desk will swap {them}",
            "I've booked a courier to collect the dead {one} and hand you a replacement on {day2}",
        ),
    ),
    Problem(
        "battery",
        "batt",
        "yes",
        says=(
            "The battery in my {p} [lasts|holds] [about an hour|twenty minutes|half a day at most]. The "
            "box says [ten hours|a week].",
            "I charge the {p} every night and {itis} flat by [lunch|the time I get to work].",
            "My {p} show{s} full charge, then die{s} without warning.",
            "battery on the {p} is rubbish, 30 mins and gone",
            "How often should {a} need charging? Mine need{s} it [four times a day|every couple of hours].",
        ),
        about=("the poor battery", "the short battery life of your {p}", "the constant charging"),
        that=("the battery in your {p} fades so fast", "your {p} keep{s} running flat"),
        feels=(
            "I can see why a battery that dies by lunch is frustrating",
            "Thank you for telling us; the {p} should last far longer than that",
        ),
        steps=(
            "please run the battery flat once, then charge it for four hours with the supplied cable",
            "I can send a replacement battery today if you give me the order number",
            "could you tell me the serial number so I can check for a faulty batch?",
            "please send a short video of the battery reading so I can approve {new}",
            "I've put {new} aside and will email you a prepaid label for the old {one}",
        ),
    ),
    Problem(
        "pairing",
        "bt",
        "yes",
        says=(
            "My {p} won't pair with my [phone|laptop|new phone]. Bluetooth finds {them}, then drops {them}.",
            "Every [few minutes|time I move] the {p} lose{s} the connection.",
            "I've followed the pairing steps for the {p} [ten|a dozen] times. The light just blinks [red|blue].",
            "{p} not connecting to my phone, worked fine with the old one",
            "The {p} connect{s} to my neighbour's tablet but never to mine. [Funny once|It was funny at "
            "first], not [now|any more].",
        ),
        about=("the pairing trouble", "the dropped connection", "the {p} refusing to connect"),
        that=("your {p} won't stay connected", "your {p} and your phone won't talk to each other"),
        feels=(
            "A connection that keeps dropping is so annoying",
            "I understand you've tried the pairing steps many times already",
        ),
        steps=(
            "please delete the {p} from your phone's Bluetooth list and hold the pairing button for ten seconds",
            "could you tell me your phone model so I can check which app version fits?",
            "I can send {another} today if you reply with the order number",
            "please switch off any other phone nearby, then press the reset button once",
            "I've emailed you a link to the latest update, which takes five minutes to install",
        ),
    ),
    Problem(
        "overheats",
        "hot",
        "yes",
        says=(
            "My {p} get{s} so hot {it} [burned my hand|smell{s} of burning|left a mark on the worktop].",
            "There was smoke coming from the {p} [this morning|when I switched it on at the wall|last "
            "night]. I've pulled the plug.",
            "Should the {p} be too hot to touch after [five minutes|one use]? [It worries me.|I have small children.]",
            "{p} smells of burning plastic, scared to use it",
        ),
        about=("the scare with your {p}", "the burning smell", "the overheating {p}"),
        that=("your {p} gave you such a fright", "your {p} got dangerously hot"),
        feels=(
            "That sounds frightening, and I'm sorry it happened in your home",
            "Thank you for switching the {p} off; smoke is very worrying",
        ),
        steps=(
            "please leave the {p} unplugged and send me a photo of the rating label",
            "I will refund your card in full today, so please keep the {p} unplugged until we collect",
            "could you send the serial number so our safety team can check the batch?",
            "I've booked a courier to collect the {p} on {day2}, so please leave {them} switched off",
            "please take the {p} to your nearest store, where the manager will give you a refund",
        ),
    ),
    Problem(
        "noise",
        "motor",
        "yes",
        says=(
            "The {p} make{s} a [grinding|screeching|rattling] noise [whenever|every time] I use {them}.",
            "My {p} started out quiet; now {it} sound{s} like [a jet taking off|gravel in a tin|a cement mixer].",
            "Is {a} meant to [whine|rattle|clunk] like this? The dog hides under the table.",
            "{p} so loud the neighbours knocked on the wall",
        ),
        about=("the noise from your {p}", "the racket", "the grinding noise"),
        that=("your {p} make{s} such a noise", "your {p} {has} become so loud"),
        feels=(
            "I understand that a racket like that is hard to live with",
            "Thanks for describing the noise so clearly; your {p} should be much quieter",
        ),
        steps=(
            "please send a short video with the sound on so our technician can name the worn part",
            "could you check whether a screw has come loose underneath and tighten it?",
            "I can send a new motor unit today if you reply with the serial number",
            "please unplug the {p} and remove any packing foam from underneath",
            "I've booked a collection for {day2}, and the courier will bring {another}",
        ),
    ),
    Problem(
        "leaks",
        "water",
        "yes",
        says=(
            "The {p} leak{s} [from the base|at the joint|all over the floor] every time.",
            "[Woke up to|Came back to] a puddle round the {p}. Third time this week!",
            "Water drips out of the {p} [as soon as I fill it|even when it's off]. I've checked the seal.",
            "leaky {p}, water everywhere, carpet ruined",
            "I keep a towel under my {p} because of the leak. [Surely that's not right?|That can't be normal.]",
        ),
        about=("the leak", "the leaking {p}", "the puddles"),
        that=("your {p} leak{s}", "your {p} made such a mess"),
        feels=(
            "Mopping up after a new purchase is no fun, and I apologise",
            "I understand how tiresome those puddles must be",
        ),
        steps=(
            "please send a photo of where the water comes out so I can post the right seal",
            "I can post a new seal by first class mail if you confirm your address",
            "could you send me the order number so I can arrange {new}?",
            "please empty the {p} and use the prepaid label that I'm emailing you",
            "I've ordered {new} for you, and the courier will take the leaky {one} away",
        ),
    ),
    Problem(
        "screen",
        "screen",
        "yes",
        says=(
            "The screen on my {p} [flickers|goes black|turns green] [after a few minutes|at random|every evening].",
            "There's a [dead line|bright spot|dark patch] across the {p} screen. [I didn't drop "
            "{them}.|It was there from day one.]",
            "I can hardly read the {p} display. It fades in and out.",
            "{p} display frozen on the logo for two days now",
        ),
        about=("the flickering display", "the trouble with the screen", "the screen fault on your {p}"),
        that=("the screen on your {p} plays up", "your {p} screen let you down"),
        feels=(
            "Squinting at a bad screen is tiring, and I apologise",
            "I can see why a faulty display on a new {p} is disappointing",
        ),
        steps=(
            "please send a photo of the screen while it happens so I can approve a swap",
            "could you hold the power and volume buttons together for fifteen seconds?",
            "I can post {another} tomorrow if you reply with the serial number",
            "please update the display software from the link that I'm emailing",
            "I've booked a repair at our workshop, and a courier will collect the {p} on {day2}",
        ),
    ),
    Problem(
        "app_update",
        "app",
        "yes",
        says=(
            "Since the [last|latest] app update my {p} {has} been [offline|useless|stuck on 'searching'].",
            "The app for the {p} crashes [every time I open it|at the sign-up page].",
            "The {p} want{s} an update, gets to [40|99] percent, then fails. [Over and over.|Every single time.]",
            "app wont find the {p} since tuesdays update, reinstalled twice",
        ),
        about=("the trouble since the update", "the app crashing", "the failed update on your {p}"),
        that=("the update broke your {p}", "the app keeps failing"),
        feels=(
            "An update should make things better, so I understand your frustration",
            "Thanks for reinstalling the app before writing; it's annoying that it made no difference",
        ),
        steps=(
            "please remove the app, restart the phone and install version four from the link I'm emailing",
            "could you send a screenshot of the error with your app version?",
            "please hold the reset button for ten seconds, then add the {p} again",
            "I can roll the {p} back to the old version tonight if you send the serial number",
            "I've sent a repair file by email; please open the link on the phone that runs the app",
        ),
    ),
    Problem(
        "no_manual",
        "elec",
        "yes",
        says=(
            "There was no manual with the {p}, only a card with [pictures|a QR code that goes nowhere].",
            "How do I [set up|clean|use] the {p}? The instructions are [missing|just drawings].",
            "The {p} came without instructions and I have no idea what the [orange|red|blinking] light means.",
            "no booklet in the box with my {p}, is there one i can download",
        ),
        about=("the missing manual", "the lack of instructions", "the {p} arriving without a booklet"),
        that=("your {p} came without instructions", "the manual was left out of the box"),
        feels=(
            "Guessing what each button does is frustrating",
            "I understand, the {p} {isnt} obvious without a guide",
        ),
        steps=(
            "please tell me the model number on the label so I can email the right manual",
            "I can post a printed booklet today if you confirm your address",
            "please scan the code under the base, which opens the full guide",
            "I've emailed a PDF of the manual; please open page four for the first setup",
            "could you send a photo of the light so I can tell you what it means?",
        ),
    ),
    Problem(
        "handle_off",
        "handle",
        "yes",
        says=(
            "The handle on my {p} [came off|snapped|broke] [in my hand|the second time I used "
            "{them}|after three days].",
            "I picked up the {p} and the handle stayed in my hand. [Lucky nobody was hurt.|That could "
            "have been nasty.]",
            "The handle of the {p} was loose from the start; now it has broken right off.",
            "{p} handle broke clean off, superglue didnt hold",
        ),
        about=("the broken handle", "the handle on your {p}", "that nasty moment"),
        that=("the handle on your {p} broke", "the handle gave way"),
        feels=(
            "A handle that snaps like that shouldn't leave the factory, and I apologise",
            "I understand that must have been alarming; thank you for writing",
        ),
        steps=(
            "please send a photo of the break so I can post the right handle",
            "I can send {another} tomorrow if you reply with your order number",
            "could you tell me the model number on the base so I can order a spare handle?",
            "I've put a new handle with its screws in tonight's post",
            "please take the {p} to your nearest store, and the desk will swap {them} on the spot",
        ),
    ),
    Problem(
        "wheel_off",
        "wheel",
        "yes",
        says=(
            "One of the wheels on the {p} [wobbles|has come off|locks up].",
            "A wheel dropped off my {p} [in the middle of the street|on the drive|on day two].",
            "I like the {p}, but the [back|left|front] wheel squeaks and drags.",
            "wheel keeps falling off {p}, bolt wont stay in",
        ),
        about=("the loose wheel", "the wheel on your {p}", "the runaway wheel"),
        that=("a wheel came loose on your {p}", "the wheel gave you trouble"),
        feels=(
            "A wheel that won't stay on is annoying and could hurt someone, so I apologise",
            "Thank you for telling us about the wheel before it got worse",
        ),
        steps=(
            "please send a photo of the axle so I can post the right wheel and bolt",
            "I can post a new wheel set today if you confirm your address",
            "could you check whether the small clip is still on the axle and send a picture?",
            "please stop using the {p} until the new wheel arrives on {day2}",
            "I've booked a courier to bring {another} on {day2}",
        ),
    ),
    Problem(
        "zip",
        "zip",
        "yes",
        says=(
            "The zip on my {p} [jammed|split|came away] [the first time|on day two|after a week].",
            "I can't close the {p}; the zip [catches on the lining|has lost two teeth|slides but nothing shuts].",
            "Zip broke on the {p}. I was halfway up a hill in a gale when it happened!",
            "zip on {p} bust already, only had it a fortnight",
        ),
        about=("the broken zip", "the zip on your {p}", "the jammed zip"),
        that=("the zip on your {p} failed", "the zip broke so soon"),
        feels=(
            "I can see why a zip that fails in the first weeks is a disappointment",
            "A zip should last for years, so I understand how annoying this is",
        ),
        steps=(
            "please send a photo of the zip so I can approve an exchange",
            "I can post {another} in the same style if you reply with your order number",
            "could you bring the {p} to any store, where our tailor will fit a new zip?",
            "I've emailed a prepaid label; please put the {p} in any bag and drop it at the post office",
            "I will refund your card today if you send a picture of the care label",
        ),
    ),
)
