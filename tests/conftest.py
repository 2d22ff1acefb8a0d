"""Tests run side by side, one process a core: more threads in each only get in each other's way."""

import torch

torch.set_num_threads(1)
