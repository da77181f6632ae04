"""What the page `blip` shows: rows, tables and claims, each by the place of its number in a stored result."""

import math

ROWS = {
    "euclidean": "Euclidean BLIP-2 (control)",
    "cosine": "hyperbolic cosine + RQS + RTP (the paper's)",
    "lorentz": "Lorentz distance + RQS + RTP",
    "poincare": "Poincare distance + RQS + RTP",
    "mix": "cosine to Lorentz distance + RQS + RTP",
    "lorentz_max": "Lorentz distance + RTP",
    "lorentz_whole": "Lorentz distance + RQS",
    "lorentz_plain": "Lorentz distance alone",
}
FIRST = ("euclidean", "cosine", "lorentz_plain", "lorentz", "poincare")
# What needs no training of a BLIP-2, the strongest first.
CONTROLS = {
    "ridge": "ridge regression on the captions as classes, same features",
    "start": "Euclidean BLIP-2 before its first step",
    "neighbour": "nearest training picture, same features",
}
GUESS = "guessing"
SPOKEN = {
    "euclidean": "Euclidean BLIP-2 finds the text",
    "cosine": "the paper's hyperbolic cosine",
    "lorentz_plain": "the Lorentz distance alone",
    "lorentz": "the Lorentz distance with RQS and RTP",
}
ARTIST = "twemoji"
LATER = {"size": 128, "width": 256, "text": "qformer", "pool": 1, "views": 1}
# Diagnostics of stage 1, by their name in the records.
DIAGNOSTICS = {
    "radius_image_mean": "radius, pictures", "radius_text_mean": "radius, texts", "clipped_image": "clipped, pictures",
    "clipped_text": "clipped, texts", "query_entropy": "query entropy / ln Q", "query_cosine": "cosine between queries",
    "tau": "temperature", "c": "curvature",
}  # fmt: skip
# Steps over which the matching loss is averaged; the loss of a head that always says "one in three".
LAST_STEPS, CONSTANT_LOSS = 20, math.log(3) - 2 / 3 * math.log(2)
START = {
    "pairs": "towers tied by least squares at the start",
    "linear": "linear least-squares start",
    "fresh": "fresh start",
}
TEXT, PICTURE, GROUP = "retrieval/itc/txt_r1", "retrieval/itc/img_r1", "retrieval/levels/group/txt_r1"
SHOWN = {"first text right, %": TEXT, "first picture right, %": PICTURE, "group of the first text right, %": GROUP}
KINDS = (("text", "txt"), ("picture", "img"))
LENGTH, ERROR = "radius/caption_length/spearman", "radius/scores/radius/error_auroc"
# Title of a table, what it needs, its note, and (title, where) of its columns; "answers" are those after re-ranking, if there was any.
TABLES = (
    ("Retrieval", "retrieval", "In percent; of the subgroup and the group any text counts.",
     [*((f"{what} in the first {k}", f"retrieval/answers/{name}_r{k}") for what, name in KINDS for k in (1, 5, 10)),
      ("subgroup of the first text", "retrieval/levels/subgroup/txt_r1"), ("group of the first text", GROUP),
      ("first text, contrastive alone", TEXT), ("first picture, contrastive alone", PICTURE)]),
    ("The matching head", "start",
     "How often it puts the own text above a wrong candidate, among the candidates that the contrastive similarity finds (0.5 is chance); "
     "first answers by the contrastive similarity at the least-squares start, after training and after re-ranking.",
     [("own text above a wrong one", "retrieval/matching"), ("first text, start", "start/itc/txt_r1"), ("trained", TEXT),
      ("re-ranked", "retrieval/itm/txt_r1"), ("first picture, start", "start/itc/img_r1"), ("trained", PICTURE),
      ("re-ranked", "retrieval/itm/img_r1")]),
    ("Ranked by the cosine of the same features", "retrieval",
     "In percent, by the contrastive similarity. A text that is the first answer of many pictures is a hub: for a distance, texts of small "
     "radius are near to everything.",
     [("first text", TEXT), ("by cosine", "retrieval/cosine/txt_r1"), ("first picture", PICTURE), ("by cosine", "retrieval/cosine/img_r1"),
      ("commonest first answer, share", "retrieval/commonest_answer")]),
    ("Photographs of COCO, never seen in training", "coco_mini", "In percent.",
     [(f"{what} in the first {k}", f"coco_mini/answers/{name}_r{k}") for what, name in KINDS for k in (1, 5)]),
    ("Captions", "captions",
     "Only what comes after the given prompt is scored. Four in five references have fewer than four words then: BLEU-2 stands in "
     "the place of BLEU-4. The same pictures get three other captions: what was said of another picture, one caption for all, and that of "
     "the nearest training picture.",
     [("BLEU-2", "captions/bleu_2"), ("ROUGE-L", "captions/rouge_l"), ("CIDEr", "captions/cider"),
      *((f"{score}, {title}", f"captions/controls/{name}/{key}") for name, title in
        (("other", "other picture"), ("constant", "constant"), ("neighbour", "nearest picture"))
        for score, key in (("BLEU-2", "bleu_2"), ("CIDEr", "cider"))),
      ("exactly right, share", "captions/exact"), ("different captions, share", "captions/distinct")]),
    ("The radius", "radius",
     "Rank correlations of the radius (of texts with their length, of pictures with a crop or blur); how well a small "
     "radius tells wrong first answers (0.5 is noise); area under risk against coverage (lower is better); straightness of recall over ten "
     "bins of the radius (1 is a rising line); shares of texts nearer to the origin than their picture, and of group words nearer than "
     "their text. In the Euclidean row the radius is a monotone function of the Euclidean norm: it is the control.",
     [("with caption length", LENGTH), ("with crop", "radius/crop/spearman"), ("with blur", "radius/blur/spearman"),
      ("tells errors", ERROR), ("risk", "radius/scores/radius/aurc"), ("risk, random", "radius/scores/random/aurc"),
      ("risk, largest softmax", "radius/scores/largest softmax/aurc"),
      ("straightness", "radius/scores/radius/minus_s_r2"), ("straightness, largest softmax", "radius/scores/largest softmax/minus_s_r2"),
      ("text below picture", "radius/text_below_image"), ("group word below text", "radius/group_word_below_caption")]),
    ("At the last step", "diagnostics", "", [(title, f"diagnostics/{key}") for key, title in DIAGNOSTICS.items()]),
)  # fmt: skip
# (claim, row, its number, other row, its number); without another row the number itself is judged.
CLAIMS = (
    ("hyperbolic cosine against Euclidean, first text right, %", "cosine", TEXT, "euclidean", TEXT),
    ("Lorentz distance alone against Euclidean, first text right, %", "lorentz_plain", TEXT, "euclidean", TEXT),
    ("Lorentz distance + RQS + RTP against Euclidean, first text right, %", "lorentz", TEXT, "euclidean", TEXT),
    ("the same, group of the first text right, %", "lorentz", GROUP, "euclidean", GROUP),
    ("Lorentz features ranked by cosine against by distance, first text right, %", "lorentz", "retrieval/cosine/txt_r1", "lorentz", TEXT),
    ("Lorentz distance alone: its features ranked by cosine against by distance, first text right, %", "lorentz_plain",
     "retrieval/cosine/txt_r1", "lorentz_plain", TEXT),
    ("Euclidean against its least-squares start, first text right, %", "euclidean", TEXT, "euclidean", "start/itc/txt_r1"),
    ("Euclidean against ridge regression on the same features, first text right, %", "euclidean", TEXT, "euclidean",
     "controls/ridge/itc/txt_r1"),
    ("RQS added to Lorentz + RTP, first text right, %", "lorentz", TEXT, "lorentz_max", TEXT),
    ("RTP added to Lorentz + RQS, first text right, %", "lorentz", TEXT, "lorentz_whole", TEXT),
    ("RQS and RTP added to Lorentz, correlation of radius and caption length", "lorentz", LENGTH, "lorentz_plain", LENGTH),
    ("radius of Lorentz against Euclidean, telling wrong first answers", "lorentz", ERROR, "euclidean", ERROR),
    ("correlation of a picture's radius with the share that a crop keeps, Lorentz", "lorentz", "radius/crop/spearman", "", ""),
    ("correlation of a picture's radius with blur, Lorentz (lower is better)", "lorentz", "radius/blur/spearman", "", ""),
    ("re-ranking by the matching head, Euclidean, first text right, %", "euclidean", "retrieval/itm/txt_r1", "euclidean", TEXT),
    ("matching head of Euclidean: own text above a wrong candidate, share beyond one half", "euclidean", "retrieval/matching", "half", ""),
    *((f"captions of Euclidean against {title}, CIDEr", "euclidean", "captions/cider", "euclidean", f"captions/controls/{name}/cider")
      for name, title in (("other", "captions of other pictures"), ("constant", "one caption for all"),
                          ("neighbour", "that of the nearest training picture"))),
)  # fmt: skip
TERMS = {
    "RQS": "random query selection: one query at random in place of the best",
    "RTP": "random text pruning: captions are cut short at random",
    "CIDEr": "agreement of word sequences, rare ones counting more",
    "BLEU-4": "precision of word sequences up to four",
    "ROUGE-L": "longest common word sequence",
    "COCO": "Common Objects in Context",
}
