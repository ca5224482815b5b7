"""The wiring: what ties a rule to the parameters of a model and to the optimizer that trains them."""
