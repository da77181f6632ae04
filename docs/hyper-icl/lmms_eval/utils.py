"""VQAv2 with demonstrations as a task of lmms-eval, whose own few-shot option serves text only.

    hier select --data pool.jsonl --query val2014/*.jpg -k 4 --out demos.json
    HIER_DEMOS=demos.json lmms-eval --model qwen2_5_vl_chat --model_args pretrained=Qwen/Qwen2.5-VL-3B-Instruct \\
        --include_path docs/hyper-icl/lmms_eval --tasks vqav2_demos

The pool holds image, question and answer; the file of choices names each question's picture as COCO does. A picture of the pool does
not serve its own question, as `hier select` leaves it out.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from app_eval.ask.harness import with_demos
from app_eval.measure.vqa import vqa_accuracy


@cache
def _chosen() -> dict[str, list[dict[str, str]]]:
    """Demonstrations by the name of the question's picture."""
    content = json.loads(Path(os.environ["HIER_DEMOS"]).read_text(encoding="utf-8"))
    return {Path(row["query"]).stem: row["demos"] for row in content["queries"]}


def _asked(picture: Image.Image, question: str) -> list[dict[str, Any]]:
    return [{"type": "image", "url": picture}, {"type": "text", "text": f"{question}\nAnswer with a word or a phrase."}]


def _question(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    return [{"role": "user", "content": _asked(doc["image"].convert("RGB"), doc["question"])}]


def _demo(shown: dict[str, str]) -> tuple[Any, Any]:
    picture = Image.open(shown["path"]).convert("RGB")
    return _asked(picture, shown["question"]), [{"type": "text", "text": shown["answer"]}]


doc_to_messages = with_demos(_question, lambda doc: _chosen()[f"COCO_val2014_{int(doc['image_id']):012d}"], _demo)


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """VQA accuracy, as everywhere in this repository."""
    return {"vqa_accuracy": vqa_accuracy(results[0].strip(), [answer["answer"] for answer in doc["answers"]])}
