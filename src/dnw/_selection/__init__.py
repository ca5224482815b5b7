"""Which edges, and how many: pure functions of tensors, shapes and numbers."""
