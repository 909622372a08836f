"""Circuits from the literature, as data that a circuit is made of: `Circuit.from_heads(**GPT2_SMALL_IOI)`."""

from typing import Any

# Wang et al., "Interpretability in the wild: a circuit for indirect object identification in GPT-2 small" (2022,
# arXiv 2211.00593), figure 2: 26 heads in seven classes, each with its token. As published, they keep 87 % of the logit
# difference. Of a class's paths the main one is given: S-inhibition feeds the queries of all three kinds of movers.
GPT2_SMALL_IOI: dict[str, Any] = {
    "classes": {
        "name mover": ((9, 9), (10, 0), (9, 6)),
        "negative name mover": ((10, 7), (11, 10)),
        "backup name mover": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
        "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
        "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
        "duplicate token": ((0, 1), (0, 10), (3, 0)),
        "previous token": ((2, 2), (4, 11)),
    },
    "position": {
        "name mover": "end",
        "negative name mover": "end",
        "backup name mover": "end",
        "S-inhibition": "end",
        "induction": "s2",
        "duplicate token": "s2",
        "previous token": "s1+1",
    },
    "sign": {"negative name mover": -1},
    "feeds": {
        "name mover": ("logits", None),
        "negative name mover": ("logits", None),
        "backup name mover": ("logits", None),
        "S-inhibition": ("name mover", "q"),
        "induction": ("S-inhibition", "v"),
        "duplicate token": ("S-inhibition", "v"),
        "previous token": ("induction", "k"),
    },
    "n_layers": 12,
    "n_heads": 12,
}
