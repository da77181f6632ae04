"""What answers a chat with pictures: an image-text model of transformers, a trained icl-mini, or a server with OpenAI's interface.

A chat is demonstrations as turns of user and assistant, and the question. The model's own chat template makes the prompt; a model
that has none, because it never saw a chat, can be given a plain one.
"""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import InferenceClient
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    IdeficsProcessor,
    LlavaProcessor,
)

from app_data.read.pictures import open_picture
from app_data.store.errors import DataError
from app_data.store.sealed import check_sealed
from app_data.weights.llava import CARD, IMAGE_TOKEN, load_icl_mini
from app_eval.ask.pool import PoolItem
from hyper_icl import (
    CalibrationPlan,
    LogitAdapter,
    SegmentMap,
    attach,
    calibrate,
    insert_demos,
    use_calibrated_attention,
)

Chat = Sequence[Mapping[str, Any]]

_QUALITY = 95  # of the JPEG that a server gets
_SECONDS = 600.0  # that a server may take for one answer

# For models that never saw a chat: a line for every demonstration.
PLAIN = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% elif m['role'] == 'user' %}"
    "Question: {{ part['text'] }} Answer:{% else %} {{ part['text'] }}\n{% endif %}{% endfor %}{% endfor %}"
)
# As icl-mini was trained: picture, question, answer, line break.
_MINI = (
    "{{ bos_token }}{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    + IMAGE_TOKEN
    + "{% elif m['role'] == 'user' %}{{ part['text'] }}{% else %} {{ part['text'] }}\n{% endif %}{% endfor %}{% endfor %}"
)


def chat(
    demos: Sequence[PoolItem], picture: Path, question: str, show: Callable[[Path], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Demonstrations and a question as a chat; `show` makes the part of a message that holds a picture."""

    def asked(path: Path, text: str) -> list[dict[str, Any]]:
        return [show(path), {"type": "text", "text": text}]

    turns = [(asked(demo.path, demo.question), [{"type": "text", "text": demo.answer}]) for demo in demos]
    return insert_demos([{"role": "user", "content": asked(picture, question)}], turns)


def is_icl_mini(folder: Path) -> bool:
    """Whether a run of icl-mini, or its model, lies there."""
    return any((place / CARD).is_file() for place in (folder, folder / "model"))


class LocalModel:
    """An image-text model of transformers with its processor.

    Args:
        name: A folder, a name on the hub, or the folder of a trained icl-mini.
        calibrated: Whether answers will be calibrated.
        plain: Give a model without a chat template the plain one in place of refusing it.
        adapter: Folder of a `LogitAdapter`, for answers that ask for it.

    Raises:
        DataError: It cannot be loaded, its processor has no chat template, its attention cannot be calibrated, or the adapter
            does not fit it.
    """

    def __init__(
        self, name: str, calibrated: bool = False, *, plain: bool = False, adapter: Path | None = None
    ) -> None:
        self.name = name
        if is_icl_mini(Path(name)):
            model, self.processor = _icl_mini(Path(name))
        else:
            model, self.processor = _pretrained(name, plain)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.adapter: LogitAdapter | None = None
        if calibrated or adapter is not None:
            try:
                use_calibrated_attention(self.model)
            except ValueError as error:
                raise DataError(f"the model {name} cannot be calibrated: {_first_line(error)}") from error
        if adapter is not None:
            self.adapter = _adapter(adapter, self.model)

    @property
    def picture_size(self) -> int:
        """Pixels at which pictures are decoded once: the processor's own size, where it names one, or 224."""
        size = getattr(getattr(self.processor, "image_processor", None), "size", None)
        named = [getattr(size, key, None) for key in ("shortest_edge", "height")] if size is not None else []
        return min(next((int(x) for x in named if x), 224), 448)

    def inputs(self, chats: Sequence[Chat], ask: bool = True) -> Mapping[str, Any]:
        """What the model reads, padded on the left; `ask` says that it is to go on."""
        padded = {"processor_kwargs": {"padding": True, "padding_side": "left"}} if len(chats) > 1 else {}
        made = self.processor.apply_chat_template(
            [list(one) for one in chats], add_generation_prompt=ask, tokenize=True, return_dict=True, return_tensors="pt", **padded
        )  # fmt: skip
        return made.to(self.model.device, dtype=self.model.dtype)

    @torch.no_grad()
    def reply(
        self, chats: Sequence[Chat], max_new_tokens: int, bias: Tensor | None = None, adapted: bool = False
    ) -> list[str]:
        """The most likely answers, each chat's; `bias` (chats, k) weighs the demonstrations, `adapted` sets the adapter to work."""
        inputs = self.inputs(chats)
        with ExitStack() as at_work:
            if adapted:
                at_work.enter_context(attach(self.model, self.adapter))
            if bias is not None:
                segments = SegmentMap.from_chats(self.processor, chats, inputs)
                at_work.enter_context(calibrate(self.model, CalibrationPlan(bias.to(self.model.device), segments)))
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def answer(
        self, demos: Sequence[PoolItem], picture: Path, question: str, max_new_tokens: int, bias: Tensor | None = None
    ) -> str:
        """The most likely answer; `bias` (k,) weighs the demonstrations."""
        made = chat(demos, picture, question, lambda path: {"type": "image", "image": open_picture(path)})
        return self.reply([made], max_new_tokens, None if bias is None else bias.unsqueeze(0))[0]


def _pretrained(name: str, plain: bool) -> tuple[torch.nn.Module, Any]:
    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise DataError(f"the model folder {name} does not exist")
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise DataError(f"the image-text model {name} cannot be loaded: {_first_line(error)}") from error
    if not hasattr(processor, "image_processor") or not (getattr(processor, "chat_template", None) or plain):
        raise DataError(f"the model {name} has no chat template for pictures and text: name one that is made for chats")
    if not processor.chat_template:
        processor.chat_template = PLAIN.replace("<image>", getattr(processor, "image_token", "<image>"))
    return model, _Interleaved(processor) if isinstance(processor, IdeficsProcessor) else processor


class _Interleaved:
    """IDEFICS' first processor, whose pictures stand between texts: given apart they would all come last."""

    def __init__(self, processor: IdeficsProcessor) -> None:
        self.own, self.batch_decode = processor, processor.batch_decode

    def apply_chat_template(
        self, chats: Sequence[Any], add_generation_prompt: bool = False, processor_kwargs: Any = None, **_: Any
    ) -> Any:
        """Prompts of chats, or of one."""
        rows = []
        for one in chats if isinstance(chats[0], list) else [chats]:
            parts = [part for message in one for part in message["content"]]
            pictures = iter([part["image"] for part in parts if part["type"] == "image"])
            text = self.own.tokenizer.apply_chat_template(one, chat_template=self.own.chat_template, tokenize=False)
            first, *rest = text.split("<image>")
            rows.append([piece for piece in (first, *(x for t in rest for x in (next(pictures), t))) if piece != ""])
        settings = processor_kwargs or {}
        return self.own(text=rows, return_tensors="pt", add_end_of_utterance_token=False, **settings)


def _icl_mini(folder: Path) -> tuple[torch.nn.Module, Any]:
    """The small LLaVA, and a processor that writes its prompts as training did."""
    mini = load_icl_mini(folder)
    size = mini.card["size"]
    # (x - 127) / 128, as the eye was trained with.
    pictures = CLIPImageProcessorPil(
        size={"height": size, "width": size}, do_center_crop=False, do_convert_rgb=True,
        image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3,
    )  # fmt: skip
    processor = LlavaProcessor(pictures, mini.tokenizer, size, "full", _MINI, IMAGE_TOKEN)
    mini.llava.generation_config.eos_token_id = mini.ids("\n")[0]
    mini.llava.generation_config.pad_token_id = mini.tokenizer.pad_token_id
    return mini.llava, processor


def _adapter(folder: Path, model: torch.nn.Module) -> LogitAdapter:
    place = folder / "adapter" if (folder / "adapter").is_dir() else folder
    check_sealed(place)
    try:
        adapter = LogitAdapter.from_pretrained(place)
    except ValueError as error:
        raise DataError(_first_line(error)) from error
    own = LogitAdapter.for_model(model, adapter.r)
    for name, value in own.state_dict().items():
        if value.shape != adapter.state_dict()[name].shape:
            raise DataError(f"the adapter {folder} was trained on a model of another size: give that model")
    return adapter.to(next(model.parameters()).device)


class Server:
    """A server with OpenAI's interface for chats.

    Args:
        url: Where it is, such as http://localhost:8000/v1, and after a # the name of the model, if the server wants one.
    """

    def __init__(self, url: str) -> None:
        self.url, _, name = url.partition("#")
        self.name = name or None
        # Without a key the client would send the user's token for the hub to whoever listens there.
        self.client = InferenceClient(base_url=self.url, api_key="none", timeout=_SECONDS)

    def answer(
        self, demos: Sequence[PoolItem], picture: Path, question: str, max_new_tokens: int, bias: None = None
    ) -> str:
        """The server's answer at temperature 0.

        Raises:
            DataError: The server cannot be reached, or does not answer as OpenAI's would.
        """
        made = chat(demos, picture, question, _data_uri)
        try:
            reply = self.client.chat_completion(made, model=self.name, max_tokens=max_new_tokens, temperature=0.0)
            return (reply.choices[0].message.content or "").strip()
        # Which errors the client raises depends on the HTTP library that it is built on.
        except Exception as error:
            raise DataError(f"the server {self.url} gives no answer: {_first_line(error)}") from error


def _data_uri(path: Path) -> dict[str, Any]:
    file = io.BytesIO()
    open_picture(path).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")
