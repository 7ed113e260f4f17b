"""What customers wrap around their problem: greetings, side remarks, questions, names, slips of the fingers."""

OPENERS = {
    "plain": ("", "", "", "", "Hi. ", "Hello, ", "Hi, "),
    "polite": (
        "Good morning. ", "Good afternoon. ", "Dear team, ", "Hello, ", "Dear customer service, ", "Good evening. ",
        "Dear Sir or Madam, ",
        "Hello there. ", "",
    ),
    "chatty": (
        "Hi there, hope you're having a good week! ", "Hello! Bit of an odd one. ", "Hiya, me again. ",
        "So, this is awkward. ",
        "Hi! Quick one for you. ", "I don't usually complain, but here goes. ", "Right, where do I start. ", "Hey! ",
        "Me and {who} are stumped. ",
        "Oh dear. ", "Hope somebody nice reads this. ", "",
    ),
    "angry": (
        "Unbelievable. ", "I am furious. ", "What is going on?! ", "Honestly, what a mess. ", "Third time writing. ",
        "", "", "",
        "Seriously? ", "Ridiculous. ", "For heaven's sake! ",
    ),
}
ENDERS = {
    "plain": ("", "", "", "Thanks.", "Thank you."),
    "polite": (
        "Kind regards, {name}", "Many thanks, {name}", "Best wishes, {name}", "Thank you in advance.",
        "With thanks, {name}", "Thank you, {name}",
        "Yours, {name}", "I'd be grateful for a reply.",
    ),
    "chatty": (
        "Thanks a million! {name}", "Cheers, {name}", "Any help would be lovely x", "Ta! {name}", "Cheers!",
        "Sorry to be a pain!", "{name} x", "",
    ),
    "angry": (
        "Not impressed.", "This is a joke.", "I want my money back.", "Never again.", "Shocking service.",
        "Sort it out!", "I expect an answer TODAY.",
        "I've had enough.", "What exactly am I paying for?", "{name} (very unhappy)", "",
    ),
}
ASKS = (
    "What can you do?", "What happens now?", "What should I do?", "Can you help?", "Please advise.",
    "Can someone sort this out?",
    "What are my options?", "Could you look into it?", "How do we fix this?", "I'd like this sorted, please.",
    "What do you suggest?", "What next?",
    "Can you sort it?", "Who do I talk to?", "How soon can this be fixed?",
)
DETAILS = (
    "Order {order}.", "My order number is {order}.", "The order number is {order}, if you need it.",
    "Order ref {order}, under the name {surname}.",
    "I've been a customer [for years|since 2011|for ages].",
    "I've already [emailed twice|called|written once] and got nowhere.", "It's order {order}.",
    "[I paid by card|I paid with PayPal].", "This is the second time this year.", "I'm not very good with computers.",
)
DETAILS_HAVE = (
    "{It} cost me [sixty|ninety|forty-five] pounds.", "{It} {was} a present for {who}.",
    "I bought {them} [{ago}|on {date}].", "I bought {them} from your {city} shop.",
    "I've had {them} [nine days|a fortnight|less than a month].", "I paid good money for {them}.",
    "I really liked {them} too.",
)
DETAILS_WAIT = (
    "I need {them} [by {day2}|for the weekend].", "{It} {is} a present for {who}.",
    "I ordered {them} [{ago}|on {date}].", "{Who} needs {them} for a trip.",
    "We leave on holiday on {day2}.",
)
NAMES = (
    "Priya", "Tom", "Margaret", "Ahmed", "Joanna", "Callum", "Wei", "Sofia", "Deborah", "Kwame", "Ellie", "Oleg",
    "Fatima", "Gareth", "Mrs Patel", "Mr Hughes",
    "Ines", "Bernadette", "Luca", "Marta", "Dean", "Yuki", "Rosie", "Hamza", "Nia", "Stuart", "Ana", "Patrick",
)
SURNAMES = (
    "Osei", "Whitcombe", "Nowak", "Lindqvist", "Begum", "Fraser", "Costa", "O'Neill", "Tanaka", "Bright", "Varga",
    "Ellison",
)
CITIES = (
    "Leeds", "Bristol", "Cardiff", "Norwich", "Dundee", "York", "Swansea", "Derby", "Exeter", "Belfast", "Reading",
    "Hull",
)
PEOPLE = (
    "my sister", "my dad", "my son", "my daughter", "my wife", "my mum", "my husband", "my nephew", "my gran",
    "my best friend", "my boss", "my niece",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
COLOURS = ("navy", "cream", "red", "grey", "green", "black", "yellow", "white", "teal", "pink")
AGO = (
    "last week", "a month ago", "ten days ago", "last Saturday", "at Easter", "in the sale", "before Christmas",
    "three weeks ago",
)
CODES = ("SAVE15", "HELLO10", "SPRING20", "WELCOME", "TREAT5", "HOME25")
TYPOS = {
    "because": "becuase", "received": "recieved", "delivered": "deliverd", "delivery": "delivry",
    "address": "adress", "the": "teh", "you": "u", "please": "pls",
    "haven't": "havent", "doesn't": "doesnt", "won't": "wont", "can't": "cant", "it's": "its", "I've": "ive",
    "I'm": "im", "they're": "there", "definitely": "definately",
    "another": "anohter", "and": "adn", "your": "ur", "which": "wich", "there's": "theres", "didn't": "didnt",
    "really": "realy", "tomorrow": "tommorow",
    "arrived": "arived", "already": "allready", "don't": "dont", "isn't": "isnt", "with": "wiht",
    "completely": "completly", "thought": "thoght",
}
