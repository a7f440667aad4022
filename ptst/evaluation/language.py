"""The language of an answer, as far as a judge needs it: which of those that it reads, or another.

Scripts tell Chinese, Japanese and the unread ones apart; languages in Latin letters are told apart by their commonest
words. Code, names and a few words of anything count as English: only evidence of another language makes an answer
unread.
"""

import re
from collections import Counter

READ = ("en", "es", "fr", "de", "it", "pt", "zh", "ja")

# The commonest short words, without accents; a word that two languages share tells them apart by the others.
_COMMON = {
    "en": "the of and to in is that it for you with are not this be as on or your can have i if but what a an by from "
    "at was will how my me do so no we they all there here more their would about which when who also",
    "es": "el la los las de que y en un una es por con para no se su lo como mas pero sus al del esta este si ya "
    "puedo puedes te mi son muy ser tu esto eso sin sobre hay cuando tambien",
    "fr": "le la les de des et en un une est que qui pour dans pas ne je vous il au aux du sur avec ce cette plus par "
    "son ses mais ou nous sont votre etre c'est tu si on leur ces cela peut",
    "de": "der die das und in zu den ist nicht ich sie es ein eine mit fur auf dem im des von sich auch als an bei "
    "oder aber nach wie kann wir dass ihr wenn einen werden sind du mir ihnen zum zur",
    "it": "il lo la gli le di che e un una per non con sono del della dei delle in si come ma al nel piu questo "
    "questa anche puoi posso ti mi o da su ci se alla loro cosa",
    "pt": "o a os as de que e em um uma para nao com por se do da dos das no na mais como mas ao sua seu isso este "
    "esta voce posso e ou ser pode eu te ja tambem quando sao",
    # unread
    "nl": "de het een en van ik is dat niet in op te zijn met voor je maar aan ook er om naar kan wat als dit deze uit "
    "bij worden door heeft wij niet geen mijn",
    "sv/da/no": "och att det som en ett jag ar inte pa av med for du den har kan om men vi til og jeg er ikke af de "
    "skal eller fra ved hvis hvordan",
    "pl": "i w nie na z sie to jest do ze co jak ale o tak moge po za od czy dla przez jest tego aby lub oraz moze",
    "cs/sk": "a v se na je ze to s z do o pro jako ale za by jsem jsou nebo aby ktery pri nemohu muzete som nie su",
    "ro": "si de la in nu este un o pe cu care sa ca din mai pentru sunt dar poate acest imi ce aceasta sau prin",
    "tr": "ve bir bu icin de da ile ne mi ben sen cok degil olarak daha gibi ama var bunu nasil veya size olan",
    "id/ms": "yang dan di ini itu dengan untuk tidak dari dalam saya adalah pada anda akan atau juga bisa dapat ke "
    "oleh karena tersebut maaf",
    "vi": "la cua va khong toi cac mot co cho ban trong duoc nay voi the nhung de khi nguoi ve",
    "fi": "ja on ei se etta en ole han mutta tai voi kuin niin jos olen joka myos ovat sita voit",
    "hu": "a az es hogy nem is egy de meg ez ha vagy van nem mert csak mint lehet kell",
    "tl/sw": "ang ng sa mga na ay ko ka hindi at para po ito kung na ya wa kwa ni katika hii kuwa cha",
}
_LANGUAGES_OF = {
    w: [k for k, words in _COMMON.items() if w in words.split()] for s in _COMMON.values() for w in s.split()
}
_KANA = re.compile(r"[\u3041-\u30ff\uff66-\uff9d]")
_HAN = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[a-z]")
_LETTER = re.compile(r"[^\W\d_]")


def language(text: str) -> str | None:
    """A language of READ, or None for another. `text`: lower case without accents, as `plainly` makes it."""
    text = text[:1500]
    letters = len(_LETTER.findall(text))
    han, kana, latin = len(_HAN.findall(text)), len(_KANA.findall(text)), len(_LATIN.findall(text))
    if 3 * (han + kana) > max(letters - latin, 1) * 2 and 4 * (han + kana) > letters:
        return "ja" if kana > 0.05 * (han + kana) else "zh"
    if 2 * latin < letters:
        return None
    words = re.findall(r"[a-z][a-z']*", text)
    votes, different = Counter[str](), Counter[str]()
    for word, times in Counter(words).items():
        for name in _LANGUAGES_OF.get(word, ()):
            votes[name] += times
            different[name] += 1
    best, count = max(votes.items(), key=lambda item: item[1], default=("en", 0))
    if different[best] < 2 or count <= 1.25 * votes["en"]:
        return "en"
    enough = count >= max(3, 0.15 * len(words)) or (count == 2 and not votes["en"])
    return (best if best in READ else None) if enough else "en"
