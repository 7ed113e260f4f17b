"""Problem kinds: money, account and paperwork."""

from __future__ import annotations

from .kinds import Problem

PROBLEMS = (
    Problem(
        "charged_twice",
        "",
        "any",
        says=(
            "I've been charged twice for [one|a single] {p}. My bank shows two payments on {date}.",
            "You took the money for the {p} two times! I need that [for rent|back today|cash].",
            "Why are there two payments to you on my statement? I only bought {a}.",
            "double payment for {p}, same amount both times, card ending [4471|0932|8816]",
            "The checkout froze while I was paying for the {p}, so I pressed the button again. Now both "
            "payments have gone through.",
        ),
        about=("the double payment", "the second charge for your {p}", "this billing mistake"),
        that=("you were charged twice for your {p}", "the second payment went through"),
        feels=(
            "Seeing money leave your account twice is worrying, and I apologise",
            "I understand you need that money back quickly",
        ),
        steps=(
            "please send a screenshot of both payments and I'll refund the second one today",
            "I will refund the duplicate payment to your card now; banks show it in three days",
            "could you reply with your order number and the last four digits of the card?",
            "I've cancelled the second charge, and a refund email is on its way",
            "I can return the extra payment this afternoon if you confirm the order number",
        ),
    ),
    Problem(
        "code_rejected",
        "",
        "any",
        says=(
            "My [ten|fifteen|twenty] percent code [didn't work|was rejected] when I bought the {p}, so I "
            "paid full price.",
            "The discount code {code} says 'not valid', yet your leaflet shows it is good until {date}. I "
            "wanted it for {a}.",
            "tried code {code} on {a}, says expired?? its dated this month",
            "I forgot to enter {code} when I ordered the {p} [this morning|last night]. Can it still be applied?",
            "Your voucher page knocked nothing off the {p}. I tried it on my phone and on the computer.",
        ),
        about=("the code not working", "the discount you missed on your {p}", "the trouble at the checkout"),
        that=("your code was turned down", "you paid full price for your {p}"),
        feels=(
            "A code that fails at the last step is annoying, I know",
            "Thank you for telling us; that voucher should have worked on the {p}",
        ),
        steps=(
            "please reply with the code and your order number so I can refund the difference",
            "I can apply the discount by hand and credit your card today",
            "I've made you a new code, which will reach your inbox within the hour",
            "could you send me a photo of the voucher so I can credit the difference?",
            "please enter the code in capital letters with no spaces, then press the apply button",
        ),
    ),
    Problem(
        "refund_missing",
        "",
        "any",
        says=(
            "I sent the {p} back [three weeks ago|on {date}] and I still haven't had my money.",
            "Where is my refund for the {p}? You signed for the return on {day}.",
            "You told me five working days for the {p} refund. It's been [twelve|sixteen|twenty].",
            "no refund yet for returned {p}. how long does it take, a month??",
            "My bank says there is no refund on the way for the {p}, although your email says it was "
            "[issued|paid] on {date}.",
        ),
        about=("the slow refund", "the wait for your money", "the missing refund on your {p}"),
        that=("your refund for the {p} is overdue", "we've kept your money waiting"),
        feels=(
            "Waiting this long for your own money is frustrating",
            "You returned the {p} on time and we let you down, so I apologise",
        ),
        steps=(
            "please send me the return receipt so I can release the refund today",
            "I've released the refund this morning, and it should show by {day2}",
            "could you confirm the last four digits of the card so I can check where the refund went?",
            "I can pay the refund straight to your bank if you reply with the order number",
            "I will email you the bank's reference for the refund, which your branch can trace",
        ),
    ),
    Problem(
        "no_label",
        "",
        "yes",
        says=(
            "I want to return the {p} but the label you emailed [won't print|is blank|is for someone else's order].",
            "[Still waiting for|I never got] the return label for my {p}. It was promised on {day}.",
            "How am I supposed to send the {p} back with no printer? The post office won't take {them} "
            "without a label.",
            "return label for {p} expired yesterday, didnt know they run out",
            "The returns page just spins when I pick the {p}. I've tried [three browsers|two phones].",
        ),
        about=("the trouble with the label", "the hold-up on your {p} return", "the returns page"),
        that=("sending the {p} back has been so awkward", "the label let you down"),
        feels=(
            "Returns should be easy, and I understand this one hasn't been",
            "Thanks for your patience while you try to send the {p} back",
        ),
        steps=(
            "please reply with your order number and I'll email a fresh prepaid label",
            "I can send a QR code to your phone, which the post office will scan and print",
            "I've posted a paper label to you, and it should land by {day2}",
            "could you confirm your email address so I can resend the label?",
            "I will book a courier who brings the label to your door on {day2}",
        ),
    ),
    Problem(
        "cancel",
        "",
        "no",
        says=(
            "Please cancel my {p}. I ordered {them} [by mistake|an hour ago|last night] and the website won't let me.",
            "I bought {a} and then found out {who} had already got me one. Can I still cancel?",
            "I've changed my mind about the {p}. There is no cancel button anywhere [on the site|in my account].",
            "cancel the {p} please, my daughter ordered {them} on my phone",
            "My {p} order says 'processing' and I can't stop it. [I need to cancel|I'd like to cancel] "
            "before it ships.",
        ),
        about=("the missing cancel button", "the bother with cancelling", "the trouble stopping your {p} order"),
        that=("the site wouldn't let you cancel your {p}", "cancelling has been such a chore"),
        feels=(
            "Thank you for telling us before the {p} left the warehouse",
            "I understand, plans change and it should be simple to stop an order",
        ),
        steps=(
            "please reply with the order number within the hour so I can cancel it before packing",
            "I've cancelled the order, and your refund will reach the card by {day2}",
            "I can stop the parcel now if you confirm your name and postcode",
            "could you forward the order email so I can cancel the right one?",
            "if the parcel does arrive, please refuse it at the door and I'll refund your card",
        ),
    ),
    Problem(
        "gift_note",
        "",
        "any",
        says=(
            "I wrote a card message to go with the {p} for {who}, and the parcel came without it.",
            "The {p} {was} a present. There was meant to be a note, instead there was a price slip in the box!",
            "The card with {who}'s {p} had [someone else's name|the wrong message|'Happy retirement' on "
            "it]. It was for a birthday.",
            "paid for gift wrap on the {p}, arrived in a plain brown bag",
            "I ticked gift wrapping for {who}'s {p}. What came was bare cardboard with [the price on it|a "
            "huge invoice].",
        ),
        about=("the spoilt surprise", "the missing gift touches", "the slip-up with the present"),
        that=("the present didn't look the way you planned", "we forgot the gift extras on the {p}"),
        feels=(
            "A present should feel special, so I understand your disappointment",
            "You put thought into that {p}, and we let you down; I apologise",
        ),
        steps=(
            "please reply with the message and I'll post a handwritten card today",
            "I can refund the wrapping charge to your card this afternoon",
            "could you send me the recipient's address so I can post a proper card tomorrow?",
            "I've asked the gift desk to send a wrapped box and ribbon, which arrive on {day2}",
            "I will send a corrected card by first class post if you confirm the order number",
        ),
    ),
    Problem(
        "price_dropped",
        "",
        "any",
        says=(
            "I bought the {p} on {day} and now {itis} [thirty pounds|a fifth|twenty percent] cheaper.",
            "The price of the {p} dropped [the day after|two days after] I paid. [Do you refund the "
            "difference?|That stings.]",
            "Full price on {date}, half price today. I feel cheated over {this} {p}.",
            "{p} in the sale now, i paid full whack last week. difference back?",
        ),
        about=("the price drop", "the bad timing of our sale", "the change in price on your {p}"),
        that=("the {p} became cheaper just after you paid", "the sale came too late for you"),
        feels=(
            "Watching the price fall days later is annoying, I know",
            "I can see why you feel short-changed over the {p}",
        ),
        steps=(
            "please reply with your order number so I can refund the difference to your card",
            "I can credit the difference to your account today, as you bought within fourteen days",
            "could you send me the receipt so I can check the date and refund the gap?",
            "I've sent the difference back to your card, which takes three days to show",
            "please take the receipt to any till and our staff will refund the difference",
        ),
    ),
    Problem(
        "backorder",
        "",
        "no",
        says=(
            "You took my money for {a} and now you email to say {itis} out of stock.",
            "My {p} order has been 'awaiting stock' for [a month|three weeks|five weeks]. [Will it ever "
            "come?|Is it ever coming?]",
            "How can you sell {a} you don't have? I got the out of stock email [today|after two weeks].",
            "ordered {p}, said in stock, now says 6 to 8 weeks. not ok",
            "The {p} {has} been delayed again. The first date was {date}, then {day}, and now no date at all.",
        ),
        about=("the stock mistake", "the wait for the {p} to come back in", "the lack of warning"),
        that=("the {p} you paid for {is}n't in stock", "our website showed the wrong stock"),
        feels=(
            "Being sold something that isn't on the shelf is frustrating, and I apologise",
            "Thank you for holding on for your {p} this long",
        ),
        steps=(
            "I can refund your card today, so please reply with the order number",
            "could you confirm whether the display model from our nearest store would suit, so I can post it today?",
            "I've reserved {new} from the next delivery, which will ship to you on {day2}",
            "please choose another colour or model from the link that I'm emailing you",
            "I will check the stock in our other stores and text you the name of the nearest one by five",
        ),
    ),
    Problem(
        "login",
        "",
        "any",
        says=(
            "I can't log in to see my {p} order. The password email never arrives.",
            "Your site says my account is locked. All I wanted was to [check on|reorder] my {p}.",
            "Every time I reset my password it logs me out again, so I can't pay for the {p} in my basket.",
            "locked out of account, {p} stuck in basket, sale ends tonight!!",
            "The website doesn't recognise my email any more, although I used it to buy {a} [{ago}|on {date}].",
        ),
        about=("the trouble logging in", "the locked account", "the password loop"),
        that=("you're shut out of your account", "you can't see your {p} order"),
        feels=(
            "Being locked out just when you want the {p} is annoying",
            "I understand how tiresome it is to reset a password over and over",
        ),
        steps=(
            "please check your spam folder for the reset link, which I sent a minute ago",
            "I can unlock the account now if you reply with the postcode on file",
            "could you confirm the email address on your last receipt so I can reset the password?",
            "please clear the browser's cookies, then open the new reset link that I'm sending",
            "I've unlocked your account and sent a new password link to your inbox",
        ),
    ),
    Problem(
        "invoice",
        "",
        "any",
        says=(
            "I need an invoice with VAT for the {p} I bought [{ago}|on {date}]. My accountant won't take the email.",
            "The receipt for my {p} has [the wrong company name|no tax number|the wrong date] on it.",
            "lost receipt for {p}, need a copy for insurance",
            "Could I have a proper invoice for the {p}? Work will pay me back only if it shows the company's address.",
            "There was no receipt in the box with my {p}, and I need one for my [expenses|records|landlord].",
        ),
        about=("the missing paperwork", "the trouble over the receipt", "the invoice for your {p}"),
        that=("the paperwork for your {p} wasn't right", "you had to chase us for an invoice"),
        feels=(
            "Thank you for getting in touch about the paperwork",
            "I understand that your {p} can't be claimed back without the right document",
        ),
        steps=(
            "please reply with the company name and address, and I'll email a corrected invoice",
            "I can send a copy of the receipt within ten minutes if you give me the order number",
            "could you send me the card's last four digits so I can find the receipt?",
            "I've emailed the invoice as a PDF, so please check the name on it",
            "please open 'My orders' in your account, where the button on the right prints an invoice",
        ),
    ),
    Problem(
        "payment_declined",
        "",
        "no",
        says=(
            "My card keeps being declined when I try to buy {a}. The bank says nothing is wrong on their side.",
            "I've tried to pay for the {p} [four|five|three] times. It says 'payment failed' but the "
            "money shows as pending.",
            "wont take my card for the {p}, tried 2 cards and paypal",
            "The checkout rejects my postcode when I order the {p}. I have lived here for thirty years!",
        ),
        about=("the failed payment", "the checkout refusing your card", "the trouble paying for your {p}"),
        that=("the checkout turned your card away", "buying {a} has been this hard"),
        feels=(
            "A checkout that refuses a good card is infuriating, and I apologise",
            "I can see why you're fed up; paying for {a} should take a minute",
        ),
        steps=(
            "please send me a screenshot of the error so I can clear the block",
            "I can email you a secure payment link that skips the checkout",
            "could you try the order once more in a private window, using the link I'm emailing?",
            "please call our till team on the number in your account, who can take the card by phone",
            "I've reserved {them} until {day2} and will email a payment link in five minutes",
        ),
    ),
    Problem(
        "shop_refused",
        "",
        "any",
        says=(
            "Your {city} shop refused to take back the {p} because I'd bought {them} online.",
            "I queued for [forty minutes|half an hour] to exchange the {p} and was told to 'try the website'.",
            "The assistant in {city} wouldn't exchange my {p} without the original box. Who keeps boxes?",
            "took the {p} back to the shop, manager said no, website says yes. which is it",
        ),
        about=("the wasted trip", "the confusion in our store", "the failed exchange"),
        that=("the shop turned you away", "you were sent round in circles with the {p}"),
        feels=(
            "Queuing for nothing is maddening, and you have my apologies",
            "Thank you for trying the shop first; they should have taken the {p}",
        ),
        steps=(
            "please reply with the order number and I'll email a note for the store manager",
            "I can book a free courier to collect the {p} from your home on {day2}",
            "I've called the store, so please bring the {p} to the service desk with this email",
            "could you send me a photo of the receipt so I can approve the exchange now?",
            "I will refund your card today and send a prepaid label by email",
        ),
    ),
)
