"""A small corpus for `sentence_embeddings.py`: twelve topics, each in documents of several lengths, and queries."""

from __future__ import annotations

# Topic -> (three documents: short, middling, long), (queries for the first, the second and the third of them).
TOPICS: dict[str, tuple[tuple[str, str, str], tuple[str, str, str]]] = {
    "bread": (
        (
            "Sourdough rises by wild yeast.",
            "Knead the dough until a thin sheet of it can be stretched without tearing, then let it rest "
            "under a damp cloth.",
            "A loaf baked in a closed iron pot keeps its own steam for the first half hour, so the crust stays "
            "soft long enough for the crumb to expand; when the lid comes off, the surface dries, the sugars on "
            "it brown, and the thin shell that forms crackles as the bread cools on a rack.",
        ),
        ("yeast that lives in a starter", "how do I know that I have kneaded enough", "getting a crisp crust at home"),
    ),
    "whales": (
        (
            "Humpback whales sing for hours.",
            "Gray whales swim from the lagoons of Mexico to the Arctic each spring, one of the longest "
            "migrations of any mammal.",
            "When a whale dies in deep water its body sinks to the sea floor, where hagfish and sleeper sharks "
            "strip the flesh, worms bore into the bones for their fat, and bacteria that live on sulphide feed "
            "whole communities of mussels and snails for decades after the carcass first settled in the mud.",
        ),
        ("music made by animals in the ocean", "animals that travel thousands of miles", "life on a sunken carcass"),
    ),
    "trains": (
        (
            "The night train leaves at ten.",
            "High-speed lines need curves so wide that a town in the way is usually crossed by a tunnel or "
            "a viaduct.",
            "Before signals were electric, a driver on a single track carried a metal token from one station to "
            "the next; there was only one for each section, it was locked into an instrument at either end, and "
            "no train was allowed to enter the section without it, which made a head-on collision impossible as "
            "long as everybody kept to the rule.",
        ),
        ("sleeping car departure", "why fast railways avoid tight bends", "how railways prevented crashes long ago"),
    ),
    "volcanoes": (
        (
            "Basalt lava flows like honey.",
            "Magma rich in silica is sticky and traps its gas, so that it tends to explode instead of flowing.",
            "In the year after a great eruption the dust and sulphur high in the atmosphere can dim the sun over "
            "half the globe: harvests failed across Europe and New England in 1816, snow fell in June, and "
            "people who knew nothing of a mountain on the other side of the world blamed sunspots, lightning "
            "rods, or the wrath of heaven.",
        ),
        ("runny molten rock", "what makes some eruptions violent", "the year without a summer"),
    ),
    "chess": (
        (
            "A bishop pair favours open positions.",
            "In a rook ending the active rook is often worth more than the pawn that had to be given up for it.",
            "Engines once searched every move to the same depth and judged the final position by counting wood; "
            "those of today let a neural network guess which moves are worth a look and how the game will end, "
            "so that they examine a thousandth of the positions and still see further, and masters have begun "
            "to push the pawn on the edge of the board because the machines do.",
        ),
        ("when two bishops are strong", "endgame technique with rooks", "how computers changed the way chess is played"),
    ),
    "medicine": (
        (
            "Penicillin stops bacteria from building walls.",
            "A fever is not the illness itself but a part of the body's defence, and need not always be brought "
            "down.",
            "Vaccines show the immune system a harmless piece of a germ, or the instructions for one, so that "
            "cells which happen to recognise it multiply and some of them remain for years; when the germ itself "
            "arrives, the answer takes days instead of weeks, and the infection is often over before the person "
            "has noticed anything at all.",
        ),
        ("how antibiotics kill", "should I lower a high temperature", "why immunisation protects for years"),
    ),
    "music": (
        (
            "A cello has four strings.",
            "Equal temperament makes every fifth a little too narrow, so that all twelve keys sound alike.",
            "The shape of a concert hall decides how long the sound of the last chord hangs in the air: a narrow "
            "room with a high ceiling throws early reflections from its side walls and surrounds the listener, "
            "while a wide fan seats more people near the stage and leaves them with an orchestra that seems to "
            "play behind a window.",
        ),
        ("large bowed instrument", "why pianos are tuned slightly wrong", "acoustics of auditoriums"),
    ),
    "astronomy": (
        (
            "Saturn would float in water.",
            "The light of a distant galaxy is stretched on its way, because the space that it crosses has grown.",
            "A star as heavy as the Sun burns hydrogen for ten billion years, swells into a red giant when the "
            "fuel at its centre is spent, sheds its outer layers as a glowing shell, and leaves behind a white "
            "dwarf no larger than the Earth, which has nothing left to burn and cools, slowly, for longer than "
            "the universe has existed so far.",
        ),
        ("a planet less dense than the sea", "redshift and the expanding universe", "what will become of our sun"),
    ),
    "gardens": (
        (
            "Prune roses in late winter.",
            "Beans and peas feed the soil, because bacteria at their roots take nitrogen out of the air.",
            "A compost heap works best when kitchen scraps are layered with dry leaves and it is turned every "
            "few weeks: the microbes that do the work need air as much as water, the middle of the heap becomes "
            "hot enough to kill the seeds of weeds, and by spring what went in as peelings and cardboard has "
            "turned into a dark crumbly earth that smells of the forest.",
        ),
        ("when should I cut back my rose bushes", "plants that fertilise the ground", "turning food waste into soil"),
    ),
    "law": (
        (
            "A contract needs an offer and an acceptance.",
            "Nobody may be tried twice for the same offence after a final acquittal.",
            "A patent is a bargain with the public: the inventor describes the invention so well that a skilled "
            "person could rebuild it, and receives in return the right to forbid others to make or sell it for "
            "twenty years; once these have passed anybody may use what the document teaches, which is why the "
            "description has to be complete from the first day.",
        ),
        ("what makes an agreement binding", "double jeopardy", "exclusive rights of inventors"),
    ),
    "weather": (
        (
            "Fog is a cloud on the ground.",
            "Warm air holds more water than cold air, so rain falls where it is made to rise.",
            "Forecasts for tomorrow are as good as those for the same afternoon were forty years ago: satellites "
            "measure the whole globe every few hours, computers step the equations of the air forward from many "
            "slightly different beginnings, and the spread of the results tells the forecaster how far ahead the "
            "atmosphere can be foreseen that day, which may be two weeks or hardly three days.",
        ),
        ("mist near the surface", "why does it rain over mountains", "how reliable are weather predictions"),
    ),
    "software": (
        (
            "A test that cannot fail is worthless.",
            "Caches are easy to add and hard to keep true: the question is always when to throw an entry away.",
            "Garbage collectors rest on the observation that most objects die young: they allocate by moving a "
            "pointer through a small nursery, copy the few survivors out when it is full, and look at the large "
            "old heap only now and then, so that a program which makes millions of short-lived values pays for "
            "those that live and not for those that it has already forgotten.",
        ),
        ("writing meaningful unit checks", "when to invalidate stored results", "automatic memory management"),
    ),
}  # fmt: skip


def documents(topics: int | None = None) -> list[str]:
    """The documents of each topic, and all three joined, with those of the next topic, to a long one."""
    chosen = list(TOPICS.values())[:topics]
    texts = [text for own, _ in chosen for text in own]
    for (own, _), (other, _) in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        texts.append(" ".join((*own, *other)))
    return texts


def queries(topics: int | None = None) -> list[tuple[str, str]]:
    """(query, the document that it asks for)."""
    chosen = list(TOPICS.values())[:topics]
    return [pair for own, asked in chosen for pair in zip(asked, own, strict=True)]
