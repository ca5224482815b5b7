"""Fewer threads per test process, so that tests that run side by side do not fight over the cores."""

import torch

torch.set_num_threads(1)
