"""What episodes are drawn from: easy-VQA, names of emoji, or emoji at three levels of their taxonomy."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from app_data.sets.emoji import load_emoji
from app_data.sets.episodes import IclItems, easy_vqa_items, emoji_items, emoji_names, eye_features, held_out_pictures
from app_data.sets.levels import held_out_subgroups, level_items, picture_paths
from app_data.sets.vqa import load_easy_vqa
from app_data.weights.llava import Shown
from app_train.recipes.icl.settings import IclMiniConfig

__all__ = ["LevelSource", "Source", "load_sources"]

ARTISTS = ("openmoji", "noto-300", "noto-700")
# Half of the questions are yes/no; in the data they are three of four.
KINDS = {"yes/no": 0.5, "shape": 0.25, "color": 0.25}
# Taxonomy: share of the unrelated demonstrations that ask what the query asks, and of the episodes whose answers trade names.
OTHERS_OF_KIND, RENAMED = 0.5, 0.5


@dataclass(frozen=True)
class Source:
    """Items to draw episodes from, by kind and by what makes a demonstration related."""

    items: IclItems

    @cached_property
    def by_kind(self) -> dict[str, np.ndarray]:
        """Positions of each kind."""
        return self._by(self.items.kinds)

    @cached_property
    def by_relation(self) -> dict[str, np.ndarray]:
        """Positions of each question; of emoji, whose question is one, of each answer."""
        return self._by(self._relations)

    @property
    def _relations(self) -> tuple[str, ...]:
        return self.items.answers if self.is_emoji else self.items.questions

    @property
    def is_emoji(self) -> bool:
        """Whether relation goes by answer."""
        return self.items.name == "emoji"

    @staticmethod
    def _by(labels: Sequence[str]) -> dict[str, np.ndarray]:
        found = defaultdict(list)
        for position, label in enumerate(labels):
            found[label].append(position)
        return {label: np.array(positions) for label, positions in found.items()}

    def draw(self, num_demos: int, related: float, draw: np.random.Generator) -> list[int]:
        """Demonstrations and a query, whose picture is not among them.

        Args:
            num_demos: K.
            related: Share of related demonstrations (of emoji: of episodes with one).
            draw: Source of chance.
        """
        kinds = [kind for kind in self.by_kind if self.is_emoji or kind in KINDS]
        weights = np.array([KINDS.get(kind, 1.0) for kind in kinds])

        def any_item() -> int:
            kind = kinds[draw.choice(len(kinds), p=weights / weights.sum())]
            return int(draw.choice(self.by_kind[kind]))

        query = any_item()
        row, same = self.items.rows[query], self.by_relation[self._relations[query]]
        same = same[self.items.rows[same] != row]
        demos = []
        while len(demos) < num_demos:
            wanted = not self.is_emoji and len(same) and draw.random() < related
            one = int(draw.choice(same)) if wanted else any_item()
            if self.items.rows[one] != row:
                demos.append(one)
        if self.is_emoji and demos and len(same) and draw.random() < related:
            demos[int(draw.integers(num_demos))] = int(draw.choice(same))
        return [*demos, query]

    def episode(self, num_demos: int, related: float, draw: np.random.Generator) -> list[Shown]:
        """What `draw` gives, as pictures with questions and answers."""
        return [self.items[i] for i in self.draw(num_demos, related, draw)]


class LevelSource(Source):
    """Questions at several levels. A demonstration is related if it has the query's question and answer.

    Half of the other demonstrations ask what the query asks, so that the question alone does not tell which one to read. In a share
    of the episodes the answers of each level trade names (Wei et al., "Symbol tuning", 2023). Asked for are the query's answer and
    those that stood in the episode before.
    """

    @cached_property
    def _relations(self) -> tuple[str, ...]:
        return tuple(f"{kind}: {answer}" for kind, answer in zip(self.items.kinds, self.items.answers, strict=True))

    def draw(self, num_demos: int, related: float, draw: np.random.Generator) -> list[int]:
        """Demonstrations, at least one of them related, and a query."""
        kinds, relations = list(self.by_kind), self._relations
        kind = kinds[draw.integers(len(kinds))]
        query = int(draw.choice(self.by_kind[kind]))
        row, same = self.items.rows[query], self.by_relation[relations[query]]
        same = same[self.items.rows[same] != row]
        demos: list[int] = []
        while len(demos) < num_demos:
            other = kind if draw.random() < OTHERS_OF_KIND else kinds[draw.integers(len(kinds))]
            one = int(draw.choice(same if len(same) and draw.random() < related else self.by_kind[other]))
            if self.items.rows[one] != row:
                demos.append(one)
        if demos and len(same) and not set(demos) & set(same.tolist()):
            demos[int(draw.integers(num_demos))] = int(draw.choice(same))
        return [*demos, query]

    def episode(self, num_demos: int, related: float, draw: np.random.Generator) -> list[Shown]:
        """See the class."""
        chosen = self.draw(num_demos, related, draw)
        keys = [self._relations[i] for i in chosen]
        names = {key: self.items.answers[i] for key, i in zip(keys, chosen, strict=True)}
        if draw.random() < RENAMED:
            for kind in self.by_kind:
                mine = [key for key, i in zip(keys, chosen, strict=True) if self.items.kinds[i] == kind]
                mine = list(dict.fromkeys(mine))
                names |= zip(mine, draw.choice(self._names[kind], len(mine), replace=False).tolist(), strict=True)
        last = len(chosen) - 1
        return [
            replace(self.items[i], answer=names[key], asked=at == last or key in keys[:at])
            for at, (i, key) in enumerate(zip(chosen, keys, strict=True))
        ]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        return {kind: sorted({self.items.answers[i] for i in at}) for kind, at in self.by_kind.items()}


def load_sources(config: IclMiniConfig, tokenizer: object) -> tuple[list[Source], str, tuple[str, ...]]:
    """What episodes are drawn from, the data's fingerprint, and the emoji names that never train."""
    if config.data == "taxonomy":
        drawn = load_emoji(ARTISTS, size=config.size, cache_dir=config.cache_dir)
        paths, features = picture_paths(drawn), eye_features(drawn, config.size, config.cache_dir)
        trained = {path[:2] for path in paths} - held_out_subgroups(paths)
        return [LevelSource(level_items(paths, features, trained))], f"{drawn.fingerprint}-taxonomy", ()
    train = load_easy_vqa()["train"]
    vqa = easy_vqa_items(train, eye_features(train, config.size, config.cache_dir))
    found, prints, answers = [Source(vqa.select(np.flatnonzero(~held_out_pictures(vqa))))], [train.fingerprint], ()
    if config.emoji_share:
        drawn = load_emoji(ARTISTS, size=config.size, cache_dir=config.cache_dir)
        features = eye_features(drawn, config.size, config.cache_dir)
        names, answers = emoji_names(drawn.names, tokenizer)
        found.append(Source(emoji_items(drawn, features, names)))
        prints.append(drawn.fingerprint)
    return found, "-".join(prints), answers
