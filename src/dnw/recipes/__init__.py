"""The experiments, as functions that return a config. A variant changes what differs."""

from dnw.recipes._recipes import RECIPES, cifar10, digits, mnist

__all__ = ["RECIPES", "cifar10", "digits", "mnist"]
