"""`hier predict RUN PICTURE...`: the path of each picture through the tree, from a finished run."""

import sys
from pathlib import Path

from app_data.read.pictures import load_picture
from app_data.store.errors import DataError, MissingAssetError
from app_eval.ask.frozen import BACKBONE, FrozenClassifier
from app_eval.ask.settings import Predict
from hier_lora import HierLoraCLIP


def find_model(run: Path) -> Path:
    """The saved model of a run: the folder itself, the product on frozen features, or the only trained row below it.

    Raises:
        DataError: If there is none, or more than one.
    """
    for folder in (run, run / "seed-0" / "product" / "model"):
        if (folder / BACKBONE).exists() or (folder / "hier_lora.json").exists():
            return folder
    known = sorted({p.parent for p in run.glob("**/adapter/hier_lora.json")})
    if not known:
        raise DataError(f"{run} holds no trained model: give the folder of a finished run")
    if len(known) > 1:
        listed = ", ".join(str(p.parent) for p in known[:6])
        raise DataError(f"{run} holds {len(known)} trained models: name one of {listed}")
    return known[0]


def run(config: Predict) -> int:
    """Print one line a picture; pictures that cannot be read are named, and make the exit status 1."""
    folder = find_model(config.run)
    try:
        if (folder / BACKBONE).exists():
            model = FrozenClassifier.load(folder)
            size, decoder = model.size, config.decoder
        else:
            model = HierLoraCLIP.from_pretrained(folder)
            size, decoder = model.picture_size or 224, config.decoder or "joint_path"
    except DataError:
        raise
    except ImportError as error:
        raise MissingAssetError(str(error)) from error
    except ValueError as error:
        raise DataError(str(error)) from error
    unread = 0
    for path in config.pictures:
        try:
            pixels = load_picture(path, size)
        except DataError as error:
            unread += 1
            print(f"error: {path}: {error}", file=sys.stderr)  # noqa: T201
            continue
        prediction = model.predict([pixels], decoder)[0]
        if any(p != p for p in prediction.probabilities):
            raise DataError(f"the model in {folder} gives no finite scores: its weights are damaged")
        print(f"{path}: {prediction}")  # noqa: T201
    return 1 if unread else 0
