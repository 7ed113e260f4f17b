"""Problem kinds of the evaluation prompts alone. `marks` are words by which a text on the kind is known.

None of them is in any training file, and every evaluation prompt has one.
"""

from __future__ import annotations

from .kinds import Problem

PROBLEMS = (
    Problem(
        "gift_card",
        "",
        "any",
        marks=("gift card",),
        says=(
            "I tried to use a gift card for the {p} and it says the balance is zero. It has never been [used|touched].",
            "The gift card {who} gave me [expired|stopped working] [last month|on {date}]. I was saving it for {a}.",
            "half of my gift card vanished when I paid for the {p}",
            "Can I buy {a} with [two gift cards|a gift card and a bank card]? The checkout lets me enter "
            "only one number.",
            "I scratched the gift card too hard and can't read the last digits. I want to spend it on {a}.",
            "The [till|shop] in {city} wouldn't take my gift card for the {p}. Apparently it's 'online only'.",
            "{Who} lost the email with the gift card that was meant for the {p}. Can you [resend|cancel] it?",
        ),
    ),
    Problem(
        "points",
        "",
        "any",
        marks=("points",),
        says=(
            "My loyalty points for the {p} never showed up. It should be [about 400|nearly a thousand].",
            "All my points disappeared [the night before I ordered|after I bought|when I sent back] the {p}.",
            "no points for the {p}, guy at the till forgot to scan my member card",
            "You promised double points on the {p} until {day}. I got [single|none].",
            "How do I spend my points on {a}? The button is greyed out.",
            "I returned the {p} and you took back [more|twice as many] points than I'd earned.",
            "{Who} and I have separate cards. Could our points be [joined|added together] to pay for the {p}?",
        ),
    ),
    Problem(
        "warranty",
        "hard|small|big",
        "yes",
        marks=("warranty", "guarantee"),
        says=(
            "You turned down my warranty claim for the {p}, saying it's 'wear and tear'. [It's four "
            "months old!|After ten weeks?]",
            "I registered the {p} for the five year guarantee and the system now has no record of it.",
            "does the warranty on my {p} still count if I bought {them} second hand from a friend?",
            "The warranty form for the {p} asks for a code I [can't find|never had].",
            "Who pays the postage on a warranty claim for {a}? It weighs a fair bit.",
            "The man on the phone said my {p} had 'no warranty outside the country'. I bought {them} in {city}!",
            "I sent my {p} off under warranty in {month} and {it} came back with the same fault.",
        ),
    ),
    Problem(
        "preorder",
        "",
        "no",
        marks=("pre-order", "preorder"),
        says=(
            "I pre-ordered the {p} in {month}. The release date has moved [three times|again].",
            "My preorder of the {p} was dropped without a word and now {itis} sold out.",
            "other people already have the {p}, i was first to pre-order. why",
            "Will my pre-order price for the {p} be honoured? The page shows [forty|sixty] pounds more now.",
            "You took the full price for my pre-order of the {p} straight away instead of on the day it ships.",
            "Pre-order buyers were promised a free [bag|poster|cover] with the {p}. There was none in the box.",
            "Can I move my pre-order from the {p} to the bigger model?",
        ),
    ),
    Problem(
        "subscription",
        "",
        "any",
        marks=("subscription", "membership"),
        says=(
            "I bought {a} once, and somehow I've got a subscription that takes [nine|twelve] pounds every month.",
            "I bought the {p}, ended my membership [in {month}|the same week], and you renewed it anyway.",
            "how do i stop the subscription that came with the {p}",
            "The free trial that came with my {p} turned into a paid membership. Nobody [asked|told] me.",
            "Your membership was meant to give me free postage on the {p}. I still paid.",
            "My card was replaced, so my membership lapsed, and now I can't get the member price on the {p}.",
            "Why do I need a subscription just to see where my {p} {is}?",
        ),
    ),
    Problem(
        "review_removed",
        "",
        "yes",
        marks=("review",),
        says=(
            "My honest review of the {p} was deleted. [Why?|Do you only keep the good ones?]",
            "I keep getting asked to review {a} I never bought.",
            "posted a 2 star review of the {p}, its gone now, fishy",
            "Somebody copied my review and my photo of the {p} under [their own|another] name.",
            "How can I edit the review I left on the {p}? I've changed my mind about {them}.",
            "You offered me [five|ten] pounds for a good review of the {p}. Isn't that against the rules?",
            "The reviews of the {p} are about something else entirely. I bought {them} [because of "
            "those|on the strength of those].",
        ),
    ),
    Problem(
        "click_collect",
        "",
        "no",
        marks=("click and collect", "pickup point", "locker"),
        says=(
            "I drove to {city} for my click and collect {p} and it wasn't ready.",
            "The locker with my {p} in it won't open. The pin is [wrong|rejected].",
            "pickup point was shut when i came for the {p}, sign says closed till {day}",
            "Can {who} pick up the {p} for me? My click and collect email has only my name.",
            "Click and collect gave my {p} to another person with the same surname!",
            "My {p} {was} sent back from the pickup point after [two|three] days. The email said I had seven.",
            "There's no parking at the pickup point and I'm on crutches. How do I carry the {p}? Could I "
            "swap to home delivery?",
            "It's pouring, the locker screen is dead, and my {p} {is} inside. [What now?|Now what?]",
        ),
    ),
    Problem(
        "customs",
        "",
        "no",
        marks=("customs", "import tax", "import fee"),
        says=(
            "I was asked for [thirty|forty-five] euros in customs before I could have my {p}. Your site "
            "said all included.",
            "My {p} {is} stuck in customs in {city}. They want a form from you.",
            "surprise import fee on the {p}, who pays that, you or me",
            "You wrote the wrong value on the customs paper for the {p}, so I've been billed too much import tax.",
            "I sent the {p} back to you from abroad and got billed for customs [again|a second time].",
            "Do I need to fill in anything for customs if {who} takes the {p} to [Norway|Canada|Japan]?",
            "The customs office says the {p} need{s} a certificate that was never in the parcel.",
        ),
    ),
    Problem(
        "engraving",
        "small",
        "yes",
        marks=("engrav", "personalis", "initials"),
        says=(
            "The engraving on the {p} says '[Marry|Happy Brithday|Jhon]'. [Somebody can't spell.|I could cry.]",
            "I asked for the {p} to be personalised with {who}'s name and {it} came plain.",
            "wrong initials on the {p}. its K.R. not R.K.",
            "Can personalised things be returned? The {p} I had engraved {has} the wrong [year|date].",
            "The engraved letters on my {p} rubbed off in [a week|two days].",
            "Could the engraving on the {p} be moved? {It} will be worn on the other side.",
            "I paid for two lines of engraving on the {p} and got one.",
        ),
    ),
    Problem(
        "fitter",
        "fit",
        "any",
        marks=("fitter", "installer", "installation"),
        says=(
            "The installation I paid for with the {p} never happened. The fitter [didn't show|went to the wrong flat].",
            "Your fitter left mud on my stairs and a hole in the wall when he set up the {p}.",
            "installer says he wont set up the {p} without another 80 quid",
            "I'd like a new installation date for the {p}. The one I was given is in [{month}|five weeks].",
            "The fitter turned up with no tools, looked at the {p} and left. [Seriously?|I was speechless.]",
            "Is the installation of the {p} included? One page says yes, the other says [ninety|sixty] pounds.",
            "I stayed home for the installer on {day}. At five he texted that the {p} would have to wait.",
        ),
    ),
    Problem(
        "mailing_list",
        "",
        "any",
        marks=("unsubscribe", "marketing", "junk mail"),
        says=(
            "I've clicked unsubscribe [six|ten] times and I still get a daily email about {a}.",
            "Since I bought the {p} you send me marketing texts at [midnight|six in the morning].",
            "stop the junk mail. bought one {p} two years ago, leave me alone",
            "I never agreed to marketing when I bought {a}. Who passed on my address?",
            "When I try to unsubscribe, I get a page that offers me {a}. [Clever.|Very funny.]",
            "You keep sending my late mother marketing for {a}. It upsets all of us.",
            "I'd like to unsubscribe from everything except news about my {p} order.",
            "The unsubscribe link in your {p} mails leads to [a blank page|an error].",
        ),
    ),
    Problem(
        "recall",
        "hard|big",
        "yes",
        marks=("recall",),
        says=(
            "I saw on the news that the {p} {has} been recalled. [Is mine one of them?|Should I be worried?]",
            "Got a recall letter for the {p}, but the number on it [isn't the one|doesn't match what] I have.",
            "is there a recall on the {p}? neighbour says so",
            "Two months since I filled in the recall form for the {p} and not a peep from you.",
            "The recall page asks which {p} I own, and mine isn't on the list.",
            "I gave my {p} to {who} before the recall. How can I [pass on the notice|warn them properly]?",
            "After the recall you sent me a coupon instead of my money for the {p}.",
        ),
    ),
    Problem(
        "price_match",
        "",
        "any",
        marks=("price match", "price promise"),
        says=(
            "The shop across the road sells the same {p} for less. You refused the price match because "
            "it's [their sale|a Sunday].",
            "I sent proof for the price match on the {p} [{ago}|on {date}] and nobody has answered.",
            "price match on the {p}? seen it 30 quid less in {city}",
            "Does your price promise cover {a} from a seller abroad?",
            "Your price match form wants a photo of the shelf. I saw the {p} online, there is no shelf.",
            "I got the price match on the {p}, but only after [an hour|two calls]. Is it always like this?",
            "The lower price for the {p} ended while you were 'checking' my price match.",
        ),
    ),
    Problem(
        "live_chat",
        "",
        "any",
        marks=("chat", "robot"),
        says=(
            "Your live chat cut me off [three times|twice] while I was asking about my {p}.",
            "I explained the whole {p} business to a robot for an hour. [Is anybody human there?|I want a person.]",
            "chat says 45th in queue, only want to know something about the {p}",
            "The person on the chat promised me [a callback|a voucher] over the {p} and then closed the window.",
            "Could I have a copy of my chat from {day}? It has everything we agreed about the {p}.",
            "Your chat robot thinks 'the {p}' is a film. I'd like to speak to someone.",
            "I'm deaf and the chat is my only way to ask about the {p}. It has been closed since {day}.",
        ),
    ),
    Problem(
        "room_of_choice",
        "big",
        "yes",
        marks=("upstairs", "third floor", "fourth floor"),
        says=(
            "I paid extra to have the {p} carried upstairs and the men left {them} in the [lobby|car park].",
            "We live on the fourth floor with no lift, and the {p} {is} sitting at the bottom. Your crew "
            "said it's 'not their job'.",
            "{p} left downstairs, paid for upstairs, im 71",
            "Your men wouldn't bring the {p} up to the third floor because of [their backs|the narrow "
            "stairs|health and safety].",
            "The note on my order says 'upstairs bedroom'. The {p} {is} in the front garden.",
            "We had booked two people to take the {p} to the third floor. One came, alone.",
            "They scraped the wall all the way upstairs with the {p}. [Who pays for the paint?|I have photos.]",
        ),
    ),
)
