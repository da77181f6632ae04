"""From what a model did to numbers with intervals."""
