"""CIFAR-100: 20 superclasses of 5 classes each (Krizhevsky, 2009, table of superclasses)."""

from hier_losses.builders._base import DatasetTree
from hier_losses.taxonomy import Taxonomy

_SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}


def cifar100() -> DatasetTree:
    """Return the tree of superclasses and classes.

    Returns:
        The tree; classes in alphabetical order, which is the order of the data set's fine labels. Superclasses are in
        alphabetical order as well, so node s is the coarse label s.

    >>> tree = cifar100()
    >>> tree.taxonomy.level_sizes, tree.taxonomy.path_of(tree.targets[0])
    ((20, 100), ('fruit_and_vegetables', 'apple'))
    """
    paths = {name: (up, name) for up, names in _SUPERCLASSES.items() for name in names.split()}
    tax = Taxonomy.from_paths(paths.values())
    return DatasetTree(tax, tax.indices(paths[name] for name in sorted(paths)), tuple(sorted(paths)))
