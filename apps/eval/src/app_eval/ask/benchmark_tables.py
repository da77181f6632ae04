"""What `hier eval blip` computes: tables with a row for each picture, and captions, in parts that are kept.

Reference: Li et al., "BLIP-2", ICML 2023, sections 4.2 and 4.4 (captions by beam search; retrieval, 128 candidates re-ranked).
Pictures go through the model's own processor at their own size.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app_data.read.pictures import open_picture
from app_data.sets.captions import CaptionedFile
from app_data.store.atomic import new_file, write_json
from app_data.store.errors import DataError, UnreadablePicture
from app_data.store.progress import Progress
from app_data.store.text import read_json
from app_data.weights.blip2.files import Loaded, load_stage
from app_eval.ask.settings import EvalBlip
from app_eval.measure.captions import write_captions
from app_eval.measure.image_text import caption_table, rank_table
from hyper_blip import HyperbolicFeatures, RetrievalScores, generate_captions
from hyper_blip.qformer import joint_states
from hyper_blip.retrieval import candidates, matching_logits, reranked

CHUNK = 64
RETRIEVAL, CAPTIONS, SAID = "retrieval.safetensors", "captions.safetensors", "captions.json"


def kept_json(path: Path) -> Any:
    """The content of a JSON file of this command; None if there is none."""
    return read_json(path, damaged="delete it and run the same command again") if path.exists() else None


def read_table(path: Path) -> dict[str, Tensor]:
    """The columns of a table.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is damaged: delete it and run the same command again") from error


class Tables:
    """One evaluation's work.

    Args:
        config: the settings; `out` receives the tables, and below it `parts/` what is done so far.
        files: the captioned pictures.
        found: where the model's stages lie.
    """

    def __init__(self, config: EvalBlip, files: Sequence[CaptionedFile], found: Mapping[str, Path]) -> None:
        self.config, self.files, self.found = config, files, found
        self.parts = config.out / "parts"
        self.device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def _model(self, stage: str) -> Loaded:
        config = self.config
        return load_stage(self.found[stage], stage, base=config.base, dtype=config.dtype, device=self.device)

    def _kept(
        self, name: str, items: Sequence[Any], make: Callable[[Sequence[Any], int], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `make` gives for all items, computed in parts of `CHUNK` and the number of the first; parts that are there are read."""
        found: list[dict[str, Tensor]] = []
        with Progress(math.ceil(len(items) / CHUNK), name) as shown:
            for start in range(0, len(items), CHUNK):
                path = self.parts / f"{name}-{start:08d}.safetensors"
                if not path.exists():
                    made = {k: v.contiguous().cpu() for k, v in make(items[start : start + CHUNK], start).items()}
                    with new_file(path) as temporary:
                        save_file(made, temporary)
                found.append(read_table(path))
                shown.step()
        return {key: torch.cat([part[key] for part in found]) for key in found[0]}

    def _batches(self, files: Sequence[CaptionedFile], processor: Any) -> Iterator[tuple[Tensor, list[Image.Image]]]:
        """Pictures ready for the model, and as they are."""
        size = self.config.batch_size
        for start in range(0, len(files), size):
            pictures = []
            for file in files[start : start + size]:
                try:
                    pictures.append(open_picture(file.path))
                except UnreadablePicture as error:
                    raise DataError(
                        f"the picture {file.path} cannot be read, {error}: scores of fewer pictures compare with nothing, repair it"
                    ) from error
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            yield pixels.to(self.device), pictures

    @torch.inference_mode()
    def retrieval(self) -> None:
        """Ranks of all pictures and texts, radii, and what might explain them."""
        model, processor, ours = self._model("stage1")
        config, batch = self.config, self.config.batch_size
        texts = [text if ours else plain(text) for file in self.files for text in file.captions]
        owner = np.repeat(np.arange(len(self.files)), [len(file.captions) for file in self.files])
        made = processor.tokenizer(
            texts, padding="max_length", truncation=True, max_length=model.config.max_tokens, return_tensors="pt"
        )
        ids, mask = made["input_ids"], made["attention_mask"]

        def read(rows: Sequence[int], start: int) -> dict[str, Tensor]:
            parts = torch.tensor(rows).split(batch)
            each = [model.encode_text(ids[p].to(model.device), mask[p].to(model.device)) for p in parts]
            return {k: torch.cat([getattr(f, k) for f in each]) for k in ("tangent", "point", "radius", "clipped")}

        text = self._kept("texts", range(len(texts)), read)
        lifted = _features(text, model.device)
        tau = model.temperature().item()

        def look(files: Sequence[CaptionedFile], start: int) -> dict[str, Tensor]:
            rows: list[dict[str, Tensor]] = []
            for pixels, pictures in self._batches(files, processor):
                states = joint_states(model.blip2, model.vision_features(pixels))[0]
                features = model.project_queries(states)
                itc = model.similarity(features, lifted).float()
                grey = [picture.convert("L") for picture in pictures]
                rows.append(
                    {
                        "itc": itc,
                        "max_softmax": (itc / tau).softmax(1).amax(1),
                        "radius": features.radius.mean(1),
                        "state_norm": states.float().norm(dim=-1).mean(1),
                        "brightness": torch.tensor([float(np.asarray(g).mean()) for g in grey]),
                        "entropy": torch.tensor([float(g.entropy()) for g in grey]),
                    }
                )
            return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

        seen = self._kept("pictures", self.files, look)
        itc = seen.pop("itc")
        table = {**seen, **rank_table(RetrievalScores(itc, itc), owner)}
        if config.rerank:
            chosen = candidates(itc, config.rerank)
            pairs = chosen[0] | chosen[1]

            def match(files: Sequence[CaptionedFile], start: int) -> dict[str, Tensor]:
                found, row = [], start
                for pixels, _ in self._batches(files, processor):
                    # The encoder runs again: its features of 5,000 pictures would take 7 GB of disk, and 3 to 6 % of this pass.
                    visual, wanted = model.vision_features(pixels), pairs[row : row + len(pixels)]
                    found.append(matching_logits(model, visual, (ids, mask), wanted, batch))
                    row += len(pixels)
                return {"itm": torch.cat(found)}

            itm = self._kept("matching", self.files, match)["itm"]
            kind = "itm+itc" if model.config.hyperbolic.eval_similarity == "cosine" else "itm"
            table |= rank_table(reranked(itc, itm, chosen, kind), owner, "_itm")
        lengths = np.bincount(owner, [len(t.split()) for t in texts], len(self.files)) / np.bincount(owner)
        table |= {"owner": torch.from_numpy(owner), "words": torch.from_numpy(lengths), "text_radius": text["radius"]}
        table["c"] = model.curvature().reshape(1)
        with new_file(self.config.out / RETRIEVAL) as temporary:
            save_file({k: v.detach().contiguous().cpu() for k, v in table.items()}, temporary)

    @torch.inference_mode()
    def captions(self) -> None:
        """A caption of every picture, and its scores where there are references."""
        model, processor, _ = self._model("stage2")
        said: list[str] = []
        with Progress(math.ceil(len(self.files) / CHUNK), "captions") as shown:
            for start in range(0, len(self.files), CHUNK):
                path = self.parts / f"captions-{start:08d}.json"
                part = kept_json(path)
                if part is None:
                    part = []
                    for pixels, _ in self._batches(self.files[start : start + CHUNK], processor):
                        part += generate_captions(model, pixels, processor.tokenizer, batch_size=self.config.batch_size)
                    write_json(path, part)
                said += part
                shown.step()
        with new_file(self.config.out / SAID) as temporary:
            write_captions(temporary, {file.id: text for file, text in zip(self.files, said, strict=True)})
        references = [file.captions for file in self.files]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one picture alone has no CIDEr
            table = caption_table(references, said) if all(references) else {}
        with new_file(self.config.out / CAPTIONS) as temporary:
            save_file(table, temporary)


def _features(parts: Mapping[str, Tensor], device: torch.device) -> Any:
    return HyperbolicFeatures(*(parts[k].to(device) for k in ("tangent", "point", "radius", "clipped")))


def plain(caption: str) -> str:
    """A caption as LAVIS hands it to BLIP-2: lower case, without most punctuation, of at most fifty words.

    >>> plain('A "red" bus.')
    'a red bus'
    """
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:50])
