"""The experiments, as functions that return a config. A variant changes what differs."""

from dnw.recipes._recipes import GROUPS, RECIPES, cifar10, config_of, digits, mnist

__all__ = ["GROUPS", "RECIPES", "cifar10", "config_of", "digits", "mnist"]
