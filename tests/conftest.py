"""One thread, so that results do not depend on how many cores share a sum; hypothesis without a clock."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("minids", deadline=None, print_blob=True)
settings.load_profile("minids")
