"""Recipe `cifar100-fewshot`: 20 pictures per class of CIFAR-100 under the WordNet tree of ProTeCt; runs offline.

    hier train cifar100-fewshot --data DIR                  (cifar100_fewshot.tar.gz and trees/cifar100.json)
    hier train cifar100-fewshot --data DIR --shots 5 --seeds 3

Two pictures per class calibrate the probabilities of the saved models and are not trained on.
"""

from app_data.read.labelled import Decoding
from app_data.sets.cifar100 import load_cifar100_fewshot, take_shots
from app_train.core.errors import RunError
from app_train.core.run_folder import Run
from app_train.recipes.lora.compare import read_back
from app_train.recipes.lora.papers import fine_tuned
from app_train.recipes.lora.settings import CifarConfig
from app_train.recipes.lora.task import Task, check_template, load_base


def run(config: CifarConfig) -> dict:
    """Run the recipe; returns the content of its `result.json`."""
    if config.data is None:
        raise RunError("--data is missing: name the folder with cifar100_fewshot.tar.gz and trees/cifar100.json")
    check_template(config.template)
    with Run("cifar100-fewshot", config, mixed_precision=config.fit.mixed_precision) as run:
        decoding = Decoding(size=config.size, cache_dir=config.cache_dir)
        everything, test, cuts = load_cifar100_fewshot(config.data, config.tree, decoding)
        held_out, rest = take_shots(everything, config.calibration_shots)
        val, train = everything.select(held_out), everything.select(rest)
        train = train.select(take_shots(train, config.shots)[0])
        test = test.select(take_shots(test, config.test_shots)[0])
        run.claim(f"{train.fingerprint}-{test.fingerprint}")
        if (known := read_back(run)) is not None:
            return known
        lead = f"{len(train)} training and {len(test)} test pictures, the WordNet tree and 25 cuts of ProTeCt"
        task = Task(run, load_base(config.model), train, test, cuts, config.template, text="chunked", val=val)
        return fine_tuned(task, config, "Few-shot CIFAR-100", lead)
